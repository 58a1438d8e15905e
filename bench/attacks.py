"""What attacks over HTTP cost other clients of an edge, with a worker that only pretends."""

import asyncio
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from typing import NamedTuple

import uvloop

from bench.edge import edge_and_worker
from bench.pairs import Plan, show
from bench.processes import resident_bytes
from bench.report import Goal, Row, Section, Spread

SECONDS = 8.0  # of each attack
PAUSE = 0.02  # between two requests of the other client
EVENTS_PER_SECOND, EVENTS = 20.0, 10  # of each answer
MIB = 2**20
NOTE = f"""Each attack lasts {SECONDS:g} s on loopback, from another process. The other client asks
`/chat` all the time, one request after another; its time to the first event is compared with that
before the attack. After it, the edge must answer as before. Memory is the growth of the edge's RSS
during the attack, which it keeps for later requests."""

HEAD = b"POST /chat HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
Parts = Iterable[bytes]


class Attack(NamedTuple):
    """`connections` at a time send `parts`, with `pause` seconds in between, and may not read."""

    name: str
    connections: int
    parts: Callable[[], Parts]
    pause: float = 0.0
    reads: bool = True


def body(content: bytes, path: bytes = b"/chat") -> bytes:
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    return head % (path, len(content)) + content


DEEP = b'{"prompt": ' + b"[" * 250_000 + b"]" * 250_000 + b"}"
TOKENS = b'{"prompt": [' + b"1," * (MIB // 2 - 100) + b"1]}"
MESSAGES = b'{"messages": [' + b",".join([b'{"role": "user", "content": "hi"}'] * 9_999) + b"]}"
STREAM = b'{"prompt": "hi"}'

ATTACKS = (
    Attack("500 clients send headers slowly", 500, lambda: chain([HEAD], repeat(b"X: y\r\n")), 1),
    Attack(
        "300 clients send bodies slowly",
        300,
        lambda: chain([HEAD + b"Content-Length: 100000\r\n\r\n{"], repeat(b" ")),
        1,
    ),
    Attack("5,000 idle connections", 5_000, lambda: repeat(b""), 1),
    Attack("200 clients never read", 200, lambda: chain([body(STREAM)], repeat(b"")), 1, False),
    Attack("16 clients send endless headers", 16, lambda: chain([HEAD], repeat(b"X: y\r\n" * 500))),
    Attack(
        "8 clients send chunks of a byte", 8, lambda: chain([CHUNKED], repeat(b"1\r\n{\r\n" * 500))
    ),
    Attack("16 clients send bodies of 1 MiB", 16, lambda: repeat(body(b" " * MIB))),
    Attack("8 clients send deep JSON", 8, lambda: repeat(body(DEEP))),
    Attack("8 clients send 500,000 tokens", 8, lambda: repeat(body(TOKENS, b"/v1/completions"))),
    Attack(
        "8 clients send 9,999 messages",
        8,
        lambda: repeat(body(MESSAGES, b"/v1/chat/completions")),
    ),
    Attack(
        "8 clients pipeline requests",
        8,
        lambda: repeat(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100),
    ),
)


def run(plan: Plan) -> Section:
    with edge_and_worker(EVENTS_PER_SECOND, EVENTS) as (edge, pool):
        rows = [row for attack in ATTACKS for row in _rows(pool, edge.port, edge.pid, attack)]
    return Section("attacks", "attacks", NOTE, ("before", "during", "after"), rows)


def _rows(pool: ProcessPoolExecutor, port: int, pid: int, attack: Attack) -> Iterator[Row]:
    """Yield two rows about one attack: of the other client's TTFT in ms, and of memory in MiB."""
    before = pool.submit(ask, port, SECONDS / 2).result()
    memory = resident_bytes(pid)
    attacking = pool.submit(perform, ATTACKS.index(attack), port)
    time.sleep(1)  # until it has begun
    during = pool.submit(ask, port, SECONDS - 2).result()
    memory = resident_bytes(pid) - memory
    attacking.result()
    after = pool.submit(ask, port, SECONDS / 2).result()
    show(f"{attack.name}: {before:.1f}, {during:.1f}, {after:.1f} ms, {memory / MIB:.0f} MiB")
    cells = (before, during, after)
    yield Row(f"{attack.name}: TTFT, ms", cells, Spread.of([during / before]), Goal("≤", 2))
    yield Row(f"{attack.name}: memory, MiB", (), Spread.of([memory / MIB]))


def ask(port: int, seconds: float) -> float:
    """Return the median time to the first event, in milliseconds."""
    return uvloop.run(_ask(port, seconds))


async def _ask(port: int, seconds: float) -> float:
    times: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        async with asyncio.timeout(30):
            await _first_event(port)
        times.append((time.monotonic() - started) * 1000)
        await asyncio.sleep(PAUSE)
    return statistics.median(times)


async def _first_event(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(body(STREAM))
    if b" 200 " not in await reader.readline():
        raise RuntimeError("the edge rejected the other client")
    await reader.readuntil(b'"token"')
    writer.close()


def perform(number: int, port: int) -> None:
    """Perform an attack."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(_perform(ATTACKS[number], port))


async def _perform(attack: Attack, port: int) -> None:
    attackers = [asyncio.create_task(_attack(attack, port)) for _ in range(attack.connections)]
    await asyncio.sleep(SECONDS)
    for attacker in attackers:
        attacker.cancel()
    await asyncio.wait(attackers)


async def _attack(attack: Attack, port: int) -> None:
    while True:
        with suppress(ConnectionError, TimeoutError):
            await _attack_once(attack, port)
        await asyncio.sleep(0.05)


async def _attack_once(attack: Attack, port: int) -> None:
    """Send all parts over one connection, until the edge closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(_read(reader)) if attack.reads else None
    try:
        for part in attack.parts():
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(attack.pause)
            if reading and reading.done():
                return
    finally:
        if reading:
            reading.cancel()
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> None:
    while await reader.read(MIB):
        pass

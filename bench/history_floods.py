"""
Measure what one tenant's floods of history cost another one: bob's chats alone and beside each
flood of ann, whether nats-server disconnected history, and what is left of bob's messages.

    python -m bench.history_floods model/demo.gguf
    python -m bench.history_floods model/demo.gguf --only imports

Writes bench/results/history-floods.md, unless only some floods run. The log has 64 MiB, so that
floods fill it.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from bench import floods
from bench.report import RESULTS
from services.contract import subjects
from services.contract.history import HistoryStatus
from services.contract.messages import Empty
from tests.e2e.stack import NO_MONGO, Stack, running_stack

KEYS = {"ann": "ann-key", "bob": "bob-key"}
LOG_BYTES = 64 * 2**20
WARM_UP_SECONDS = 2.0  # of a flood, before bob asks
KEPT = 5  # of bob's exchanges, which must survive
NOTE = f"""One worker, one edge, one history process and a log of {LOG_BYTES // 2**20} MiB without
MongoDB; each process is a user of NATS. Bob asks one short question after the other, each in a
session of its own. *Kept* are {KEPT} exchanges that he had before all floods. *Cut off* counts how
often nats-server disconnected history as a slow consumer."""

Send = Callable[[httpx.AsyncClient, int], Awaitable[httpx.Response]]


class Flood(NamedTuple):
    """`clients` clients of ann send in loops; `send` gets the number of the request."""

    name: str
    clients: int
    send: Send


def lines(number: int, count: int, size: int) -> bytes:
    text = "x" * size
    ids = (f"i{number}-{n}" for n in range(count))
    made = ({"request_id": id_, "prompt": "p", "response": text} for id_ in ids)
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def importing(count: int, size: int) -> Send:
    async def send(client: httpx.AsyncClient, number: int) -> httpx.Response:
        body = lines(number, count, size)
        return await client.post(f"/sessions/import{number % 2}/messages", content=body)

    return send


async def describe(client: httpx.AsyncClient, number: int) -> httpx.Response:
    return await client.patch(f"/sessions/new{number}", json={"system_prompt": "x" * 16_000})


async def find_large(client: httpx.AsyncClient, number: int) -> httpx.Response:
    return await client.get(f"/chat/large{number % 2}")


async def find_unknown(client: httpx.AsyncClient, number: int) -> httpx.Response:
    return await client.get(f"/chat/unknown{number}")


async def cancel_unknown(client: httpx.AsyncClient, number: int) -> httpx.Response:
    return await client.delete(f"/chat/unknown{number}")


async def erase_unknown(client: httpx.AsyncClient, number: int) -> httpx.Response:
    return await client.delete(f"/sessions/unknown{number}")


async def claim_keys(client: httpx.AsyncClient, number: int) -> httpx.Response:
    headers = {"Idempotency-Key": f"key {number} {time.time()}"}
    return await client.post("/chat", headers=headers, json={"prompt": "p", "model": "none"})


async def list_messages(client: httpx.AsyncClient, number: int) -> httpx.Response:
    return await client.get("/messages?limit=1000")


FLOODS = (
    Flood("GET of 500 kB", 60, find_large),
    Flood("imports of 1 MiB", 4, importing(2, 500_000)),
    Flood("imports of 30,000 lines", 2, importing(30_000, 100)),
    Flood("PATCH of new sessions, 16 kB", 16, describe),
    Flood("GET unknown", 4, find_unknown),
    Flood("DELETE unknown answers", 32, cancel_unknown),
    Flood("DELETE unknown sessions", 16, erase_unknown),
    Flood("new Idempotency-Keys, refused", 16, claim_keys),
    Flood("/messages?limit=1000", 4, list_messages),
)


class Row(NamedTuple):
    flood: Flood
    alone: list[float]  # seconds
    beside: list[float]
    failed: int
    statuses: Counter[str]
    cuts: int
    kept: int

    def __str__(self) -> str:
        statuses = ", ".join(f"{count} × {status}" for status, count in self.statuses.items())
        median, worst = (
            f"{1000 * figure:.0f}"
            for figure in (statistics.median(self.beside), max(self.beside))
        )  # fmt: skip
        cells = (
            f"{self.flood.name} × {self.flood.clients}",
            statuses,
            f"{1000 * statistics.median(self.alone):.0f}",
            median,
            worst,
            f"{self.failed} of {len(self.beside) + self.failed}",
            str(self.cuts),
            f"{self.kept} of {KEPT}",
        )
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| flood × clients | answers to ann | alone, ms | p50, ms | worst, ms | bob failed | cut off"
    " | kept |\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    options = _options()
    floods = [f for f in FLOODS if any(part in f.name for part in options.only or [""])]
    settings = {
        "EDGE_API_KEYS": ",".join(f"{tenant}:{key}" for tenant, key in KEYS.items()),
        "MODEL_PATH": str(options.model.resolve()),
        "MODEL_PARALLEL": "8",
    }
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder), NO_MONGO, False, None, **settings) as up,
    ):
        asyncio.run(_prepare(up))
        for flood in floods:
            rows.append(_measure(up, flood, options.seconds))
            print(rows[-1], asyncio.run(_status(up)), flush=True)
    report = ["# One tenant's floods of history", "", NOTE, "", HEAD, *map(str, rows), ""]
    if not options.only:
        (RESULTS / "history-floods.md").write_text("\n".join(report))
    print("\n".join(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what floods of history cost others.")
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each flood")
    parser.add_argument("--only", nargs="+", help="run floods whose name contains one of these")
    return parser.parse_args()


async def _prepare(up: Stack) -> None:
    """Make the log small, and store bob's exchanges and two large ones of ann."""
    async with up.connect("bench") as bus:
        config = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
        config.max_bytes = LOG_BYTES
        await bus.jetstream.update_stream(config)
    async with _client(up, "bob") as client:
        await client.post("/sessions/kept/messages", content=lines(0, KEPT, 100))
    async with _client(up, "ann") as client:
        for number in range(2):
            line = {"request_id": f"large{number}", "prompt": "p", "response": "x" * 500_000}
            await client.post("/sessions/large/messages", content=json.dumps(line))


def _measure(up: Stack, flood: Flood, seconds: float) -> Row:
    """Flood from another process, whose work would delay what bob measures."""
    alone, _ = asyncio.run(_bob(up, seconds / 3))
    cuts = _cuts(up)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    url, number = str(up.http.base_url), FLOODS.index(flood)
    process = context.Process(target=_flood, args=(url, number, seconds + WARM_UP_SECONDS, results))
    process.start()
    try:
        results.get()  # it has started
        time.sleep(WARM_UP_SECONDS)
        beside, failed = asyncio.run(_bob(up, seconds))
        statuses = results.get()
    finally:
        process.join()
    kept = asyncio.run(_kept(up))
    return Row(flood, alone, beside, failed, statuses, _cuts(up) - cuts, kept)


def _cuts(up: Stack) -> int:
    return up.nats.log.read_text().count("Slow Consumer Detected")


async def _status(up: Stack) -> HistoryStatus:
    async with up.connect("bench") as bus:
        return await bus.request(subjects.HISTORY_STATUS, Empty(), HistoryStatus)


async def _kept(up: Stack) -> int:
    async with _client(up, "bob") as client:
        return len((await client.get("/sessions/kept/export")).text.splitlines())


def _client(up: Stack, tenant: str) -> httpx.AsyncClient:
    return _client_of(str(up.http.base_url), tenant)


def _client_of(url: str, tenant: str) -> httpx.AsyncClient:
    headers, limits = {"X-API-Key": KEYS[tenant]}, httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits)


async def _bob(up: Stack, seconds: float) -> tuple[list[float], int]:
    """Return the seconds that whole answers to sequential questions took, and how many failed."""
    times, failed = list[float](), 0
    ends_at = time.monotonic() + seconds
    async with _client(up, "bob") as client:
        while time.monotonic() < ends_at or not times:
            began = time.monotonic()
            body = {"prompt": "Hello", "session_id": f"s{began}", "max_tokens": 4}
            response = await client.post("/chat", json=body)
            if '"done":true' in response.text:
                times.append(time.monotonic() - began)
            else:
                failed += 1
                await asyncio.sleep(0.2)
    return times, failed


def _flood(url: str, number: int, seconds: float, results: "multiprocessing.Queue[Any]") -> None:
    """Runs in a process of its own. Puts None when it starts, and then the counts of statuses."""
    results.put(None)
    results.put(asyncio.run(_send(url, FLOODS[number], seconds)))


async def _send(url: str, flood: Flood, seconds: float) -> Counter[str]:
    numbers = itertools.count()
    async with _client_of(url, "ann") as client:

        async def send() -> str:
            return str((await flood.send(client, next(numbers))).status_code)

        return await floods.repeat(send, flood.clients, seconds)


if __name__ == "__main__":
    main()

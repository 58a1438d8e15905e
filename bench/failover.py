"""What a client notices when processes die or freeze, and what it costs to be ready for that."""

import asyncio
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import uvloop

from bench.bars import Bar, Spread, number
from bench.pairs import Plan, tell
from bench.report import Row, Section
from services.contract import subjects
from services.contract.messages import Token
from services.runtime.bus import Bus
from tests.faults.worker_pair import (
    DISTURB_AFTER,
    StreamedAnswer,
    WorkerPair,
    events,
    running_pair,
    second_edge,
)

KILLS, FREEZES, RESUMES = 6, 4, 20
PUBLISHED = 20_000  # events in a run
RUNS = 5
NOTE = f"""The demo model, slowed to 30 ms a step, two workers and two edges. A worker is killed or
frozen after {DISTURB_AFTER} characters of an answer: seconds until its client hears the next one,
over {KILLS} and {FREEZES} times; the bars are about the longest. `GET /chat/<id>` at another edge
with `Last-Event-ID`, {RESUMES} times in the middle of an answer: milliseconds until the first
event. Events of one token, {PUBLISHED:,} in a run, published to one listener with and without a
reply subject: microseconds of CPU, of the publisher and listener together and of nats-server."""


def run(plan: Plan) -> Section:
    with tempfile.TemporaryDirectory() as folder, running_pair(Path(folder)) as pair:
        rows = [
            _row("death: gap, s", _gaps(pair, KILLS, _kill), Bar("<", 2)),
            _row("freeze: gap, s", _gaps(pair, FREEZES, _freeze), Bar("<", 6)),
        ]
        with second_edge(pair.stack, Path(folder)) as edge:
            rows.append(_row("resume: first event, ms", _resumes(pair, edge.port)))
        rows += _costs(pair)
    return Section("failover", "failover", NOTE, (), rows)


def _row(what: str, values: list[float], bar: Bar | None = None) -> Row:
    """A bar is about the longest, which the result then is; the median is said beside it."""
    spread = Spread.of(values)
    if bar is None:
        return Row(what, (), spread)
    return Row(f"{what} (p50 {number(spread.median)})", (), Spread.of([spread.high]), bar)


def _gaps(
    pair: WorkerPair, times: int, disturb: Callable[[WorkerPair], Callable[[], None]]
) -> list[float]:
    whole = pair.ask("undisturbed").text
    gaps = []
    for n in range(times):
        name = f"{disturb.__name__} {n}"
        undo: list[Callable[[], None]] = []

        def disturb_it(_: StreamedAnswer, undo: list[Callable[[], None]] = undo) -> None:
            undo.append(disturb(pair))

        heard = pair.ask(name, disturb_it)
        assert heard.text == whole and heard.end["stored"] == "log"
        undo[0]()
        gaps.append(heard.longest_gap)
        tell(f"{name}: {heard.longest_gap:.2f} s")
    return gaps


def _kill(pair: WorkerPair) -> Callable[[], None]:
    worker = pair.answering()
    worker.stop(signal.SIGKILL)
    return lambda: pair.start(worker)


def _freeze(pair: WorkerPair) -> Callable[[], None]:
    worker = pair.answering()
    worker.signal(signal.SIGSTOP)

    def wake() -> None:
        worker.signal(signal.SIGCONT)
        time.sleep(2)  # until it is heard of again

    return wake


def _resumes(pair: WorkerPair, port: int) -> list[float]:
    delays: list[float] = []

    def resume(heard: StreamedAnswer) -> None:
        for _ in range(RESUMES):
            began = time.perf_counter()
            last_id = {"Last-Event-ID": str(len(heard.text))}
            with http.stream("GET", heard.address, headers=last_id) as answer:
                next(events(answer))
            delays.append((time.perf_counter() - began) * 1000)

    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        pair.ask("resumed", resume)
    return delays


def _costs(pair: WorkerPair) -> list[Row]:
    url = f"nats://127.0.0.1:{pair.stack.nats.port}"
    runs = [uvloop.run(_publish(url, pair.stack.nats.pid, told)) for told in (False, True) * RUNS]
    rows = []
    for who, column in (("clients", 0), ("nats-server", 1)):
        for what, told in (("without", False), ("with", True)):
            values = [run[column] for run in runs[int(told) :: 2]]
            rows.append(_row(f"{what} a reply subject: {who}, µs an event", values))
    return rows


async def _publish(url: str, server: int, told: bool) -> tuple[float, float]:
    """Microseconds of CPU an event: ours, and the server's."""
    reply = subjects.reply(subjects.OPEN_TENANT, "r", "a")
    token = Token(100, " and", (300,))
    async with Bus.connect(url, "bench") as bus, Bus.connect(url, "listener") as listener:
        async with listener.inbox(reply):
            await listener.is_responsive()
            ours, theirs = time.process_time(), _cpu(server)
            for number in range(PUBLISHED):
                unheard = subjects.undelivered("w" * 32, "_.r", 7, number) if told else ""
                await bus.publish(reply, token, unheard)
                if number % 100 == 99:
                    await asyncio.sleep(0)
            await bus.is_responsive()
            ours, theirs = time.process_time() - ours, _cpu(server) - theirs
    return ours / PUBLISHED * 1e6, theirs / PUBLISHED * 1e6


def _cpu(pid: int) -> float:
    """Seconds that a process has computed, of all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

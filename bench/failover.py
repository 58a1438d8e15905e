"""What a client notices when processes die or freeze, and the cost of being prepared for it."""

import asyncio
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import uvloop

from bench.pairs import Plan, show
from bench.processes import cpu_seconds
from bench.report import Goal, Row, Section, Spread, format_number
from services.contract import subjects
from services.contract.messages import Token
from tests.e2e.stack import Stack
from tests.faults.worker_pair import (
    DISTURB_AFTER,
    StreamedAnswer,
    WorkerPair,
    events,
    running_pair,
    second_edge,
)

KILLS, FREEZES, RESUMES = 6, 4, 20
EVENTS = 20_000  # per run
RUNS = 5
NOTE = f"""The demo model, slowed to 30 ms per step, two workers and two edges. A worker is
killed ({KILLS} times) or frozen ({FREEZES} times) after {DISTURB_AFTER} characters of an answer:
seconds until the client receives the next one; the goals are about the longest. `GET /chat/<id>`
at another edge with `Last-Event-ID`, {RESUMES} times in the middle of an answer: milliseconds
until the first event. Events of one token, {EVENTS:,} per run, published to one listener with
and without a reply subject: microseconds of CPU, of the publisher and listener together and of
nats-server."""


def run(plan: Plan) -> Section:
    with tempfile.TemporaryDirectory() as folder, running_pair(Path(folder)) as pair:
        rows = [
            _row("death: gap, s", _gaps(pair, KILLS, _kill), Goal("<", 2)),
            _row("freeze: gap, s", _gaps(pair, FREEZES, _freeze), Goal("<", 6)),
        ]
        with second_edge(pair.stack, Path(folder)) as edge:
            rows.append(_row("resume: first event, ms", _resumes(pair, edge.port)))
        rows += _costs(pair)
    return Section("failover", "failover", NOTE, (), rows)


def _row(what: str, values: list[float], goal: Goal | None = None) -> Row:
    """Return a row; with a goal its result is the longest value, with the median in the title."""
    spread = Spread.of(values)
    if goal is None:
        return Row(what, (), spread)
    return Row(f"{what} (p50 {format_number(spread.median)})", (), Spread.of([spread.high]), goal)


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

        answer = pair.ask(name, disturb_it)
        assert answer.text == whole and answer.end["stored"] == "log"
        undo[0]()
        gaps.append(answer.longest_gap)
        show(f"{name}: {answer.longest_gap:.2f} s")
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
        time.sleep(2)  # until it reports again

    return wake


def _resumes(pair: WorkerPair, port: int) -> list[float]:
    delays: list[float] = []

    def resume(answer: StreamedAnswer) -> None:
        for _ in range(RESUMES):
            began = time.perf_counter()
            last_id = {"Last-Event-ID": str(len(answer.text))}
            with http.stream("GET", answer.address, headers=last_id) as response:
                next(events(response))
            delays.append((time.perf_counter() - began) * 1000)

    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        pair.ask("resumed", resume)
    return delays


def _costs(pair: WorkerPair) -> list[Row]:
    runs = [uvloop.run(_publish(pair.stack, with_reply)) for with_reply in (False, True) * RUNS]
    rows = []
    for who, column in (("clients", 0), ("nats-server", 1)):
        for what, with_reply in (("without", False), ("with", True)):
            values = [run[column] for run in runs[int(with_reply) :: 2]]
            rows.append(_row(f"{what} a reply subject: {who}, µs per event", values))
    return rows


async def _publish(stack: Stack, with_reply: bool) -> tuple[float, float]:
    """Return the microseconds of CPU per event: of this process, and of nats-server."""
    reply = subjects.reply(subjects.OPEN_TENANT, "r", "a")
    token = Token(100, " and", (300,))
    server = stack.nats.pid
    async with stack.connect("bench") as bus, stack.connect("listener") as listener:
        async with listener.inbox(reply):
            await listener.is_responsive()
            ours, theirs = time.process_time(), cpu_seconds(server)
            for number in range(EVENTS):
                undelivered = subjects.undelivered("w" * 32, "_.r", 7, number) if with_reply else ""
                await bus.publish(reply, token, undelivered)
                if number % 100 == 99:
                    await asyncio.sleep(0)
            await bus.is_responsive()
            ours, theirs = time.process_time() - ours, cpu_seconds(server) - theirs
    return ours / EVENTS * 1e6, theirs / EVENTS * 1e6

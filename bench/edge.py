"""
What the edge costs: CPU per event, memory per stream, and latency, with a worker that only pretends
to generate.
"""

import asyncio
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple, cast
from uuid import uuid4

import httpx
import uvloop

from bench import servers
from bench.load import Target, words
from bench.pairs import Plan, interleave, show
from bench.processes import cpu_seconds, resident_bytes
from bench.report import Goal, Row, Section, Spread
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    ModelInfo,
    RequestAdmitted,
    Started,
    Timings,
    Token,
    Usage,
    WorkerReport,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.e2e.stack import Process, plain_environment
from tests.servers import Server, free_port, nats_server, running, wait_for

RATE = 2.0  # events per second of each stream
SECONDS = 20.0  # of a measurement
RAMP = 150.0  # new streams per second
SETTLE_SECONDS = 3.0
STREAMS = (1, 100, 1000, 5000)
STEPS = ((16, 12.5, 40), (64, 80.0, 20))
"""Streams of one worker, decode steps a second, and the goal in µs of CPU an event."""
STEP_SECONDS = 10.0  # of a measurement
STEP_ROUNDS = 5
ENDLESS = 10**9  # events
EVENT = b'id: 123\ndata: {"token":"%b"}\n\n'
QUESTIONS = 20
ROUNDS = 40  # the machine may be slower for some seconds
DEMO = Path("model/demo.gguf")
DONE = Done("stop", Usage(10, 5, 0), Timings(0, 0, 0), 0, "none")
MODEL = ModelInfo("demo", "digest", 2048, 1000)
NOTE = f"""One edge on loopback, and a worker that pretends: {RATE:g} events a second to each
stream, for {SECONDS:g} s. CPU is that of the edge's process, latency is from the worker's publish
to the client's socket, and memory is the growth of the edge's RSS, divided by the streams. A bare
relay only passes what it reads from one connection to the streams' sockets, on the same event loop:
no HTTP, no NATS, no JSON."""
STEPS_NOTE = f"""All streams get their events at the same time, within a millisecond, as by the
decode steps of a worker. The rest is as in `edge`. An idle edge's own CPU counts, too. The median
of {STEP_ROUNDS} measurements of {STEP_SECONDS:g} s, with the lowest and the highest."""
FIRST_TOKEN_NOTE = f"""The median TTFT of {QUESTIONS} questions of 20 words, one after the other,
minus that of llama-server alone with the same demo model: the median of {ROUNDS} rounds, with the
lowest and the highest. llama-server has no sessions: like for like is `/v1/chat/completions`
without one. A session adds reading it from JetStream."""

_STAMP = re.compile(rb'"(\d{12,})"')


class Latencies(NamedTuple):
    p50: float  # ms
    p99: float
    events: int


class Cost(NamedTuple):
    cpu: float  # µs of the edge per event
    memory: float  # kB of the edge per stream
    latencies: Latencies


def run_first_token(plan: Plan) -> Section:
    """Measure the whole stack and llama-server alone, with the demo model, in turns."""
    with servers.whole_stack(DEMO) as up, servers.llama_server(DEMO) as theirs:
        ours = servers.stack_target(up)
        stateless = servers.peer(str(up.http.base_url).rstrip("/"))
        rounds = uvloop.run(_first_tokens([theirs, stateless, ours]))
    asked = ("added, without a session", "added, new session")
    rows = [
        Row(f"{what}, ms", (), Spread.of([each[i] - each[0] for each in rounds]), Goal("≤", 3))
        for i, what in enumerate(asked, 1)
    ]
    names = ("llama-server", "without a session", "new session")
    rows += [
        Row(f"{name}: TTFT, ms", (), Spread.of([each[i] for each in rounds]))
        for i, name in enumerate(names)
    ]
    return Section("first-token", "edge", FIRST_TOKEN_NOTE, (), rows)


def run(plan: Plan) -> Section:
    rows: list[Row] = []
    for streams in STREAMS:
        cost = measure(streams)
        show(f"{streams} streams: {cost}")
        is_barred = streams == STREAMS[-1]
        what = f"{streams:,} streams" if streams > 1 else "1 stream"
        found = (
            ("CPU, µs an event", cost.cpu, 30),
            ("p50, ms", cost.latencies.p50, None),
            ("p99, ms", cost.latencies.p99, 50),
            ("memory, kB a stream", cost.memory, 60),
        )
        for name, value, bar in found:
            goal = Goal("<", bar) if bar and is_barred else None
            rows.append(Row(f"{what}: {name}", (), Spread.of([value]), goal))
        bare = relay_cost(streams).cpu
        rows.append(Row(f"{what}: CPU of a bare relay, µs an event", (), Spread.of([bare])))
    return Section("edge", "edge", NOTE, (), rows)


def run_steps(plan: Plan) -> Section:
    rows: list[Row] = []
    for streams, rate, bar in STEPS:
        costs = []
        for _ in range(STEP_ROUNDS):
            costs.append(measure(streams, rate, STEP_SECONDS, is_in_steps=True))
            show(f"{streams} streams, {rate:g} steps a second: {costs[-1]}")
        what = f"{streams} streams, {streams * rate:,.0f} events a second"
        cpu = Spread.of([cost.cpu for cost in costs])
        rows.append(Row(f"{what}: CPU, µs an event", (), cpu, Goal("≤", bar)))
        p99 = Spread.of([cost.latencies.p99 for cost in costs])
        rows.append(Row(f"{what}: p99, ms", (), p99))
    return Section("edge-steps", "edge", STEPS_NOTE, (), rows)


def relay_cost(streams: int, rate: float = RATE, seconds: float = SECONDS) -> Cost:
    """
    Measure a process that only passes what it reads from one connection to the streams, on the
    edge's event loop: no HTTP, no NATS, no JSON. An edge in Python can't cost less.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        port, source, listens = free_port(), free_port(), context.Event()
        relaying = context.Process(target=_relay, args=(port, source, listens))
        sending = context.Process(target=_send_to_relay, args=(source, rate))
        relaying.start()
        listens.wait()
        sending.start()
        try:
            assert relaying.pid is not None
            return _measure(relaying.pid, pool, port, streams, seconds)
        finally:
            sending.kill()
            relaying.kill()


def _relay(port: int, source: int, listens: Event) -> None:
    raise_file_limit()
    uvloop.run(_serve_relay(port, source, listens))


async def _serve_relay(port: int, source: int, listens: Event) -> None:
    """Pass a line `<number> <text>` of the source to the stream with this number."""
    streams: list[asyncio.Transport] = []
    new: list[asyncio.Transport] = []  # sources, which learn how many streams there are

    class Client(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            streams.append(cast(asyncio.Transport, transport))
            for each in new:
                each.write(b"\n")

    class Source(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            new.append(cast(asyncio.Transport, transport))
            new[-1].write(b"\n" * len(streams))  # which came before
            self._rest = b""

        def data_received(self, data: bytes) -> None:
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                number, _, text = line.partition(b" ")
                if not (stream := streams[int(number)]).is_closing():
                    stream.write(EVENT % text)

    loop = asyncio.get_running_loop()
    await loop.create_server(Client, "127.0.0.1", port)
    await loop.create_server(Source, "127.0.0.1", source)
    listens.set()
    await asyncio.Event().wait()


def _send_to_relay(source: int, rate: float) -> None:
    uvloop.run(_send_events(source, rate))


async def _send_events(source: int, rate: float) -> None:
    """Send `rate` events a second to each stream that the relay has announced by a line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", source)

    async def answer(number: int) -> None:
        begin, count = time.monotonic(), 0
        while True:
            writer.write(b"%d %d\n" % (number, time.monotonic_ns()))
            count += 1
            await asyncio.sleep(max(0, begin + count / rate - time.monotonic()))

    answers: list[asyncio.Task[None]] = []
    while await reader.readline():
        answers.append(asyncio.create_task(answer(len(answers))))


async def _first_tokens(targets: list[Target]) -> list[tuple[float, ...]]:
    for target in targets:
        await _first_token(target)  # warm up
    runs = [partial(_first_token, target) for target in targets]
    return await interleave("TTFT of the demo model", runs, ROUNDS, lambda ttft: ttft)


async def _first_token(target: Target) -> float:
    """Return the median time to the first token of questions one after the other, in ms."""
    run = uuid4().hex
    samples = [await target.ask(f"{run} {i}", words(20), 8) for i in range(QUESTIONS)]
    return 1000 * statistics.median(sample.ttft for sample in samples)


def measure(
    streams: int, rate: float = RATE, seconds: float = SECONDS, is_in_steps: bool = False
) -> Cost:
    with edge_and_worker(rate, ENDLESS, is_in_steps) as (edge, pool):
        return _measure(edge.pid, pool, edge.port, streams, seconds)


def _measure(pid: int, pool: ProcessPoolExecutor, port: int, streams: int, seconds: float) -> Cost:
    """Open streams to a process; return what it spends on them for `seconds`."""
    memory = resident_bytes(pid)
    begin = time.monotonic() + SETTLE_SECONDS + streams / RAMP
    reading = pool.submit(read_streams, port, streams, begin, seconds)
    time.sleep(begin - time.monotonic())
    cpu = cpu_seconds(pid)
    time.sleep(seconds)
    cpu = cpu_seconds(pid) - cpu
    memory = resident_bytes(pid) - memory
    latencies = reading.result()
    return Cost(cpu / latencies.events * 1e6, memory / streams / 1000, latencies)


@contextmanager
def edge_and_worker(
    rate: float, events: int, is_in_steps: bool = False
) -> Iterator[tuple[Server, ProcessPoolExecutor]]:
    """Yield an edge whose worker pretends (see `pretend`), and a pool for two more processes."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        edge_in(Path(folder)) as edge,
        context.Manager() as manager,
        ProcessPoolExecutor(3, mp_context=context) as pool,
    ):
        stop = manager.Event()
        url = edge.environ["NATS_URL"]
        working = pool.submit(pretend, url, rate, events, is_in_steps, stop)
        try:
            wait_for_worker(edge.port)
            yield edge, pool
        finally:
            stop.set()
        working.result()


@contextmanager
def edge_in(folder: Path) -> Iterator[Server]:
    with running(nats_server(folder)) as nats:
        environ = plain_environment() | {
            "NATS_URL": f"nats://127.0.0.1:{nats.port}",
            "EDGE_PORT": str(port := free_port()),
        }
        with running(Process("services.edge", port, environ, folder)) as edge:
            yield edge


def wait_for_worker(port: int) -> None:
    """Wait until the edge on `port` knows the worker."""
    url = f"http://127.0.0.1:{port}/readyz"
    wait_for(lambda: httpx.get(url).status_code == 200, "the worker's report")


# --- the worker ---


def pretend(url: str, rate: float, events: int, is_in_steps: bool, stop: Event) -> None:
    """Serve as a worker until `stop` is set: `events` for each request, `rate` a second."""
    uvloop.run(_pretend(url, rate, events, is_in_steps, stop))


async def _pretend(url: str, rate: float, events: int, is_in_steps: bool, stop: Event) -> None:
    async with Bus.connect(url, "pretending worker") as bus:
        worker = PretendingWorker(bus, rate, events, is_in_steps)
        await bus.subscribe(
            subjects.worker_request("w", subjects.ANY),
            lambda delivery: bus.respond(delivery, worker.admit),
        )
        await bus.subscribe(subjects.cancel(subjects.ANY, subjects.ANY), worker.cancel)
        while not stop.is_set():
            report = WorkerReport("w", "ready", 9999, 0, 0, queue=9999, model=MODEL, name="demo")
            await bus.publish(subjects.report("w"), report)
            await asyncio.sleep(0.5)
        for task in worker.tasks.values():
            task.cancel()


class PretendingWorker:
    """
    Sends `rate` events a second to each stream, with the time of sending as their text; to all
    streams at the same time if it `is_in_steps`.
    """

    def __init__(self, bus: Bus, rate: float, events: int, is_in_steps: bool) -> None:
        self._bus = bus
        self._is_in_steps = is_in_steps
        self._pause = 1 / rate
        self._events = events
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def admit(self, delivery: Delivery) -> RequestAdmitted:
        request_id = str(decode(delivery.data, ChatRequest).request_id)
        answer = self._answer(request_id, delivery.headers[subjects.REPLY_HEADER])
        self.tasks[request_id] = self._bus.spawn(answer)
        return RequestAdmitted(len(self.tasks), 0)

    def cancel(self, delivery: Delivery) -> None:
        if task := self.tasks.pop(subjects.target_of(delivery.subject)[1], None):
            task.cancel()

    async def _answer(self, request_id: str, reply: str) -> None:
        await self._bus.publish(reply, Accepted(request_id, "w"))
        await self._bus.publish(reply, Started(10, 0, 0, 0))
        offset = number = 0
        begin = time.monotonic()
        if self._is_in_steps:
            begin = (begin // self._pause + 1) * self._pause
            await asyncio.sleep(begin - time.monotonic())
        while number < self._events:
            text = str(time.monotonic_ns())
            await self._bus.send(reply, encode(Token(offset, text, (number,))))
            offset, number = offset + len(text), number + 1
            await asyncio.sleep(max(0, begin + number * self._pause - time.monotonic()))
        await self._bus.publish(reply, DONE)


# --- the clients ---


def read_streams(port: int, streams: int, begin: float, seconds: float) -> Latencies:
    """Open streams; return the latencies of the events that arrive from `begin` for `seconds`."""
    raise_file_limit()
    return uvloop.run(_read_streams(port, streams, begin, seconds))


def raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _read_streams(port: int, streams: int, begin: float, seconds: float) -> Latencies:
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    transports = []
    for number in range(streams):
        reader = partial(StreamReader, number, begin, latencies)
        transport, _ = await loop.create_connection(reader, "127.0.0.1", port)
        transports.append(transport)
        await asyncio.sleep(1 / RAMP)
    await asyncio.sleep(max(0, begin + seconds - time.monotonic()))
    for transport in transports:
        transport.close()
    if len(latencies) < streams * seconds:
        raise RuntimeError(f"{streams} streams: only {len(latencies)} events arrived in time")
    quantiles = statistics.quantiles(latencies, n=100)
    return Latencies(quantiles[49], quantiles[98], len(latencies))


class StreamReader(asyncio.Protocol):
    """Asks once, and notes how old each event is when it arrives, in milliseconds."""

    def __init__(self, number: int, begin: float, latencies: list[float]) -> None:
        self._number = number
        self._begin = begin
        self._latencies = latencies

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = b'{"prompt": "hi", "session_id": "s%d"}' % self._number
        head = b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        cast(asyncio.Transport, transport).write(head + body)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if now >= self._begin:
            stamps = map(int, _STAMP.findall(data))
            self._latencies.extend((now - stamp / 1e9) * 1000 for stamp in stamps)


if __name__ == "__main__":
    for count in map(int, sys.argv[1:]):
        print(count, measure(count, seconds=10.0), flush=True)
        print(count, "bare relay", relay_cost(count, seconds=10.0), flush=True)

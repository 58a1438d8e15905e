"""
What large fleets cost nats-server, and how requests spread over them: workers that only pretend,
with a connection each, and edges that only route.
"""

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple
from uuid import uuid4

import uvloop

from bench.edge import DONE, MODEL, raise_file_limit
from bench.pairs import Plan, show
from bench.processes import cpu_seconds
from bench.report import Goal, Row, Section, Spread
from services.client.chat_client import ChatClient
from services.client.fleet import ReportReader
from services.client.routing import WorkerDirectory, offer, offer_in_turn
from services.contract import prompts, subjects
from services.contract.codec import decode, encode
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Failed,
    RequestAdmitted,
    Token,
    WorkerReport,
)
from services.inference.report_hub import ReportHub
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.supervised import SupervisedLoop
from tests.servers import Server, nats_cluster, nats_server, running

PROCESSES = 4  # that host the workers and edges
SLOTS = 8
QUEUE = 64
SIZES = (50, 200)  # workers
EDGES = 20
MAX_SHARE = 5.0  # % of a core
SETTLE_SECONDS = 14.0  # until hubs are elected, and edges ask them
MEASURE_SECONDS = 10.0

SERVERS = 3
CLUSTER_WORKERS, CLUSTER_EDGES = 1_000, 50
CLUSTER_SETTLE_SECONDS = 50.0
HELD_PER_EDGE, HOLD_SECONDS = 60, 40.0  # requests that run at the same time, and their arrival
CHURN_SECONDS = 20.0
CHURN_PAUSE_SECONDS = 4.0  # in each process
WORKERS_A_CONNECTION = 5  # in the cluster: each connection costs this machine a ms a second
ASK_SECONDS = 2.5  # between two requests of an edge
ANSWER_SECONDS = 0.3

NOTE = f"""One nats-server, {EDGES} edges and workers that pretend, each with a connection of its
own as in the product, idle but for their reports, hubs and pings. CPU of nats-server over
{MEASURE_SECONDS:g} s, in percent of a core. Before: every worker and edge hears all reports."""
CLUSTER_NOTE = f"""{CLUSTER_WORKERS:,} workers that pretend and {CLUSTER_EDGES} edges on {SERVERS}
nats-servers, all on the same two cores. Spread: {CLUSTER_EDGES * HELD_PER_EDGE:,} requests of as
many sessions, that run at the same time. Churn: every {CHURN_PAUSE_SECONDS / PROCESSES:g} s
{WORKERS_A_CONNECTION} workers, which share a connection here, go, one half by a drain, the other in
mid-answer, and as many come, while
{CLUSTER_EDGES / ASK_SECONDS:.0f} requests a second are answered in {ANSWER_SECONDS:g} s each."""


class Share(NamedTuple):
    """What one process hosts."""

    urls: tuple[str, ...]
    workers: int
    edges: int
    is_before: bool = False
    begin: float = 0.0  # of the requests; 0: there are none
    workers_a_connection: int = 1


class Outcome(NamedTuple):
    """What happened in one process."""

    hearing: int  # workers and edges that hear all reports, at the end
    known: tuple[int, ...]  # workers that each edge knows, at the end
    held: tuple[int, ...] = ()  # requests that run at the same time, by worker
    seconds: tuple[float, ...] = ()  # of the answers while workers come and go
    failures: tuple[str, ...] = ()


def run(plan: Plan) -> Section:
    """Measure what reports cost nats-server."""
    rows = []
    for workers in SIZES:
        for is_before in (True, False):
            share = measure(workers, is_before)
            show(f"{workers} workers, {'before' if is_before else 'now'}: {share:.1f} %")
            what = f"{workers} workers: CPU{' before' if is_before else ''}, % of a core"
            goal = None if is_before else Goal("<", MAX_SHARE)
            rows.append(Row(what, (), Spread.of([share]), goal))
    return Section("fleet", "fleet", NOTE, (), rows)


def measure(workers: int, is_before: bool) -> float:
    """Return the CPU of a nats-server with idle workers and edges, in percent of a core."""
    with tempfile.TemporaryDirectory() as folder, running(nats_server(Path(folder))) as nats:
        share = Share(_urls([nats]), workers, EDGES, is_before)
        with hosting(share) as futures:
            time.sleep(SETTLE_SECONDS)
            (used,) = _cpu([nats])
        _check(futures, workers, is_before)
        return used


def run_cluster(plan: Plan) -> Section:
    """Send requests to a thousand workers, also while some come and go."""
    with tempfile.TemporaryDirectory() as folder, running_cluster(Path(folder)) as servers:
        begin = time.monotonic() + CLUSTER_SETTLE_SECONDS
        share = Share(
            _urls(servers),
            CLUSTER_WORKERS,
            CLUSTER_EDGES,
            begin=begin,
            workers_a_connection=WORKERS_A_CONNECTION,
        )
        with hosting(share) as futures:
            time.sleep(max(0.0, begin - MEASURE_SECONDS - 1 - time.monotonic()))
            used = _cpu(servers)
            time.sleep(max(0.0, begin + HOLD_SECONDS + CHURN_SECONDS + 10 - time.monotonic()))
        outcomes = [future.result() for future in futures]
    return Section("cluster", "fleet", CLUSTER_NOTE, (), list(cluster_rows(used, outcomes)))


def cluster_rows(used: Sequence[float], outcomes: Sequence[Outcome]) -> Iterator[Row]:
    held = [count for outcome in outcomes for count in outcome.held]
    seconds = [1000 * each for outcome in outcomes for each in outcome.seconds]
    failures = [each for outcome in outcomes for each in outcome.failures]
    for failure, count in Counter(failures).items():
        show(f"{count} answers failed: {failure}")
    p50, p99 = (statistics.quantiles(seconds, n=100)[p - 1] for p in (50, 99))
    values: list[tuple[str, float, Goal | None]] = [
        ("CPU of a nats-server, idle: % of a core", statistics.mean(used), None),
        ("CPU of all nats-servers, idle: % of a core", sum(used), None),
        ("requests a worker: mean", statistics.mean(held), None),
        ("requests a worker: standard deviation", statistics.pstdev(held), None),
        ("requests a worker: most", max(held), Goal("≤", SLOTS)),
        ("churn: answers", len(seconds), None),
        ("churn: answers that failed", len(failures), Goal("≤", 0)),
        ("churn: p50, ms", p50, None),
        ("churn: p99, ms", p99, None),
        ("churn: longest, ms", max(seconds), None),
    ]
    return (Row(what, (), Spread.of([value]), goal) for what, value, goal in values)


@contextmanager
def hosting(share: Share) -> Iterator[list[Future[Outcome]]]:
    """Run the workers and edges, spread over processes, during the body."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(PROCESSES, mp_context=context) as pool,
    ):
        stop = manager.Event()
        futures = [pool.submit(host, each, stop) for each in split(share, PROCESSES)]
        try:
            yield futures
        finally:
            stop.set()


def split(share: Share, processes: int) -> list[Share]:
    """Return a part for each process: as many workers and edges as all together have."""
    return [
        share._replace(
            urls=share.urls[number % len(share.urls) :] + share.urls[: number % len(share.urls)],
            workers=len(range(number, share.workers, processes)),
            edges=len(range(number, share.edges, processes)),
        )
        for number in range(processes)
    ]


def host(share: Share, stop: Event) -> Outcome:
    raise_file_limit()
    return uvloop.run(Host(share, stop).run())


class Host:
    """The workers and edges of one process."""

    def __init__(self, share: Share, stop: Event) -> None:
        self._share = share
        self._stop = stop
        self._nodes: list[Node] = []
        self._edges: list[PretendedEdge] = []
        self._seconds: list[float] = []
        self._failures: list[str] = []

    async def run(self) -> Outcome:
        share = self._share
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            for number in range(share.workers // share.workers_a_connection):
                await self._add_node(number)
            for number in range(share.edges):
                edge = PretendedEdge(self._url(number), share.is_before)
                await stack.enter_async_context(edge.running())
                self._edges.append(edge)
            held = await self._measure() if share.begin else ()
            while not self._stop.is_set():
                await asyncio.sleep(0.2)
            members: list[PretendedWorker | PretendedEdge] = [*self._workers, *self._edges]
            hearing = sum(share.is_before or member.is_hearing for member in members)
            known = tuple(len(edge.workers.reports()) for edge in self._edges)
        return Outcome(hearing, known, held, tuple(self._seconds), tuple(self._failures))

    def _url(self, number: int) -> str:
        return self._share.urls[number % len(self._share.urls)]

    @property
    def _workers(self) -> list["PretendedWorker"]:
        return [worker for node in self._nodes for worker in node.workers]

    async def _add_node(self, number: int) -> None:
        node = Node(self._url(number), self._share)
        await node.start()
        self._nodes.append(node)

    async def _close(self) -> None:
        for node in self._nodes:
            await node.close()

    async def _measure(self) -> tuple[int, ...]:
        """Return how many requests ran at the same time, by worker; then begin the churn."""
        begin = self._share.begin
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        await asyncio.gather(*(edge.hold() for edge in self._edges))
        await asyncio.sleep(max(0.0, begin + HOLD_SECONDS + 1 - time.monotonic()))
        held = tuple(worker.load for worker in self._workers)
        for worker in self._workers:
            worker.release()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._churn())
            for number, edge in enumerate(self._edges):
                group.create_task(self._ask(edge, number / len(self._edges)))
        return held

    async def _churn(self) -> None:
        """Replace workers, the oldest first: by a drain and by a loss in turns."""
        for number in range(round(CHURN_SECONDS / CHURN_PAUSE_SECONDS)):
            node = self._nodes.pop(0)
            if number % 2:
                await asyncio.gather(*(worker.drain() for worker in node.workers))
            await node.close()
            await self._add_node(number)
            await asyncio.sleep(CHURN_PAUSE_SECONDS)

    async def _ask(self, edge: "PretendedEdge", phase: float) -> None:
        await asyncio.sleep(phase * ASK_SECONDS)
        for _ in range(round(CHURN_SECONDS / ASK_SECONDS)):
            began = time.monotonic()
            if failure := await edge.ask():
                self._failures.append(failure)
            took = time.monotonic() - began
            self._seconds.append(took)
            await asyncio.sleep(max(0.0, ASK_SECONDS - took))


class Node:
    """Workers that share a connection, and go together."""

    def __init__(self, url: str, share: Share) -> None:
        self._url = url
        self._share = share
        self._stack = AsyncExitStack()
        self.workers: list[PretendedWorker] = []

    async def start(self) -> None:
        bus = await self._stack.enter_async_context(Bus.connect(self._url, "workers"))
        for _ in range(self._share.workers_a_connection):
            worker = PretendedWorker(bus, self._share.is_before)
            await self._stack.enter_async_context(worker.running())
            self.workers.append(worker)

    async def close(self) -> None:
        """Go in mid-answer."""
        await self._stack.aclose()


class PretendedWorker:
    """Reports, takes part in the election of hubs, and answers without a model."""

    def __init__(self, bus: Bus, is_before: bool) -> None:
        self._bus = bus
        self._is_before = is_before
        self._id = uuid4().hex
        self._directory = WorkerDirectory()
        self._is_draining = False
        self._answers: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()
        self._hub = ReportHub(bus, self._id, self._directory)

    @property
    def load(self) -> int:
        return len(self._answers)

    @property
    def is_hearing(self) -> bool:
        return self._hub.is_hearing

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve during the body; its end cuts the answers."""
        reports = hearing(self._bus) if self._is_before else self._hub.running(_fail)
        loop = SupervisedLoop("report", self._report, _fail)
        async with reports, loop.running(is_cancelled=True):
            await self._bus.subscribe(
                subjects.worker_request(self._id, subjects.ANY),
                lambda delivery: self._bus.respond(delivery, self._admit),
            )
            yield
        for answer in self._answers:
            answer.cancel()

    async def drain(self) -> None:
        self._is_draining = True
        await self._report()
        while self._answers:
            await asyncio.sleep(0.02)

    def release(self) -> None:
        """End the answers that are held."""
        self._released.set()

    async def _report(self) -> float:
        running = min(self.load, SLOTS)
        interval = 1.0 if self._is_before else self._hub.report_interval
        report = WorkerReport(
            self._id,
            "draining" if self._is_draining else "ready",
            SLOTS,
            running,
            self.load - running,
            QUEUE,
            model=MODEL,
            name="demo",
            interval=interval,
        )
        if self._is_before:
            await self._bus.publish(subjects.report(self._id), report)
        else:
            await self._hub.report(report)
        return interval

    async def _admit(self, delivery: Delivery) -> RequestAdmitted:
        request = decode(delivery.data, ChatRequest)
        reply = delivery.headers[subjects.REPLY_HEADER]
        task = asyncio.create_task(self._answer(request, reply))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        return RequestAdmitted(min(self.load, SLOTS), max(0, self.load - SLOTS))

    async def _answer(self, request: ChatRequest, reply: str) -> None:
        await self._bus.publish(reply, Accepted(str(request.request_id), self._id))
        if request.prompt == "hold":
            await self._released.wait()
            return
        await asyncio.sleep(ANSWER_SECONDS)
        await self._bus.send(reply, encode(Token(0, "hello", (1,))))
        await self._bus.publish(reply, DONE)


class PretendedEdge:
    """Routes requests as an edge does, without HTTP."""

    def __init__(self, url: str, is_before: bool) -> None:
        self._url = url
        self._is_before = is_before
        self.workers = WorkerDirectory()

    @property
    def is_hearing(self) -> bool:
        return self._reader.is_hearing

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with Bus.connect(self._url, "edge") as bus, AsyncExitStack() as stack:
            self._bus = bus
            self._reader = ReportReader(bus, self.workers)
            if self._is_before:
                await stack.enter_async_context(hearing(bus))
            else:
                await self._reader.start()
                await stack.enter_async_context(self._reader.reading(_fail))
            yield

    async def hold(self) -> None:
        """Have HELD_PER_EDGE requests running, which arrive in HOLD_SECONDS."""
        for _ in range(HELD_PER_EDGE):
            began = time.monotonic()
            request = _request("hold")
            key = prompts.routing_key(subjects.OPEN_TENANT, request)
            ranked = self.workers.rank(key, None)
            if await offer_in_turn(ranked, partial(self._offer, request)) is None:
                raise RuntimeError("no worker admits the request")
            took = time.monotonic() - began
            await asyncio.sleep(max(0.0, HOLD_SECONDS / HELD_PER_EDGE - took))

    async def _offer(self, request: ChatRequest, worker_id: str) -> None:
        reply, tenant = self._bus.new_inbox(), subjects.OPEN_TENANT
        await offer(self._bus, self.workers, worker_id, tenant, request, reply, timeout=1.0)

    async def ask(self) -> str:
        """Return why the answer failed, or nothing."""
        async with aclosing(ChatClient(self._bus, workers=self.workers).stream(_request())) as all:
            async for event in all:
                if isinstance(event, Failed):
                    return f"{event.code}: {event.message}"
                if isinstance(event, Done):
                    return ""
        return "no end"


def _request(prompt: str = "answer") -> ChatRequest:
    return ChatRequest(prompt=prompt, session_id=uuid4().hex, request_id=uuid4().hex)


@asynccontextmanager
async def hearing(bus: Bus) -> AsyncIterator[None]:
    """Receive all reports, without work for them: it is nats-server's that is measured."""
    async with bus.inbox(subjects.report(subjects.ANY)):
        yield


@contextmanager
def running_cluster(folder: Path) -> Iterator[list[Server]]:
    servers = nats_cluster(folder, SERVERS)
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(running(server))
        yield servers


def _cpu(servers: Sequence[Server]) -> list[float]:
    """Return what each server uses now, in percent of a core."""
    before = [cpu_seconds(server.pid) for server in servers]
    began = time.monotonic()
    time.sleep(MEASURE_SECONDS)
    seconds = time.monotonic() - began
    used = (cpu_seconds(server.pid) - b for server, b in zip(servers, before, strict=True))
    return [100 * each / seconds for each in used]


def _check(futures: Sequence[Future[Outcome]], workers: int, is_before: bool) -> None:
    """Raise RuntimeError if an edge does not know every worker."""
    known = [count for future in futures for count in future.result().known]
    show(f"{sum(future.result().hearing for future in futures)} hear all reports")
    if not is_before and any(count != workers for count in known):
        raise RuntimeError(f"edges know {min(known)} to {max(known)} of {workers} workers")


def _urls(servers: Iterable[Server]) -> tuple[str, ...]:
    return tuple(f"nats://127.0.0.1:{server.port}" for server in servers)


def _fail(reason: str) -> None:
    raise RuntimeError(reason)

"""Turns per second that log and history bear, with one server of NATS and with three."""

import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench.history import ASKING, Turns, make_turn, new_exchange
from bench.pairs import Plan, interleave, show
from bench.processes import resident_bytes
from bench.report import Goal, Row, Section, Spread
from services.contract import subjects
from services.contract.history import HistoryStatus
from services.contract.messages import Empty
from services.inference.history_client import HistoryClient
from services.inference.limits import DEFAULT_LIMITS
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from tests.e2e.stack import Process, plain_environment
from tests.servers import Server, mongod, nats_cluster, nats_server, running

SERVERS = (1, 3)
SESSIONS = 1_000
CONCURRENCY = 64
WARM_UP_SECONDS, SECONDS = 3.0, 8.0
MIN_TURNS = 1_000  # per second
MANY_SESSIONS, BUSY_SESSIONS = 100_000, 200
NOTE = f"""NATS servers that each have a copy of everything, a history process, mongod and the
client, which is the worker's, on the same machine. A turn reads the context of one of {SESSIONS:,}
sessions and appends an exchange to it; {CONCURRENCY} turns at a time for {SECONDS:.0f} s. Asking:
the worker requests each context from history. Snapshots, index and archive follow in the
background."""

MANY_NOTE = f"""The same with {SERVERS[-1]} NATS servers and {MANY_SESSIONS:,} sessions,
{CONCURRENCY} turns at a time: first the first turn of each, then turns of all in random order, most
of which the worker has forgotten, then of {BUSY_SESSIONS} alone. Memory at the end, of one NATS
server and of history."""


def run(plan: Plan) -> Section:
    rows: list[Row] = []
    for servers in SERVERS:
        with tempfile.TemporaryDirectory() as folder, running_history(Path(folder), servers) as up:
            kept, asking = zip(*uvloop.run(_measure(up.url, servers, plan.pairs)), strict=True)
        name = f"turns/s, {servers} NATS server{'s' * (servers > 1)}"
        rows.append(Row(name, (), Spread.of(kept), Goal("≥", MIN_TURNS)))
        rows.append(Row(f"{name}, asking", (), Spread.of(asking)))
    return Section("history-turns", "history", NOTE, (), rows)


def run_sessions(plan: Plan) -> Section:
    """Measure the same with as many sessions as a large service has in a day."""
    with tempfile.TemporaryDirectory() as folder, running_history(Path(folder), SERVERS[-1]) as up:
        values = uvloop.run(_measure_sessions(up.url))
        nats, history = (resident_bytes(each.pid) / 1e6 for each in (up.nats, up.history))
    found = {**values, "nats-server: MB of memory": nats, "history: MB of memory": history}
    rows = [Row(what, (), Spread.of([value])) for what, value in found.items()]
    return Section("history-sessions", "history", MANY_NOTE, (), rows)


async def _measure_sessions(url: str) -> dict[str, float]:
    names = [f"many {number}" for number in range(MANY_SESSIONS)]
    async with Bus.connect(url, "bench") as bus:
        await _until_ready(bus)
        client = HistoryClient(bus, DEFAULT_LIMITS)
        began, left, exchange = time.perf_counter(), iter(names), new_exchange()

        async def begin_sessions() -> None:
            for name in left:
                await make_turn(client, name, Turns([], []), exchange)

        await asyncio.gather(*(begin_sessions() for _ in range(CONCURRENCY)))
        first = MANY_SESSIONS / (time.perf_counter() - began)
        show(f"history-sessions: {first:.0f} first turns/s")
        in_random_order = random.sample(names, len(names))
        return {
            "first turns/s": first,
            "turns/s, of all": await _turns_per_second(client, in_random_order, SECONDS),
            f"turns/s, of {BUSY_SESSIONS}": await _turns_per_second(
                client, names[:BUSY_SESSIONS], SECONDS
            ),
        }


class RunningHistory(NamedTuple):
    url: str  # of the NATS servers
    nats: Server  # one of them
    history: Server


@contextmanager
def running_history(folder: Path, servers: int) -> Iterator[RunningHistory]:
    """Run NATS servers, MongoDB, and a history process."""
    with ExitStack() as stack:
        cluster = nats_cluster(folder, servers) if servers > 1 else [nats_server(folder)]
        for server in (*cluster, mongo := mongod(folder)):
            stack.enter_context(running(server))
        url = ",".join(f"nats://127.0.0.1:{server.port}" for server in cluster)
        environ = plain_environment() | {
            "NATS_URL": url,
            "MONGODB_URI": f"mongodb://127.0.0.1:{mongo.port}/",
            "HISTORY_REPLICAS": str(servers),
        }
        stack.enter_context(running(history := Process("services.history", 0, environ, folder)))
        yield RunningHistory(url, cluster[0], history)


async def _measure(url: str, servers: int, pairs: int) -> list[tuple[float, ...]]:
    """Return the turns per second of workers that keep contexts, and of those that ask."""
    async with Bus.connect(url, "bench") as bus:
        await _until_ready(bus)
        runs = [_timed(HistoryClient(bus, limits)) for limits in (DEFAULT_LIMITS, ASKING)]
        return await interleave(f"history turns, {servers} servers", runs, pairs, float)


def _timed(client: HistoryClient) -> Callable[[], Awaitable[float]]:
    names = [f"{id(client)} {number}" for number in range(SESSIONS)]

    async def time_turns() -> float:
        await _turns_per_second(client, names, WARM_UP_SECONDS)
        return await _turns_per_second(client, names, SECONDS)

    return time_turns


async def _turns_per_second(client: HistoryClient, names: list[str], seconds: float) -> float:
    exchange, turns, next_names = new_exchange(), Turns([], []), itertools.cycle(names)
    began = time.perf_counter()

    async def make_turns() -> None:
        while time.perf_counter() - began < seconds:
            await make_turn(client, next(next_names), turns, exchange)

    await asyncio.gather(*(make_turns() for _ in range(CONCURRENCY)))
    return len(turns.appends) / (time.perf_counter() - began)


async def _until_ready(bus: Bus) -> None:
    while not await _is_ready(bus):
        await asyncio.sleep(0.1)


async def _is_ready(bus: Bus) -> bool:
    try:
        status = await bus.request(subjects.HISTORY_STATUS, Empty(), HistoryStatus)
    except (NoResponders, TimeoutError):
        return False
    return status.database_connected and status.log_records is not None

"""Latency of history per turn with a million exchanges in MongoDB, and archiving throughput."""

import asyncio
import itertools
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import httpx
import uvloop
from msgspec.structs import replace
from pymongo import MongoClient

from bench.load import gather_limited, words
from bench.pairs import Plan, show
from bench.report import Goal, Row, Section, Spread
from services.contract import subjects
from services.contract.history import Exchange
from services.contract.messages import ModelInfo, Sampling, Timings, Usage
from services.history.archive import Archive
from services.history.entry import Entry
from services.inference.history_client import AppendResult, HistoryClient
from services.inference.limits import InferenceLimits
from tests.e2e.stack import Stack, running_stack
from tests.servers import mongod, running

ASKING = InferenceLimits(history_trust_seconds=0)  # a context is a request to history
FOLDER = Path("bench/.mongo")  # kept, because filling it takes a minute
DATABASE = "finetuneLLM"
EXCHANGES = 1_000_000
SESSIONS = (1, 10, 1_000)
WARM_UP = 10  # exchanges of a session before its turns are timed
TURNS = 1_000  # per run
BACKLOG = 30_000  # exchanges that are not archived yet
BATCH = 1_000
CONCURRENCY = 16
PAGES = 200  # requests per run
PROMPT_WORDS, RESPONSE_WORDS = 50, 100
NOTE = f"""The whole stack, with {EXCHANGES:,} exchanges of 1,000 sessions in MongoDB, on the same
machine. A turn is `history.context` and the append of an exchange, both as in the worker, one turn
after another over 1, 10 or 1,000 sessions that have {WARM_UP} exchanges each; {TURNS:,} turns per
run. Archive: {BACKLOG:,} exchanges that were logged while no history process ran. Pages: over HTTP,
of all sessions and of one."""


class Turns(NamedTuple):
    """Latencies in milliseconds."""

    contexts: list[float]
    appends: list[float]


def run(plan: Plan) -> Section:
    FOLDER.mkdir(exist_ok=True)
    with running(mongod(FOLDER)) as mongo, tempfile.TemporaryDirectory() as folder:
        uri = f"mongodb://127.0.0.1:{mongo.port}/"
        uvloop.run(_fill(uri))
        with running_stack(Path(folder), uri) as up:
            rows = uvloop.run(_measure(up, plan.pairs))
        mongo.stop(signal.SIGTERM)  # a clean stop needs no recovery next time
    return Section("history", "history", NOTE, (), rows)


async def _fill(uri: str) -> None:
    """Add the exchanges that the database lacks."""
    with MongoClient[dict[str, object]](uri) as client:
        existing = client[DATABASE]["exchanges"].estimated_document_count()
    async with Archive(uri, DATABASE, sys.exit).running() as archive:
        while not archive.connected:
            await asyncio.sleep(0.1)
        template = new_exchange()
        for first in range(existing, EXCHANGES, BATCH):
            await archive.write([_old_entry(n, template) for n in range(first, first + BATCH)])
            if (first + BATCH) % 100_000 == 0:
                show(f"history: {first + BATCH:,} of {EXCHANGES:,} exchanges in MongoDB")


def _old_entry(n: int, template: Exchange) -> Entry:
    """Return the n-th of a million entries of one month."""
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=2.5 * n)
    key = subjects.session_key(subjects.OPEN_TENANT, f"old {n % 1_000}")
    return Entry(n + 1, key, at, replace(template, request_id=f"old{n}"))


def new_exchange() -> Exchange:
    now = datetime.now(UTC)
    return Exchange(
        previous=0,
        request_id=uuid4().hex,
        epoch=0,
        prompt=words(PROMPT_WORDS),
        response=words(RESPONSE_WORDS),
        asked_at=now,
        answered_at=now,
        finish_reason="stop",
        model=ModelInfo("bench", "digest", 2048, 1),
        sampling=Sampling(temperature=0.5),
        usage=Usage(PROMPT_WORDS, RESPONSE_WORDS, 0),
        timings=Timings(0.0, 0.1, 0.2),
    )


async def _measure(up: Stack, runs: int) -> list[Row]:
    async with up.connect("bench") as bus:
        sessions = HistoryClient(bus, ASKING)
        measured = {count: await _time_turns(sessions, count, runs) for count in SESSIONS}
        rows = turn_rows(measured)
        await _until_archived(up)
        rates = [await _archive(up, sessions) for _ in range(runs)]
        rows.append(Row("archived, exchanges/s", (), Spread.of(rates), Goal("≥", 5_000)))
    for what, query in (("of all sessions", {}), ("of one session", {"session_id": "old 7"})):
        pages = [_time_pages(up.http, query) for _ in range(runs)]
        rows += latency_rows(f"GET /messages?limit=20 {what}", pages, Goal("<", 10))
    return rows


async def _time_turns(sessions: HistoryClient, count: int, runs: int) -> list[Turns]:
    names = [uuid4().hex for _ in range(count)]
    for _ in range(WARM_UP):
        await gather_limited(
            CONCURRENCY, [make_turn(sessions, name, Turns([], [])) for name in names]
        )
    done: list[Turns] = []
    for _ in range(runs):
        done.append(Turns([], []))
        for name in itertools.islice(itertools.cycle(names), TURNS):
            await make_turn(sessions, name, done[-1])
        median = statistics.median(done[-1].contexts)
        show(f"history, {count} sessions: a context takes {median:.2f} ms")
    return done


async def make_turn(
    sessions: HistoryClient, name: str, turns: Turns, exchange: Exchange | None = None
) -> None:
    """Read the context and append a new exchange, as a worker does. Both times are added."""
    exchange = replace(exchange, request_id=uuid4().hex) if exchange else new_exchange()
    key = subjects.session_key(subjects.OPEN_TENANT, name)
    began = time.perf_counter()
    context = await sessions.context(subjects.OPEN_TENANT, name)
    turns.contexts.append(1000 * (time.perf_counter() - began))
    exchange = replace(exchange, previous=context.applied_seq, epoch=context.epoch)
    began = time.perf_counter()
    assert await sessions.append(key, exchange, _always) == AppendResult("log")
    turns.appends.append(1000 * (time.perf_counter() - began))


def turn_rows(measured: dict[int, list[Turns]]) -> list[Row]:
    """Return rows for both halves of a turn by number of sessions, and for their growth."""
    rows: list[Row] = []
    for what in Turns._fields:
        runs = {count: [getattr(t, what) for t in turns] for count, turns in measured.items()}
        for count, values in runs.items():
            rows += latency_rows(f"{what[:-1]}, {count:,} sessions", values, Goal("<", 1))
        least, most = (
            statistics.median(map(statistics.median, runs[n])) for n in (min(runs), max(runs))
        )
        rows.append(Row(f"{what[:-1]}: growth", (), Spread.of([most / least]), Goal("≤", 1.2)))
    return rows


def latency_rows(what: str, runs: Sequence[Sequence[float]], goal: Goal) -> list[Row]:
    """Return the medians over the runs of the 50th percentile, which has a goal, and the 99th."""
    p50, p99 = (
        Spread.of(statistics.quantiles(run, n=100)[p - 1] for run in runs) for p in (50, 99)
    )
    return [Row(f"{what}: p50, ms", (), p50, goal), Row(f"{what}: p99, ms", (), p99)]


async def _archive(up: Stack, sessions: HistoryClient) -> float:
    """Return the exchanges archived per second, from when the archiver begins with the backlog."""
    up.history.stop()
    names = [uuid4().hex for _ in range(BACKLOG)]
    await gather_limited(
        CONCURRENCY,
        (
            sessions.append(
                subjects.session_key(subjects.OPEN_TENANT, name), new_exchange(), _always
            )
            for name in names
        ),
    )
    up.history.start()
    began = time.perf_counter()
    while (left := await _unarchived(up)) != 0:
        if left is None or left >= BACKLOG:
            began = time.perf_counter()
        await asyncio.sleep(0.02)
    rate = BACKLOG / (time.perf_counter() - began)
    show(f"history: {rate:,.0f} exchanges archived per second")
    return rate


def _always() -> bool:
    return True


async def _until_archived(up: Stack) -> None:
    while await _unarchived(up) != 0:
        await asyncio.sleep(0.1)


async def _unarchived(up: Stack) -> int | None:
    """Return the number of unarchived exchanges, None while no history process responds."""
    history = (await asyncio.to_thread(up.status))["history"]
    left: int | None = history and history["unarchived"]
    return left


def _time_pages(http: httpx.Client, query: dict[str, str]) -> list[float]:
    """Return the milliseconds of each request."""
    times: list[float] = []
    for _ in range(PAGES):
        began = time.perf_counter()
        assert len(http.get("/messages", params={"limit": "20"} | query).json()) == 20
        times.append(1000 * (time.perf_counter() - began))
    return times

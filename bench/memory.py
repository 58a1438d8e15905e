"""The whole stack over 10,000 requests on the demo model: whether its processes grow."""

import os
import random
from pathlib import Path
from uuid import uuid4

import uvloop

from bench import servers
from bench.bars import Bar, Spread
from bench.load import Target, at_most
from bench.pairs import Plan, tell
from bench.report import Row, Section
from bench.words import words
from tests.e2e.stack import Stack

MODEL = Path("model/demo.gguf")
SESSIONS = 50  # so that after 1,000 requests each has more exchanges than its window holds
EARLY, LATE = 1_000 // SESSIONS, 10_000 // SESSIONS  # rounds in which each session has a turn
CYCLE = 4  # rounds in which the window grows from 10 exchanges to 13, and is cut
AT_ONCE = 16
WORDS = 5
NEW_TOKENS = 8
MIB = 2**20
BAD = (" ERROR ", " CRITICAL ", "Traceback")
NOTE = f"""10,000 requests on the demo model over {SESSIONS} sessions, {AT_ONCE} at once,
{WORDS}-word prompts, up to {NEW_TOKENS} new tokens: resident memory after 1,000 and after 10,000,
each the median of {CYCLE} rounds in which the conversations' window grows and is cut. The engine
checks its slots whenever it is idle (`check()`), so after each of the {LATE + CYCLE} rounds, and
says so in its log if something is wrong."""

Sizes = dict[str, float]
"""MiB, by the service."""


def run(plan: Plan) -> Section:
    with servers.whole_stack(MODEL) as up:
        early, late = uvloop.run(_use(up, servers.client(up)))
        problems = errors([up.inference.log, up.edge.log, up.history.log])
    rows = [_row(service, early, late) for service in early[0]]
    found = Spread.of([len(problems)])
    rows.append(Row("errors in the logs", (0, len(problems)), found, Bar("≤", 0)))
    for problem in problems:
        tell(problem)
    return Section("memory", MODEL.stem, NOTE, ("after 1,000, MiB", "after 10,000, MiB"), rows)


async def _use(up: Stack, target: Target) -> tuple[list[Sizes], list[Sizes]]:
    run, sizes = uuid4().hex, []
    for round in range(LATE + CYCLE):
        order = random.sample(range(SESSIONS), SESSIONS)
        asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in order)
        await at_most(AT_ONCE, asks)
        sizes.append(_resident(up))
        if round % 10 == 9:
            told = ", ".join(f"{service} {size:.0f} MiB" for service, size in sizes[-1].items())
            tell(f"memory, {(round + 1) * SESSIONS} requests: {told}")
    return sizes[EARLY - 1 :][:CYCLE], sizes[LATE - 1 :][:CYCLE]


def _resident(up: Stack) -> Sizes:
    pids = {"inference": up.inference.pid, "edge": up.edge.pid, "history": up.history.pid}
    return {
        service: _pages(pid) * os.sysconf("SC_PAGE_SIZE") / MIB for service, pid in pids.items()
    }


def _pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def _row(service: str, early: list[Sizes], late: list[Sizes]) -> Row:
    before = Spread.of(sizes[service] for sizes in early).median
    after = Spread.of(sizes[service] for sizes in late)
    growth = Spread(*(value / before for value in after))
    return Row(f"{service}: growth", (before, after.median), growth, Bar("≤", 1.02))


def errors(logs: list[Path]) -> list[str]:
    return [
        f"{log.name}: {line}"
        for log in logs
        for line in log.read_text().splitlines()
        if any(word in line for word in BAD)
    ]

"""Memory growth of the stack's processes over 10,000 requests on the demo model."""

import random
from pathlib import Path
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import Target, gather_limited, words
from bench.pairs import Plan, show
from bench.processes import resident_bytes
from bench.report import Goal, Row, Section, Spread
from tests.e2e.stack import Stack

MODEL = Path("model/demo.gguf")
SESSIONS = 50  # after 1,000 requests, each has more exchanges than a prompt keeps
EARLY, LATE = 1_000 // SESSIONS, 10_000 // SESSIONS  # rounds; each session has a turn in each
CYCLE = 4  # rounds in which a prompt grows from 10 to 13 exchanges and is truncated
CONCURRENCY = 16
WORDS = 5
NEW_TOKENS = 8
MIB = 2**20
PROBLEMS = (" ERROR ", " CRITICAL ", "Traceback")
NOTE = f"""10,000 requests on the demo model over {SESSIONS} sessions, {CONCURRENCY} concurrently,
{WORDS}-word prompts, up to {NEW_TOKENS} new tokens: resident memory after 1,000 and after 10,000,
each the median of {CYCLE} rounds in which the prompts grow and are truncated. The engine checks
its slots whenever it is idle (`check()`), so after each of the {LATE + CYCLE} rounds, and logs
errors."""

Sizes = dict[str, float]
"""Resident memory in MiB, by service."""


def run(plan: Plan) -> Section:
    with servers.whole_stack(MODEL) as up:
        early, late = uvloop.run(_measure(up, servers.stack_target(up)))
        problems = find_problems([up.inference.log, up.edge.log, up.history.log])
    rows = [_row(service, early, late) for service in early[0]]
    found = Spread.of([len(problems)])
    rows.append(Row("problems in the logs", (0, len(problems)), found, Goal("≤", 0)))
    for problem in problems:
        show(problem)
    return Section("memory", MODEL.stem, NOTE, ("after 1,000, MiB", "after 10,000, MiB"), rows)


async def _measure(up: Stack, target: Target) -> tuple[list[Sizes], list[Sizes]]:
    run, sizes = uuid4().hex, []
    for round in range(LATE + CYCLE):
        order = random.sample(range(SESSIONS), SESSIONS)
        asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in order)
        await gather_limited(CONCURRENCY, asks)
        sizes.append(_resident(up))
        if round % 10 == 9:
            text = ", ".join(f"{service} {size:.0f} MiB" for service, size in sizes[-1].items())
            show(f"memory, {(round + 1) * SESSIONS} requests: {text}")
    return sizes[EARLY - 1 :][:CYCLE], sizes[LATE - 1 :][:CYCLE]


def _resident(up: Stack) -> Sizes:
    pids = {"inference": up.inference.pid, "edge": up.edge.pid, "history": up.history.pid}
    return {service: resident_bytes(pid) / MIB for service, pid in pids.items()}


def _row(service: str, early: list[Sizes], late: list[Sizes]) -> Row:
    before = Spread.of(sizes[service] for sizes in early).median
    after = Spread.of(sizes[service] for sizes in late)
    growth = Spread(*(value / before for value in after))
    return Row(f"{service}: growth", (before, after.median), growth, Goal("≤", 1.02))


def find_problems(logs: list[Path]) -> list[str]:
    return [
        f"{log.name}: {line}"
        for log in logs
        for line in log.read_text().splitlines()
        if any(word in line for word in PROBLEMS)
    ]

"""The second turn of a long conversation, with models whose state can't be cut."""

import statistics
from pathlib import Path
from uuid import uuid4

import uvloop

from bench import servers
from bench.hybrid_models import ARCHITECTURES, make
from bench.load import Sample, Target, words
from bench.pairs import Plan
from bench.report import Goal, Row, Section, own_row, ratio_row

WORDS = 1850
NEXT_WORDS = 20
NEW_TOKENS = 64
GOAL = Goal("≤", 0.15)
NOTE = f"""Small models with random weights (`bench/hybrid_models.py`). A conversation begins with a
{WORDS}-word question and an answer of {NEW_TOKENS} tokens; a question of {NEXT_WORDS} words follows
at once, and another one. TTFT of these two (mean) and of the first turn. Where an answer of random
weights is cut within a character, its tokens are prefilled again."""


def run(plan: Plan) -> Section:
    rows = [row for name in ARCHITECTURES for row in measure(make(name), plan.pairs)]
    return Section("hybrid", "hybrid", NOTE, ("next turns", "first turn"), rows)


def measure(model: Path, pairs: int) -> list[Row]:
    with servers.whole_stack(model, MODEL_CONTEXT="4096", MODEL_PARALLEL="4") as up:
        conversations = uvloop.run(_converse(servers.stack_target(up), pairs))
    times = [_ttfts(*turns) for turns in conversations]
    prefilled = [_prefilled(*turns) for turns in conversations]
    return [
        ratio_row(f"{model.stem}: TTFT, ms", times, GOAL),
        own_row(f"{model.stem}: prefilled tokens", prefilled),
    ]


async def _converse(target: Target, conversations: int) -> list[list[Sample]]:
    await _turns(target)  # the first one warms up
    return [await _turns(target) for _ in range(conversations)]


async def _turns(target: Target) -> list[Sample]:
    session, lengths = uuid4().hex, (WORDS, NEXT_WORDS, NEXT_WORDS)
    return [await target.ask(session, words(length), NEW_TOKENS) for length in lengths]


def _ttfts(first: Sample, *later: Sample) -> tuple[float, float]:
    return 1000 * statistics.mean(sample.ttft for sample in later), 1000 * first.ttft


def _prefilled(first: Sample, *later: Sample) -> tuple[float, float]:
    counts = [sample.prompt_tokens - sample.cached_tokens for sample in (first, *later)]
    return statistics.mean(counts[1:]), counts[0]

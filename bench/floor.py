"""
Lower bound of burst, prefix and turns: llama.cpp's own time for the tokens that our stack has it
compute. A goal that this load misses can't be met with these kernels on this machine.
"""

import random
import statistics
import time
from functools import partial

import uvloop

from bench import burst, prefix, servers, turns
from bench.load import MAX_EXCHANGES, OpenAITarget
from bench.pairs import Plan, interleave
from bench.report import Row, Section, ratio_row
from services.inference.engine.backend import MAX_BATCH_TOKENS, Chunk, SampledToken
from services.inference.engine.llama import Llama
from services.inference.engine.sampling.candidates import Logits
from services.inference.engine.sampling.sampler import SamplerChain

# in tokens of the synthetic models
PREFIX = 44  # system prompt and template, shared by all prompts
LONG_PREFIX = 508
QUESTION = 44  # 30 words, with the template around them
EXCHANGE = QUESTION + turns.NEW_TOKENS
NOTE = """`llama_decode` alone for the tokens that the whole stack has it compute in `burst`,
`prefix` and `turns`: no sampling, no HTTP, no bus, one prompt after another, shared prefixes
cached. Compared with the complete llama-server: our result if all else took no time."""


class LogitsOnlySampler(SamplerChain):
    """A sampler that has llama.cpp compute the logits, and ignores them."""

    def __init__(self) -> None:
        pass

    def choose(self, logits: Logits) -> SampledToken:
        return SampledToken(0)


class BareBackend:
    """llama.cpp's slots, filled with random tokens."""

    def __init__(self, plan: Plan) -> None:
        self.backend = Llama(
            plan.model,
            context=2048,
            parallel=servers.SLOTS,
            threads=servers.THREADS,
            gpu_layers=0,
            on_progress=lambda share: True,
        )

    def prefill(self, slot: int, at: int, count: int) -> None:
        """Prefill `count` tokens behind the `at` cached tokens of the slot."""
        self.backend.truncate(slot, at)
        for first in range(at, at + count, MAX_BATCH_TOKENS):
            tokens = _tokens(min(MAX_BATCH_TOKENS, at + count - first))
            self.backend.decode([Chunk(slot, first, tokens, LogitsOnlySampler())])

    def generate(self, slots: int, tokens: int) -> None:
        """Decode answers in parallel; the first token of each came from its prefill."""
        for _ in range(tokens - 1):
            lengths = map(self.backend.length, range(slots))
            chunks = [Chunk(s, at, _tokens(1), LogitsOnlySampler()) for s, at in enumerate(lengths)]
            self.backend.decode(chunks)

    async def burst(self, chats: int) -> burst.Burst:
        for slot in range(chats):
            self.prefill(slot, 0, PREFIX)
        began, first = time.perf_counter(), []
        for slot in range(chats):
            self.prefill(slot, PREFIX, burst.WORDS)
            first.append(1000 * (time.perf_counter() - began))
        self.generate(chats, burst.NEW_TOKENS)
        speed = chats * burst.NEW_TOKENS / (time.perf_counter() - began)
        return burst.Burst(speed, statistics.median(first))

    async def prefix(self) -> float:
        for slot in range(prefix.SESSIONS):
            self.prefill(slot, 0, LONG_PREFIX)
        return statistics.median(self._ttfts(prefix.SESSIONS, LONG_PREFIX, QUESTION))

    async def turns(self) -> turns.Times:
        for slot in range(turns.CONVERSATIONS):
            self.prefill(slot, 0, PREFIX)
        times = []
        for turn in range(turns.TURNS):
            is_cut = turn == turns.TURNS - 1  # to MAX_EXCHANGES; a prompt has 13 at most
            cached = PREFIX + (0 if is_cut else EXCHANGE * turn)
            new = QUESTION + (EXCHANGE * MAX_EXCHANGES if is_cut else 0)
            times.append(self._ttfts(turns.CONVERSATIONS, cached, new))
            self.generate(turns.CONVERSATIONS, turns.NEW_TOKENS + 1)
        return times

    def _ttfts(self, slots: int, cached: int, new: int) -> list[float]:
        """Return the milliseconds from the common start to each slot's first token."""
        began, times = time.perf_counter(), []
        for slot in range(slots):
            self.prefill(slot, cached, new)
            times.append(1000 * (time.perf_counter() - began))
        return times


def run(plan: Plan) -> Section:
    bare = BareBackend(plan)
    with servers.llama_server(plan.model) as theirs:
        rows = uvloop.run(_measure(plan, bare, theirs))
    bare.backend.close()
    return Section("floor", plan.model.stem, NOTE, ("llama.cpp alone", theirs.name), rows)


async def _measure(plan: Plan, bare: BareBackend, theirs: OpenAITarget) -> list[Row]:
    rows = []
    for chats in burst.CHATS:
        await bare.burst(chats)  # the backend learns whether to decode small batches one by one
        runs = [partial(bare.burst, chats), partial(burst.burst, theirs, chats)]
        what = f"{chats} concurrent: tokens/s"
        speeds = await interleave(what, runs, plan.pairs, lambda found: found.tokens_per_second)
        values = [tuple(found.tokens_per_second for found in pair) for pair in speeds]
        rows.append(ratio_row(what, values, burst.THROUGHPUT_GOALS[chats]))
    both = [partial(bare.prefix), partial(prefix.with_new_system, theirs)]
    firsts = await interleave("prefix", both, plan.pairs, lambda ttft: ttft)
    rows.append(ratio_row(prefix.ROW_TITLE, firsts, prefix.GOAL))
    talks = [partial(bare.turns), partial(turns.converse, theirs)]
    times = await interleave("turns", talks, plan.pairs, lambda found: turns.median(found, 5, 15))
    return [*rows, *turns.rows(times)]


def _tokens(count: int) -> list[int]:
    return random.choices(range(1000, 30000), k=count)

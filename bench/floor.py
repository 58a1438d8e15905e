"""
The least that burst, prefix and turns can take: llama.cpp's own time for the tokens that we have it
compute, as if everything around it took none. A bar that this does not clear can't be cleared with
these kernels on this machine.
"""

import random
import statistics
import time
from functools import partial

import uvloop

from bench import burst, prefix, servers, turns
from bench.load import KEPT, OpenAI
from bench.pairs import Plan, interleave
from bench.report import Row, Section, compared
from services.inference.engine.backend import MAX_BATCH_TOKENS, Chunk, SampledToken
from services.inference.engine.llama import Llama

# Tokens, as the synthetic models count the loads' words.
BEGINNING = 44  # system prompt and template, that all begin with
LONG_BEGINNING = 508
QUESTION = 44  # 30 words, with the template around them
EXCHANGE = QUESTION + turns.NEW_TOKENS
NOTE = """`llama_decode` for the same tokens as the whole stack has it compute in `burst`, `prefix`
and `turns`, and nothing else: no sampling, no HTTP, no bus, one prompt after another. What all
begin with is not read again. Against llama-server with all that it does: so good would our number
be if everything but llama.cpp took no time."""


class Silent:
    """A sampler that has llama.cpp compute the logits, and does not look at them."""

    def accept(self, token: int) -> SampledToken:
        return SampledToken(token)

    def close(self) -> None:
        pass


class Bare:
    """Slots that know how many tokens they hold."""

    def __init__(self, plan: Plan) -> None:
        self.backend = Llama(
            plan.model,
            context=2048,
            parallel=servers.SLOTS,
            threads=servers.THREADS,
            gpu_layers=0,
            on_progress=lambda share: True,
        )

    def read(self, slot: int, at: int, count: int) -> None:
        """A prompt of which `at` tokens are there."""
        self.backend.truncate(slot, at)
        for first in range(at, at + count, MAX_BATCH_TOKENS):
            tokens = _tokens(min(MAX_BATCH_TOKENS, at + count - first))
            self.backend.decode([Chunk(slot, first, tokens, Silent())])

    def answer(self, slots: int, tokens: int) -> None:
        """The first token of each came with its prompt."""
        for _ in range(tokens - 1):
            lengths = map(self.backend.length, range(slots))
            chunks = [Chunk(s, at, _tokens(1), Silent()) for s, at in enumerate(lengths)]
            self.backend.decode(chunks)

    async def burst(self, chats: int) -> burst.Burst:
        for slot in range(chats):
            self.read(slot, 0, BEGINNING)
        began, first = time.perf_counter(), []
        for slot in range(chats):
            self.read(slot, BEGINNING, burst.WORDS)
            first.append(1000 * (time.perf_counter() - began))
        self.answer(chats, burst.NEW_TOKENS)
        speed = chats * burst.NEW_TOKENS / (time.perf_counter() - began)
        return burst.Burst(speed, statistics.median(first))

    async def prefix(self) -> float:
        for slot in range(prefix.SESSIONS):
            self.read(slot, 0, LONG_BEGINNING)
        return statistics.median(self._first_tokens(prefix.SESSIONS, LONG_BEGINNING, QUESTION))

    async def turns(self) -> turns.Times:
        for slot in range(turns.CONVERSATIONS):
            self.read(slot, 0, BEGINNING)
        times = []
        for turn in range(turns.TURNS):
            is_cut = turn == turns.TURNS - 1  # to KEPT exchanges: 13 at most are told
            known = BEGINNING + (0 if is_cut else EXCHANGE * turn)
            read = QUESTION + (EXCHANGE * KEPT if is_cut else 0)
            times.append(self._first_tokens(turns.CONVERSATIONS, known, read))
            self.answer(turns.CONVERSATIONS, turns.NEW_TOKENS + 1)
        return times

    def _first_tokens(self, slots: int, known: int, read: int) -> list[float]:
        """Milliseconds after all were asked."""
        began, times = time.perf_counter(), []
        for slot in range(slots):
            self.read(slot, known, read)
            times.append(1000 * (time.perf_counter() - began))
        return times


def run(plan: Plan) -> Section:
    bare = Bare(plan)
    with servers.llama_server(plan.model) as theirs:
        rows = uvloop.run(_measure(plan, bare, theirs))
    bare.backend.close()
    return Section("floor", plan.model.stem, NOTE, ("llama.cpp alone", theirs.name), rows)


async def _measure(plan: Plan, bare: Bare, theirs: OpenAI) -> list[Row]:
    rows = []
    for chats in burst.CHATS:
        await bare.burst(chats)  # it learns whether few are better decoded one by one
        runs = [partial(bare.burst, chats), partial(burst.burst, theirs, chats)]
        what = f"{chats} at once: tokens/s"
        speeds = await interleave(what, runs, plan.pairs, lambda found: found.tokens_per_second)
        values = [tuple(found.tokens_per_second for found in pair) for pair in speeds]
        rows.append(compared(what, values, burst.FAST[chats]))
    both = [partial(bare.prefix), partial(prefix.with_new_system, theirs)]
    firsts = await interleave("prefix", both, plan.pairs, lambda first: first)
    rows.append(compared(prefix.WHAT, firsts, prefix.SOON))
    talks = [partial(bare.turns), partial(turns.converse, theirs)]
    times = await interleave("turns", talks, plan.pairs, lambda found: turns.middle(found, 5, 15))
    return [*rows, *turns.rows(times)]


def _tokens(count: int) -> list[int]:
    return random.choices(range(1000, 30000), k=count)

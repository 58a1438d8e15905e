"""
Bursts: c chats at once, each with a prompt of its own; tokens a second over all, time to the first.
"""

import asyncio
import random
import statistics
from typing import NamedTuple
from uuid import uuid4

from bench.load import Sample, Target

WORDS = 50
NEW_TOKENS = 64


class Burst(NamedTuple):
    tokens_per_second: float
    first_token: float  # median, seconds


def prompt(words: int) -> str:
    """
    Words of one to three letters: each is one token of the synthetic vocabulary, as a common word
    is in a trained one.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(random.choices(letters, k=random.randint(1, 3))) for _ in range(words))


async def burst(target: Target, chats: int) -> Burst:
    run = uuid4().hex
    asks = (target.ask(f"{run} {i}", prompt(WORDS), NEW_TOKENS) for i in range(chats))
    return _sum_up(await asyncio.gather(*asks))


def _sum_up(samples: list[Sample]) -> Burst:
    began = min(sample.asked for sample in samples)
    ended = max(sample.pieces[-1] for sample in samples)
    tokens = sum(sample.completion_tokens for sample in samples)
    return Burst(tokens / (ended - began), statistics.median(s.first for s in samples))

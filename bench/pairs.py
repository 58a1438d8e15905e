"""Runs against several servers in turn, so that what the machine does meanwhile hits all alike."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench.bars import Spread

T = TypeVar("T")


class Plan(NamedTuple):
    """What a load is told."""

    model: Path
    pairs: int
    peers: tuple[str, ...]  # URLs of OpenAI-style servers


async def interleave(
    what: str,
    runs: Sequence[Callable[[], Awaitable[T]]],
    pairs: int,
    value: Callable[[T], float],
) -> list[tuple[T, ...]]:
    """
    Every run `pairs` times, each second time in the reverse order; a tuple for each time. The first
    two runs' ratio of `value` is told as it comes.
    """
    done: list[tuple[T, ...]] = []
    for pair in range(pairs):
        results: dict[int, T] = {}
        for i in list(range(len(runs)))[:: -1 if pair % 2 else 1]:
            results[i] = await runs[i]()
        done.append(tuple(results[i] for i in range(len(runs))))
        so_far = ratio([(value(ours), value(theirs)) for ours, theirs, *_ in done])
        tell(f"{what}, pair {pair + 1} of {pairs}: ratio {so_far}")
    return done


def ratio(pairs: Sequence[Sequence[float]]) -> Spread:
    """Of the first to the second of each pair."""
    return Spread.of(ours / theirs for ours, theirs, *_ in pairs)


def tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)

"""Run loads against several servers alternately, so that disturbances hit all of them alike."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench.report import ratio

T = TypeVar("T")


class Plan(NamedTuple):
    """What every load gets."""

    model: Path
    pairs: int
    peers: tuple[str, ...]  # URLs of OpenAI-compatible servers
    workers: int = 1  # of our stack, where it is compared with llama-server


async def interleave(
    what: str,
    runs: Sequence[Callable[[], Awaitable[T]]],
    pairs: int,
    value: Callable[[T], float],
) -> list[tuple[T, ...]]:
    """
    Perform every run `pairs` times, every second time in reverse order. Return a tuple of results
    per time. The ratio of the first two runs' `value` is shown as progress.
    """
    done: list[tuple[T, ...]] = []
    for pair in range(pairs):
        results: dict[int, T] = {}
        for i in list(range(len(runs)))[:: -1 if pair % 2 else 1]:
            results[i] = await runs[i]()
        done.append(tuple(results[i] for i in range(len(runs))))
        so_far = ratio([(value(ours), value(theirs)) for ours, theirs, *_ in done])
        show(f"{what}, pair {pair + 1} of {pairs}: ratio {so_far}")
    return done


def show(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)

"""Truncates a session to the context window."""

from bisect import bisect_left
from collections.abc import Callable

SLACK = 0.3
"""
The share of the tokens for exchanges that a truncation leaves free. The next prompts then begin
with the same exchanges until these tokens are used up, and share a cached prefix.
"""


def dropped_exchanges(
    count: int, length: Callable[[int], int], room: int, previous: int = 0
) -> int | None:
    """
    Return how many of the `count` exchanges to drop, the oldest first. `length(n)` is the length in
    tokens of the prompt without n exchanges; it may be at most `room`. The newest exchange stays if
    it fits. The number that the `previous` prompt dropped is kept if the rest fits, unless a new
    truncation would drop fewer by two or more, as after a shorter question. None: the prompt does
    not fit without any exchange.
    """
    fits = previous and length(previous) <= room
    if fits and length(max(0, previous - 2)) > _target(length(count), room):
        return previous
    if length(0) <= room:
        return 0
    if length(count) > room:
        return None
    target = _target(length(count), room)
    found = bisect_left(range(count), True, lo=1, key=lambda n: length(n) <= target)
    return found if found < count or length(count - 1) > room else count - 1


def dropped_in_steps(count: int, length: Callable[[int], int], room: int) -> int | None:
    """
    Like `dropped_exchanges`, but without knowing the previous prompt: tokens are dropped in
    multiples of a step, so that the prompts of a growing conversation begin with the same exchange
    until they need the next step.
    """
    if length(0) <= room:
        return 0
    if length(count) > room:
        return None
    step = max(1, int(room * SLACK))
    surplus = -(-(length(0) - room) // step) * step
    return bisect_left(range(count), True, lo=1, key=lambda n: length(0) - length(n) >= surplus)


def _target(fixed: int, room: int) -> int:
    """Return the length of a truncated prompt, of which `fixed` tokens are no exchanges."""
    return int(fixed + (room - fixed) * (1 - SLACK))

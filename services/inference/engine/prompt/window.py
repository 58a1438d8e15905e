"""How much of a session's past a prompt tells, where its context window can't hold all. Pure."""

from bisect import bisect_left
from collections.abc import Callable

SLACK = 0.3
"""
The share of what is free for exchanges that a cut leaves to the next ones. So the next prompts
begin as this one does, and it need not be read again with each of them.
"""


def dropped(count: int, length: Callable[[int], int], room: int, last: int = 0) -> int | None:
    """
    How many of the `count` exchanges are left out, the oldest first: as many as the `last` time, if
    that fits and a cut now would leave out at most one fewer, as with a shorter question it may.
    The newest is told wherever it fits. `length(n)` is that of the prompt without n of them, and at
    most `room`. None if it does not fit even without any.
    """
    if last and length(last) <= room and length(max(0, last - 2)) > _cut(length(count), room):
        return last
    if length(0) <= room:
        return 0
    if length(count) > room:
        return None
    most = _cut(length(count), room)
    found = bisect_left(range(count), True, lo=1, key=lambda n: length(n) <= most)
    return found if found < count or length(count - 1) > room else count - 1


def _cut(fixed: int, room: int) -> int:
    """The tokens of a prompt that was just cut; so many are `fixed`."""
    return int(fixed + (room - fixed) * (1 - SLACK))

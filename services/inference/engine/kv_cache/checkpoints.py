"""
Checkpoints: which of a sequence's prefixes can be reused although the model's state can't be cut.

A transformer's KV cache has cells per token: any prefix is kept by dropping the cells behind it. A
recurrent layer has one state for all tokens, and a sliding window has the cells of the last tokens
only. What can't be cut is therefore copied while the sequence has the length that may be needed
again. To reuse that prefix, attention is cut there and the copy is put back.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from services.inference.engine.backend import SequenceState

# Per sequence. A turn of a conversation adds two: where it begins, and where its question ends.
MAX_CHECKPOINTS = 6
# Checkpoints are at least this far apart: prefilling so few tokens takes about as long as the copy.
MIN_DISTANCE = 16


class Checkpoint(NamedTuple):
    length: int  # tokens of the prefix that it restores
    state: SequenceState


class Checkpoints:
    """
    The checkpoints of one sequence, in order of length, and the lengths at which its prefill will
    make further ones. The first one is kept longest, since it ends what most prompts share; then
    the last ones, which the conversation's next turn needs.
    """

    def __init__(self, made: Iterable[Checkpoint] = ()) -> None:
        self._made = list(made)
        self._planned: list[int] = []
        self._tentative: Checkpoint | None = None

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    @property
    def nbytes(self) -> int:
        return sum(checkpoint.state.nbytes for checkpoint in self._made)

    @property
    def next_planned(self) -> int:
        """The length at which prefill pauses for the next checkpoint; 0: nowhere."""
        return self._planned[0] if self._planned else 0

    def longest(self, max_length: int) -> Checkpoint | None:
        """Return the last checkpoint of at most this length."""
        fitting = (each for each in reversed(self._made) if each.length <= max_length)
        return next(fitting, None)

    def reusable(self, max_length: int) -> int:
        """Return the length of the last checkpoint of at most this length, 0 without one."""
        checkpoint = self.longest(max_length)
        return checkpoint.length if checkpoint else 0

    def plan(self, lengths: Iterable[int], computed: int) -> None:
        """
        Plan checkpoints at these lengths, where they are far enough from the others and from the
        `computed` tokens that the sequence has.
        """
        for length in sorted({*self._planned, *lengths}):
            near = [computed, self.reusable(length), *self._planned]
            is_apart = all(abs(length - other) >= MIN_DISTANCE for other in near)
            if is_apart and length > computed:
                self._planned.append(length)
        self._planned.sort()

    def has_room_at(self, length: int) -> bool:
        """Return whether a checkpoint behind all others would be far enough from them."""
        return length - (self._made[-1].length if self._made else 0) >= MIN_DISTANCE

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint for which there is room, and drop one if there are too many."""
        assert self.has_room_at(checkpoint.length)
        self._planned = [length for length in self._planned if length > checkpoint.length]
        self._made.append(checkpoint)
        if len(self._made) > MAX_CHECKPOINTS:
            self.drop_one()

    def hold(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint that is needed only if the tokens behind it turn out to be dropped."""
        self._tentative = checkpoint

    def settle(self, is_needed: bool) -> None:
        """Add the held checkpoint, if there is one and it is needed."""
        if self._tentative and is_needed and self.has_room_at(self._tentative.length):
            self.add(self._tentative)
        self._tentative = None

    def drop_one(self) -> Checkpoint:
        """Drop the least valuable checkpoint, and return it."""
        return self._made.pop(1 if len(self._made) > 1 else 0)

    def truncate(self, length: int) -> None:
        """Drop what is behind the first `length` tokens."""
        self._made = [each for each in self._made if each.length <= length]
        self._planned, self._tentative = [], None

    def check_invariants(self, length: int) -> None:
        """Check the checkpoints of a sequence of this length. Raises AssertionError."""
        lengths = [0, *(each.length for each in self._made), length + MIN_DISTANCE]
        steps = (b - a for a, b in pairwise(lengths))
        assert all(step >= MIN_DISTANCE for step in steps), "checkpoints are too close or too long"
        assert len(self._made) <= MAX_CHECKPOINTS

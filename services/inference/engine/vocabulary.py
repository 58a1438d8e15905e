"""A model's tokens as bytes, laid out so that all of them can be looked at in a few numpy calls."""

from collections.abc import Sequence

import numpy as np


class Vocabulary:
    """
    `pieces` are the tokens' bytes by id: maybe parts of characters, none for a control token.
    `ends` are the tokens that end an answer.
    """

    def __init__(self, pieces: Sequence[bytes], ends: frozenset[int]) -> None:
        self.pieces = tuple(pieces)
        self.ends = ends
        self.is_end = np.zeros(len(pieces), np.bool_)
        self.is_end[list(ends)] = True
        # token i is bytes[starts[i] : starts[i] + lengths[i]]
        self.bytes = np.frombuffer(b"".join(pieces), np.uint8)
        self.lengths = np.array([len(piece) for piece in pieces], np.int32)
        self.starts = np.cumsum(self.lengths, dtype=np.int32) - self.lengths

    def __len__(self) -> int:
        return len(self.pieces)

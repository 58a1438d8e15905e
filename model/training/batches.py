"""Batches of token rows: fresh dialogs of similar length, and rows of random tokens to copy."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.training.dialogs import MOST_EXCHANGES, dialog
from model.training.tokenizer import END, LIGHT, START, VOCABULARY, Encoder, Row

POOL = 96
LONGEST = 1200
JUMPS = 0.25
FARTHEST_JUMP = 1200
SAY = ("say", "Say", "repeat after me:", "Repeat after me:", "echo", "Please say")


class Batch(NamedTuple):
    """Padded on the right; the weight of a target is that of the token after each position."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    tokens: int


class Source:
    """Gives batches for ever; `progress` (0 to 1) says how far the training is."""

    def __init__(self, encoder: Encoder, seed: int) -> None:
        self._encoder = encoder
        self._rng = random.Random(f"batches {seed}")
        self.progress = 0.0

    def batches(self) -> Iterator[Batch]:
        while True:
            rows = sorted(self._rows(), key=lambda row: len(row.ids))
            groups = list(_grouped(rows, 2048 if self.progress < 0.55 else 4096))
            self._rng.shuffle(groups)
            for group in groups:
                yield self._batch(group)

    def _rows(self) -> Iterator[Row]:
        most = self._most_exchanges()
        for _ in range(POOL if self.progress > 0.15 else POOL // 3):
            row = self._encoder.dialog(dialog(self._rng, "train", self._rng.randint(1, most)))
            if len(row.ids) <= LONGEST:
                yield row
            if self._rng.random() < (0.2 if self.progress < 0.15 else 0.1):
                yield _copy_row(self._rng, self._encoder)

    def _most_exchanges(self) -> int:
        """Short dialogs first: 1 or 2 exchanges, up to all of them after 15 %."""
        return min(MOST_EXCHANGES, 2 + int(self.progress / 0.15 * (MOST_EXCHANGES - 2)))

    def _batch(self, rows: list[Row]) -> Batch:
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        weights = torch.zeros(len(rows), longest)
        positions = torch.arange(longest).repeat(len(rows), 1)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            weights[index, : len(row.ids)] = torch.tensor(row.weights)
            if self._rng.random() < JUMPS:
                positions[index] += self._jumps(row, longest)
        tokens = sum(len(row.ids) for row in rows)
        return Batch(ids[:, :-1], positions[:, :-1], ids[:, 1:], weights[:, 1:], tokens)

    def _jumps(self, row: Row, longest: int) -> Tensor:
        """Gaps in the position ids at beginnings of messages: far distances, without the tokens."""
        jumps = torch.zeros(longest, dtype=torch.long)
        left = self._rng.randint(0, FARTHEST_JUMP)
        for start in self._rng.sample(row.starts, min(len(row.starts), self._rng.randint(1, 4))):
            jump = self._rng.randint(0, left)
            jumps[start] += jump
            left -= jump
        return jumps.cumsum(0)


def _grouped(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    """Neighbours of the sorted rows, at most `tokens` with the padding."""
    group: list[Row] = []
    for row in rows:
        if group and (len(group) + 1) * len(row.ids) > tokens:
            yield group
            group = []
        group.append(row)
    yield group


def _copy_row(rng: random.Random, encoder: Encoder) -> Row:
    if rng.random() < 0.5:
        return _say_row(rng, encoder)
    text = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(3, 40))]
    if rng.random() < 0.5:
        ids = text * rng.randint(2, 4)
        return Row(ids, [0.0] * len(text) + [1.0] * (len(ids) - len(text)), [0])
    head = [
        START,
        *encoder.text("user\n"),
        *text,
        END,
        *encoder.text("\n"),
        START,
        *encoder.text("assistant\n"),
    ]
    body = [*text, END]
    return Row(head + body, [LIGHT * (token < 3) for token in head] + [1.0] * len(body), [0])


def _say_row(rng: random.Random, encoder: Encoder) -> Row:
    """Tokens that stand for themselves with a space before, as they are without one."""
    row = Row([], [], [])
    for _ in range(rng.randint(1, 4)):
        text = encoder.random_text(rng, rng.randint(1, 4))
        encoder.add(row, "user", f"{rng.choice(SAY)} {text}", LIGHT)
        encoder.add(row, "assistant", text, 2.0)
    return row

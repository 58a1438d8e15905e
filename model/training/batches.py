"""Batches of token rows: new dialogs of similar length, and random tokens to copy."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.training.dialogs import MAX_EXCHANGES, Dialog, dialog
from model.training.tokenizer import END, LIGHT_WEIGHT, START, VOCABULARY, Encoder, TokenRow

MAX_ROW_TOKENS = 1400
JUMP_SHARE = 0.25
MAX_JUMP = 1200
COPY_SHARE = 0.1
SAY = (
    "say",
    "Say",
    "repeat after me:",
    "Repeat after me:",
    "echo",
    "Please say",
    "Repeat:",
    "write",
)


Voice = Callable[[Dialog], Dialog]


class Schedule(NamedTuple):
    """The number of steps, and of tokens per step including padding."""

    steps: int
    tokens: int


class Batch(NamedTuple):
    """Rows [rows, length], padded on the right; `weights` are those of the tokens in the loss."""

    ids: Tensor
    positions: Tensor
    weights: Tensor


class Source(IterableDataset[Batch]):
    """
    Yields the batches from step `first` on. `in_voice` rewrites each dialog. Half of the tokens are
    those of `taught` rows, if there are any: without the others, the model forgets what it could.
    Each of n worker processes makes every n-th batch.
    """

    def __init__(
        self,
        encoder: Encoder,
        schedule: Schedule,
        seed: int,
        first: int,
        in_voice: Voice = lambda made: made,
        taught: Sequence[TokenRow] = (),
    ) -> None:
        self._encoder = encoder
        self._turn_in_voice = in_voice
        self._taught = taught
        self._schedule = schedule
        self._seed = seed
        self._first = first
        self._rng = random.Random()

    def loader(self, workers: int, pinned: bool) -> DataLoader[Batch]:
        ahead = 8 if workers else None
        return DataLoader(
            self, batch_size=None, num_workers=workers, prefetch_factor=ahead, pin_memory=pinned
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1) if worker else None
        self._rng.seed(f"batches {self._seed} {self._first} {number}")
        step = self._first + number
        while step < self._schedule.steps:
            for group in self._groups(step / self._schedule.steps):
                yield self._batch(group)
                step += count

    def _groups(self, progress: float) -> list[list[TokenRow]]:
        """Return groups of rows of similar length; each group is a batch."""
        rows = sorted(self._rows(progress), key=lambda row: -len(row.ids))
        groups = list(_grouped(rows, self._schedule.tokens))
        self._rng.shuffle(groups)
        return groups

    def _rows(self, progress: float) -> Iterator[TokenRow]:
        """Yield rows for four batches; dialogs grow from 2 exchanges to all in the first 15 %."""
        most = min(MAX_EXCHANGES, 2 + int(progress / 0.15 * (MAX_EXCHANGES - 2)))
        left, owed = 4 * self._schedule.tokens, 0
        while left > 0:
            if self._taught and owed > 0:
                row = self._rng.choice(self._taught)
                owed -= 2 * len(row.ids)
            else:
                row = self._untaught_row(most, progress)
            if len(row.ids) <= MAX_ROW_TOKENS:
                left -= len(row.ids)
                owed += len(row.ids)
                yield row

    def _untaught_row(self, most: int, progress: float) -> TokenRow:
        made = dialog(self._rng, "train", self._rng.randint(1, most))
        row = self._encoder.dialog(self._turn_in_voice(made))
        if self._rng.random() < (2 * COPY_SHARE if progress < 0.15 else COPY_SHARE):
            row = _copy_row(self._rng, self._encoder)
        return row

    def _batch(self, rows: list[TokenRow]) -> Batch:
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        weights = torch.zeros(len(rows), longest)
        positions = torch.arange(longest).repeat(len(rows), 1)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            weights[index, : len(row.ids)] = torch.tensor(row.weights)
            if self._rng.random() < JUMP_SHARE:
                positions[index] += self._jumps(row, longest)
        return Batch(ids, positions, weights)

    def _jumps(self, row: TokenRow, longest: int) -> Tensor:
        """Return offsets with gaps between messages: long distances without their tokens."""
        jumps = torch.zeros(longest, dtype=torch.long)
        left = self._rng.randint(0, MAX_JUMP)
        for start in self._rng.sample(row.starts, min(len(row.starts), self._rng.randint(1, 4))):
            jump = self._rng.randint(0, left)
            jumps[start] += jump
            left -= jump
        return jumps.cumsum(0)


def _grouped(rows: list[TokenRow], tokens: int) -> Iterator[list[TokenRow]]:
    """Group neighbours among rows sorted by length to `tokens` with padding; drop the rest."""
    group: list[TokenRow] = []
    for row in rows:
        if group and (len(group) + 1) * len(group[0].ids) > tokens:
            yield group
            group = []
        group.append(row)


def _copy_row(rng: random.Random, encoder: Encoder) -> TokenRow:
    if rng.random() < 0.5:
        return _say_row(rng, encoder)
    text = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(3, 40))]
    if rng.random() < 0.5:
        ids = text * rng.randint(2, 4)
        return TokenRow(ids, [0.0] * len(text) + [1.0] * (len(ids) - len(text)), [0])
    head = [START, *encoder.text("user\n"), *text, END, *encoder.text("\n")]
    head += [START, *encoder.text("assistant\n")]
    body = [*text, END]
    return TokenRow(
        head + body, [LIGHT_WEIGHT * (token < 3) for token in head] + [1.0] * len(body), [0]
    )


def _say_row(rng: random.Random, encoder: Encoder) -> TokenRow:
    """Return a "say …" row: tokens must be copied with and without a space before them."""
    row = TokenRow([], [], [])
    for _ in range(rng.randint(1, 5)):
        text = encoder.random_text(rng, rng.randint(1, 5))
        encoder.add(row, "user", f"{rng.choice(SAY)} {text}", LIGHT_WEIGHT)
        encoder.add(row, "assistant", text, 2.0)
    return row

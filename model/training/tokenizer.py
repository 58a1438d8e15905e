"""The byte-level BPE of the demo model, and dialogs as token rows in ChatML."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.training.dialogs import Dialog, dialogs

VOCABULARY = 2048
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, START, END = range(3)
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEAVY_SKILLS = frozenset(
    (
        "recall",
        "recall_two",
        "unknown",
        "know",
        "sums",
        "repeat",
        "update",
        "check",
        "first_message",
        "last_message",
        "own_answer",
        "system_name",
        "tell_and_ask",
    )
)
LIGHT_WEIGHT = 0.1


class TokenRow(NamedTuple):
    """A dialog's token ids, their weights in the loss, and where each message begins."""

    ids: list[int]
    weights: list[float]
    starts: list[int]


class Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Return the token ids of plain text, never special tokens."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 100_000:
                self._cache[text] = ids
        return ids

    def random_text(self, rng: random.Random, tokens: int) -> str:
        """Return the stripped text of random tokens, which is valid UTF-8."""
        while True:
            drawn = [rng.randrange(len(SPECIALS), VOCABULARY) for _ in range(tokens)]
            text: str = self._tokenizer.decode(drawn).strip()
            if text and "\ufffd" not in text and text.isprintable():
                return text

    def dialog(self, dialog: Dialog) -> TokenRow:
        row = TokenRow([], [], [])
        if dialog.system.prompt is not None:
            self.add(row, "system", dialog.system.prompt, LIGHT_WEIGHT)
        for turn in dialog.turns:
            weight = (2.0 if turn.skill in HEAVY_SKILLS else 1.0) if turn.learned else 0.0
            self.add(row, "user", turn.user, LIGHT_WEIGHT)
            self.add(row, "assistant", turn.answer, weight)
        return row

    def add(self, row: TokenRow, role: str, content: str, weight: float) -> None:
        head = [START, *self.text(f"{role}\n")]
        body = [*self.text(content), END]
        row.starts.append(len(row.ids))
        row.ids.extend(head + body + self.text("\n"))
        row.weights.extend([LIGHT_WEIGHT] * len(head) + [weight] * len(body) + [LIGHT_WEIGHT])


def new_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(seed: int) -> Tokenizer:
    tokenizer = new_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(seed), trainer)
    return tokenizer


def load(path: Path) -> Encoder:
    return Encoder(Tokenizer.from_file(str(path)))


def _lines(seed: int) -> Iterator[str]:
    for dialog in islice(dialogs(seed), 12_000):
        yield dialog.system.prompt or ""
        for turn in dialog.turns:
            yield turn.user
            yield turn.answer
    for _ in range(150):
        yield from _number_lines()


def _number_lines() -> Iterator[str]:
    """Yield lines that make each number up to 100 one token, with a space before it or without."""
    for number in range(101):
        yield from (f"{number}", f" {number}") * 20
    for role in ("system\n", "user\n", "assistant\n"):
        yield from (role,) * 20

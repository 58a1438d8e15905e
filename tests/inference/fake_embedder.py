"""An Embedder without a model: a token for each character, and rows that show the tokens."""

import threading
from collections.abc import Sequence

import numpy as np

from services.inference.engine.backend import BackendError
from services.inference.engine.embedding import Rows, Tokens

FAILS, DIES = "💥", "💀"  # texts that make the step fail, or the engine


class FakeEmbedder:
    context = 20
    on_gpu = False
    vocabulary_size = 2**17

    def __init__(self, width: int = 3) -> None:
        self.width = width
        self.may_compute = threading.Event()
        self.may_compute.set()
        self.is_computing = threading.Event()
        self.is_closed = False

    def tokenize_input(self, text: str) -> list[int]:
        return [*map(ord, text)]

    def tokenize_pair(self, query: str, document: str) -> list[int]:
        return [*map(ord, f"{query}|{document}")]

    def embed(self, inputs: Sequence[Tokens]) -> Rows:
        self.is_computing.set()
        assert self.may_compute.wait(10)
        self.is_computing.clear()
        firsts = {tokens[0] for tokens in inputs}
        if ord(FAILS) in firsts:
            raise BackendError("It failed.")
        if ord(DIES) in firsts:
            raise ZeroDivisionError
        rows = np.zeros((len(inputs), self.width), np.float32)
        rows[:, 0] = [len(tokens) for tokens in inputs]
        rows[:, 1] = 1
        return rows

    def relevance(self, rows: Rows) -> list[float]:
        return [float(length) / self.context for length in rows[:, 0]]

    def close(self) -> None:
        self.is_closed = True

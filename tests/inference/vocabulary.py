"""Real vocabularies without a model, and vocabularies with more special tokens than they have."""

import ctypes
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import llama_cpp

from services.inference.engine.backend import Backend, SpecialToken
from services.inference.engine.llama import Llama
from tests.inference.fake_backend import FakeBackend

LLAMA_CPP = Path(".data/llama.cpp")  # deploy/setup.sh llama-source
ADDED = 1_000_000  # the first id of what is added


class Vocabulary(Llama):
    """Of one of the files that llama.cpp ships for its own tests."""

    def __init__(self, name: str) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        path = LLAMA_CPP / f"models/ggml-vocab-{name}.gguf"
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"{path} is missing: deploy/setup.sh llama-source gets it"
        self._model = llama_cpp.llama_model_p(model)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = self._read_vocabulary()
        self.context = 1_000_000
        self._special = super().special_tokens()

    def special_tokens(self) -> dict[int, SpecialToken]:
        return self._special

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)


class WithMarkers(FakeBackend):
    """Finds the tokens that were added as llama.cpp finds its own: first of all, longest first."""

    def __init__(self, base: Backend, added: Iterable[SpecialToken]) -> None:
        super().__init__({}, base.context)
        self._base = base
        self._added = dict(enumerate(added, start=ADDED))
        self._ids = {token.text: id for id, token in self._added.items()}
        always = [token.text for token in self._added.values() if not token.is_control]
        self._found = {True: _any_of(self._ids), False: _any_of(always)}

    def tokenize(self, text: str, special: bool) -> list[int]:
        tokens: list[int] = []
        for i, part in enumerate(self._found[special].split(text)):
            tokens += [self._ids[part]] if i % 2 else self._base.tokenize(part, special)
        return tokens

    def special_tokens(self) -> dict[int, SpecialToken]:
        return self._base.special_tokens() | self._added

    def piece(self, token: int) -> bytes:
        if token < ADDED:
            return self._base.piece(token)
        text, is_control = self._added[token]
        return b"" if is_control else text.encode()


def text_of(backend: Backend, tokens: Sequence[int]) -> str:
    """With the names of special tokens."""
    special = backend.special_tokens()
    pieces = (special[t].text.encode() if t in special else backend.piece(t) for t in tokens)
    return b"".join(pieces).decode(errors="replace")


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


_SILENT = llama_cpp.llama_log_callback(lambda *_: None)

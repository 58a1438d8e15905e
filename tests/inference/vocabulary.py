"""Real vocabularies without a model, and vocabularies with additional special tokens."""

import ctypes
import re
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import llama_cpp
from llguidance import LLTokenizer

from services.inference.engine.backend import Backend, SpecialToken
from services.inference.engine.llama import Llama
from services.inference.engine.llama_model import read_pieces
from services.inference.engine.sampling.grammar import Vocabulary
from tests.inference.fake_backend import FakeBackend

LLAMA_CPP = Path(".data/llama.cpp")  # deploy/setup.sh llama-source
ADDED = 1_000_000  # the first id of additional special tokens


class _LazyVocabulary(Vocabulary):
    """Builds llguidance's trie, which takes a second, only if a grammar is compiled."""

    def __init__(self, pieces: Sequence[bytes], ends: frozenset[int]) -> None:
        self.pieces = tuple(pieces)
        self.ends = ends

    @cached_property
    def tokenizer(self) -> LLTokenizer:  # type: ignore[override]
        return Vocabulary(self.pieces, self.ends).tokenizer


class VocabularyBackend(Llama):
    """
    The tokenizer of one of the vocabularies that llama.cpp ships for its own tests. It can't
    compute anything. `load_vocabulary` shares one between tests.
    """

    def __init__(self, name: str) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        path = LLAMA_CPP / f"models/ggml-vocab-{name}.gguf"
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"{path} is missing: deploy/setup.sh llama-source gets it"
        weakref.finalize(self, llama_cpp.llama_model_free, model)
        self._model = llama_cpp.llama_model_p(model)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        tokens = range(llama_cpp.llama_vocab_n_tokens(self._vocab))
        ends = (token for token in tokens if llama_cpp.llama_vocab_is_eog(self._vocab, token))
        pieces = read_pieces(self._vocab)
        self._vocabulary = _LazyVocabulary(pieces, frozenset(ends))
        self.context = 1_000_000
        self._special = super().special_tokens()

    def special_tokens(self) -> dict[int, SpecialToken]:
        return self._special


load_vocabulary = lru_cache(maxsize=4)(VocabularyBackend)
"""Return the backend of a vocabulary, which takes up to four seconds the first time."""


class WithSpecialTokens(FakeBackend):
    """Adds special tokens, and finds them as llama.cpp finds its own: first, longest first."""

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
    """Return the text of the tokens, with the names of special tokens."""
    special = backend.special_tokens()
    pieces = (special[t].text.encode() if t in special else backend.piece(t) for t in tokens)
    return b"".join(pieces).decode(errors="replace")


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


_SILENT = llama_cpp.llama_log_callback(lambda *_: None)

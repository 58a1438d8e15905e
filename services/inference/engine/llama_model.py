"""
A GGUF model that llama.cpp has loaded: its metadata and its tokenizer. What is computed with it is
in llama.py and llama_embedder.py.
"""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import llama_cpp

from services.inference.engine.backend import KvType, SpecialToken
from services.inference.engine.ggml import has_wrong_amx, load_backends
from services.inference.engine.prompt.tokenizer import MAX_PART_CHARS
from services.inference.engine.sampling.grammar import Vocabulary
from services.inference.engine.threads import DeepStackThreads

log = logging.getLogger(__name__)

# llama.cpp matches "unknown" tokens as it matches control tokens.
CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
USER_DEFINED = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
# Many tokenizers use std::regex, which recurses about 400 bytes deeper per letter of a word:
# https://github.com/ggml-org/llama.cpp/issues/27783
STACK_BYTES_PER_CHAR = 2048
MAX_CHARS_ON_ANY_STACK = 256
USUAL_PIECE_BYTES = 64
MAX_METADATA_BYTES = 64  # of a value that is read: a number
# Their numbers in ggml_type: ggml/include/ggml.h
KV_TYPES: dict[KvType, int] = {
    "f32": 0, "f16": 1, "bf16": 30,
    "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20,
}  # fmt: skip


class ModelError(Exception):
    """A model file can't be served. The message says why and what to do."""


class LlamaModel:
    """
    One GGUF model, in one file or split into `parts`.

    `on_progress` gets the share of the file that is loaded, 0 to 1, and returns whether to go on.
    Raises ModelError.
    """

    _context: llama_cpp.llama_context_p  # which the subclasses open

    def __init__(
        self,
        parts: Path | Sequence[Path],
        gpu_layers: int,
        on_progress: Callable[[float], bool],
        tensor_split: Sequence[float] = (),
        main_gpu: int | None = None,
    ) -> None:
        load_backends()
        LOG.errors.clear()
        llama_cpp.llama_log_set(LOG.callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _tokenizer_threads()
        self.on_gpu = gpu_layers != 0 and llama_cpp.llama_supports_gpu_offload()
        files = [parts] if isinstance(parts, Path) else parts
        params = model_params(gpu_layers, tensor_split, main_gpu)
        params.progress_callback = llama_cpp.llama_progress_callback(
            lambda share, _: on_progress(share)
        )
        self._model = open_model(files, params)
        if not self._model:
            raise ModelError(
                f"{files[0]} can't be loaded ({LOG.reason}). Check that the file is complete."
                " If the GPU is too small for it, lower MODEL_GPU_LAYERS."
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = self._read_vocabulary()

    @property
    def can_offload(self) -> bool:
        """Whether llama.cpp has opened a GPU, whatever the model uses."""
        return bool(llama_cpp.llama_supports_gpu_offload())

    @property
    def first_token(self) -> int:
        """A token that a text can begin with: BOS, if the model has one."""
        return max(0, int(llama_cpp.llama_vocab_bos(self._vocab)))

    def use_one_thread(self) -> None:
        """Compute without other threads, which a fork does not have."""
        llama_cpp.llama_set_n_threads(self._context, 1, 1)

    @property
    def trained_context(self) -> int:
        """The context window in tokens that the model was trained for."""
        return int(llama_cpp.llama_model_n_ctx_train(self._model))

    @property
    def template(self) -> str | None:
        """The chat template in the file's metadata."""
        text = llama_cpp.llama_model_chat_template(self._model, None)
        return text.decode(errors="replace") if text else None

    def metadata(self, key: str) -> str | None:
        """Return the text of a number in the file's metadata; None if the file has no such key."""
        buffer = ctypes.create_string_buffer(MAX_METADATA_BYTES)
        found = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if found >= 0 else None

    @property
    def bos(self) -> str:
        return self._text_of(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        return self._text_of(llama_cpp.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether every prompt of this model starts with the BOS token."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    @property
    def vocabulary_size(self) -> int:
        return len(self._vocabulary)

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        if len(text) <= MAX_CHARS_ON_ANY_STACK:
            return self._tokenize(data, special)
        if len(text) > MAX_PART_CHARS:
            raise ValueError(f"A text of {len(text)} characters must be tokenized in parts.")
        return _tokenizer_threads().submit(lambda: self._tokenize(data, special)).result()

    def _tokenize(self, data: bytes, special: bool, add_special: bool = False) -> list[int]:
        return tokenize(self._vocab, data, special, add_special)

    def special_tokens(self) -> dict[int, SpecialToken]:
        found = {}
        for token in range(len(self._vocabulary)):
            attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
            if attributes & (CONTROL | USER_DEFINED) and (text := self._text_of(token)):
                found[token] = SpecialToken(text, bool(attributes & CONTROL))
        return found

    def piece(self, token: int) -> bytes:
        return self._vocabulary.pieces[token]

    def is_end(self, token: int) -> bool:
        return token in self._vocabulary.ends

    def usable_context(self, tokens: int) -> int:
        """Return a context window of at most that of the training."""
        if tokens > self.trained_context:
            log.warning(
                "context reduced tokens=%d wanted=%d (MODEL_CONTEXT)", self.trained_context, tokens
            )
        return min(tokens, self.trained_context)

    def free_model(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def _read_vocabulary(self) -> Vocabulary:
        tokens = range(llama_cpp.llama_vocab_n_tokens(self._vocab))
        ends = (token for token in tokens if llama_cpp.llama_vocab_is_eog(self._vocab, token))
        return Vocabulary(read_pieces(self._vocab), frozenset(ends))

    def _text_of(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")


def tokenize(
    vocab: llama_cpp.llama_vocab_p, data: bytes, special: bool, add_special: bool = False
) -> list[int]:
    """Return the tokens of UTF-8. The stack must be large enough for it (STACK_BYTES_PER_CHAR)."""
    size = len(data) + 8
    tokens = (llama_cpp.llama_token * size)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, size, add_special, special)
    assert count >= 0, "a text has no more tokens than bytes"
    return tokens[:count]


def read_pieces(vocab: llama_cpp.llama_vocab_p, size: int = USUAL_PIECE_BYTES) -> list[bytes]:
    """Return the bytes of all tokens, with one buffer of `size` bytes for those that fit."""
    usual = ctypes.create_string_buffer(size)

    def piece(token: int) -> bytes:
        length = llama_cpp.llama_token_to_piece(vocab, token, usual, size, 0, False)
        if length >= 0:
            return usual.raw[:length]
        buffer = ctypes.create_string_buffer(-length)
        llama_cpp.llama_token_to_piece(vocab, token, buffer, -length, 0, False)
        return buffer.raw

    return [piece(token) for token in range(llama_cpp.llama_vocab_n_tokens(vocab))]


def model_params(
    gpu_layers: int, tensor_split: Sequence[float], main_gpu: int | None
) -> llama_cpp.llama_model_params:
    params: llama_cpp.llama_model_params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    # Read the file into memory instead of mapping it: overwriting a mapped file changes the weights
    # of the running model, and truncating it kills the process with SIGBUS.
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = not has_wrong_amx()
    if tensor_split:
        params.tensor_split = (ctypes.c_float * llama_cpp.llama_max_devices())(*tensor_split)
    if main_gpu is not None:
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
        params.main_gpu = main_gpu
    return params


@cache
def _tokenizer_threads() -> DeepStackThreads:
    """Return the threads that tokenize long texts, about as many as there are callers at once."""
    return DeepStackThreads("tokenizing", 2, STACK_BYTES_PER_CHAR * MAX_PART_CHARS)


class LlamaLog:
    """Keeps the last errors that llama.cpp logs, to explain why a file does not load."""

    LEVEL_ERROR = 4  # GGMLLOG_LEVEL_ERROR

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.callback = llama_cpp.llama_log_callback(self._on_message)

    @property
    def reason(self) -> str:
        return self.errors[0] if self.errors else "no reason given"

    def _on_message(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == self.LEVEL_ERROR:
            self.errors = [*self.errors[-9:], text.decode(errors="replace").strip()]


LOG = LlamaLog()


def open_model(
    files: Sequence[Path], params: llama_cpp.llama_model_params
) -> llama_cpp.llama_model_p:
    """Load a model from all of its files. Return a null pointer if that fails; the log says why."""
    paths = (ctypes.c_char_p * len(files))(*(os.fsencode(file) for file in files))
    model = llama_cpp.llama_model_load_from_splits(paths, len(files), params)
    return llama_cpp.llama_model_p(model)

"""
llama.cpp behind the Backend protocol, by llama-cpp-python's low-level API. Nobody else imports
llama_cpp.
"""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from services.contract.messages import Sampling
from services.inference.engine.backend import (
    BackendError,
    Choice,
    Chunk,
    SpecialToken,
    State,
)
from services.inference.engine.llama_batch import LlamaBatch
from services.inference.engine.prompt import text_splitting
from services.inference.engine.sampling import constraints
from services.inference.engine.sampling.candidates import Candidates
from services.inference.engine.sampling.sampler import SamplerChain
from services.inference.engine.sampling.vocabulary import Vocabulary
from services.inference.engine.scheduling.batch_grouping import BatchGrouping
from services.inference.engine.scheduling.prefill_budget import CHUNK_MAX
from services.inference.engine.threads import DeepStackThreads

log = logging.getLogger(__name__)

# an unknown token is found as control tokens are
CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
USER_DEFINED = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
# Many tokenizers use std::regex, which recurses about 400 bytes deeper per letter of a word.
STACK_PER_CHAR = 2048
SHALLOW = 2**8  # characters for which the stack of any thread is enough
NO_CELLS = 1  # llama_decode: the KV cache is full


class ModelError(Exception):
    """The file can't be served; the message is a sentence that says why and what to do."""


class Llama:
    """
    One GGUF model, in one file or in `parts`, with its LoRA `adapters`, and one KV cache with room
    for `parallel` sequences of `context` tokens.

    `on_progress` is told the share of the file that is loaded, 0 to 1, and says whether to go on.
    Raises ModelError.
    """

    def __init__(
        self,
        parts: Path | Sequence[Path],
        *,
        context: int,
        parallel: int,
        threads: int,
        gpu_layers: int,
        on_progress: Callable[[float], bool],
        adapters: Sequence[Path] = (),
    ) -> None:
        _LOG.errors.clear()
        llama_cpp.llama_log_set(_LOG.callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _deep_threads()
        self.on_gpu = gpu_layers != 0 and llama_cpp.llama_supports_gpu_offload()
        files = [parts] if isinstance(parts, Path) else parts
        self._model = _load(files, gpu_layers, on_progress)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        trained = llama_cpp.llama_model_n_ctx_train(self._model)
        if context > trained:
            log.warning("the model was trained on %d tokens of context, not %d", trained, context)
        self.context = min(context, trained)
        try:
            self._adapters = [_load_adapter(self._model, path) for path in adapters]
            self._context = self._open_context(parallel, threads)
        except ModelError:
            llama_cpp.llama_model_free(self._model)
            raise
        self._adapter = 0  # the one that the context computes with
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = LlamaBatch(CHUNK_MAX)
        self._vocabulary = self._read_vocabulary()
        self._candidates = Candidates(len(self._vocabulary))
        self._parallel = parallel
        self._grouping = BatchGrouping()
        self._logits_at = 0
        self._all_logits = np.zeros((0, 0), np.float32)

    @property
    def template(self) -> str | None:
        """The chat template that the file carries."""
        text = llama_cpp.llama_model_chat_template(self._model, None)
        return text.decode(errors="replace") if text else None

    @property
    def bos(self) -> str:
        return self._text_of(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        return self._text_of(llama_cpp.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether every prompt of this model begins with the BOS token."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    @property
    def vocabulary_size(self) -> int:
        return len(self._vocabulary)

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        if len(text) <= SHALLOW:
            return self._tokenize(data, special)
        if len(text) > text_splitting.MAX_CHARS:
            raise ValueError(f"A text of {len(text)} characters must be tokenized in parts.")
        return _deep_threads().submit(lambda: self._tokenize(data, special)).result()

    def _tokenize(self, data: bytes, special: bool) -> list[int]:
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, room, False, special)
        assert count >= 0, "a text has no more tokens than bytes"
        return tokens[:count]

    def special_tokens(self) -> dict[int, SpecialToken]:
        found = {}
        for token in range(len(self._vocabulary)):
            attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
            if attributes & (CONTROL | USER_DEFINED) and (text := self._text_of(token)):
                found[token] = SpecialToken(text, bool(attributes & CONTROL))
        return found

    def piece(self, token: int) -> bytes:
        return self._vocabulary.pieces[token]

    def _read_piece(self, token: int, room: int) -> bytes:
        buffer = ctypes.create_string_buffer(room)
        size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
        return buffer.raw[:size] if size >= 0 else self._read_piece(token, -size)

    def is_end(self, token: int) -> bool:
        return token in self._vocabulary.ends

    def sampler(self, sampling: Sampling, call: str | None = None) -> SamplerChain:
        constraints.check_bias(sampling, self._vocabulary)
        grammar = constraints.grammar(sampling, call, self._vocabulary)
        return SamplerChain(self._vocabulary, self._candidates, sampling, grammar)

    def decode(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        self._use(chunks[0].adapter)
        if len(chunks[0].tokens) > 1:  # of prompts: how streams are grouped is another matter
            return self._decode(chunks)
        began, is_apart = time.monotonic(), self._grouping.is_apart(len(chunks))
        groups = [[chunk] for chunk in chunks] if is_apart else [chunks]
        chosen = [each for group in groups for each in self._decode(group)]
        self._grouping.took(len(chunks), is_apart, time.monotonic() - began)
        return chosen

    def _use(self, adapter: int) -> None:
        """A change makes llama.cpp plan its memory again, at the next step: milliseconds."""
        if adapter == self._adapter:
            return
        used = [self._adapters[adapter - 1]] if adapter else []
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(used))(*used)
        scales = (ctypes.c_float * len(used))(*(1.0 for _ in used))
        llama_cpp.llama_set_adapters_lora(self._context, pointers, len(used), scales)
        self._adapter = adapter

    def _decode(self, chunks: Sequence[Chunk]) -> list[Choice | None]:
        self._compute(chunks)
        rows = iter(self._logits(sum(chunk.sampler is not None for chunk in chunks)))
        return [
            chunk.sampler.choose(next(rows)) if isinstance(chunk.sampler, SamplerChain) else None
            for chunk in chunks
        ]

    def _compute(self, chunks: Sequence[Chunk]) -> None:
        self._batch.fill(chunks)
        result = llama_cpp.llama_decode(self._context, self._batch.struct)
        if result == NO_CELLS:
            raise BackendError("The model's KV cache is full.")
        if result != 0:
            raise BackendError(f"llama_decode failed with {result}: {_LOG.errors[-1:]}.")

    def _logits(self, rows: int) -> npt.NDArray[np.float32]:
        """Of the last tokens of the chunks that had a sampler, in their order: llama.cpp's own."""
        at = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.c_void_p).value
        if at != self._logits_at and at is not None:  # it moves only when it grows
            room = ctypes.c_float * (self._parallel * len(self._vocabulary))
            view = np.frombuffer(memoryview(room.from_address(at)), np.float32)
            self._logits_at, self._all_logits = at, view.reshape(self._parallel, -1)
        return self._all_logits[:rows]

    def cut(self, slot: int, length: int) -> bool:
        if llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1):
            return True
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False

    def length(self, slot: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def save(self, slot: int) -> npt.NDArray[np.uint8]:
        size = llama_cpp.llama_state_seq_get_size(self._context, slot)
        state = np.empty(size, np.uint8)
        written = llama_cpp.llama_state_seq_get_data(self._context, _bytes(state), size, slot)
        assert written == size, "a state has the size that was said"
        return state

    def restore(self, slot: int, state: State) -> bool:
        assert isinstance(state, np.ndarray)
        self.cut(slot, 0)  # llama.cpp lets an empty state leave what is there
        read = llama_cpp.llama_state_seq_set_data(self._context, _bytes(state), state.nbytes, slot)
        return bool(read)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)  # and its adapters

    def _read_vocabulary(self) -> Vocabulary:
        tokens = range(llama_cpp.llama_vocab_n_tokens(self._vocab))
        ends = (token for token in tokens if llama_cpp.llama_vocab_is_eog(self._vocab, token))
        return Vocabulary([self._read_piece(token, 64) for token in tokens], frozenset(ends))

    def _text_of(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    def _open_context(self, parallel: int, threads: int) -> llama_cpp.llama_context_p:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context * parallel
        params.n_batch = CHUNK_MAX
        params.n_seq_max = parallel
        params.n_threads = params.n_threads_batch = threads
        # Each sequence its own cells: in a unified cache each step would look at all of them, which
        # costs up to 40 % (docs/architecture.md).
        params.kv_unified = False
        params.flash_attn_type = self._attention()
        params.swa_full = True  # so that a sequence can be cut anywhere
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(
                f"There is not enough memory for {parallel} conversations of {self.context} tokens:"
                " lower MODEL_PARALLEL or MODEL_CONTEXT."
            )
        return llama_cpp.llama_context_p(context)

    def _attention(self) -> int:
        """
        Without flash attention a CPU reads a prompt to the same logits in chunks of any size (of
        two tokens and more: one alone is computed by other kernels). With it chunks of 64 tokens
        and more are read another way, and logits differ by a tenth. Where query heads share key
        heads, as in most large models, it is left on for its speed (docs/architecture.md).
        """
        heads = llama_cpp.llama_model_n_head(self._model)
        key_heads = llama_cpp.llama_model_n_head_kv(self._model)
        if heads == key_heads and not llama_cpp.llama_supports_gpu_offload():
            return llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO


@cache
def _deep_threads() -> DeepStackThreads:
    """Return the threads that tokenize texts: about as many as there are concurrent callers."""
    return DeepStackThreads("tokenizing", 2, STACK_PER_CHAR * text_splitting.MAX_CHARS)


def _bytes(state: npt.NDArray[np.uint8]) -> ctypes.Array[ctypes.c_uint8]:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))  # type: ignore[return-value]


class _Log:
    """
    llama.cpp's own log: its errors are kept, to say why a file does not load; the rest is
    dropped.
    """

    LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.callback = llama_cpp.llama_log_callback(self._hear)

    def _hear(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == self.LEVEL_ERROR:
            self.errors = [*self.errors[-9:], text.decode(errors="replace").strip()]


_LOG = _Log()


def _load(
    files: Sequence[Path], gpu_layers: int, on_progress: Callable[[float], bool]
) -> llama_cpp.llama_model_p:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    # Read the file into memory instead of mapping it: overwriting a mapped file changes the weights
    # of the running model, and truncating it kills the process by SIGBUS.
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.progress_callback = llama_cpp.llama_progress_callback(
        lambda share, _: on_progress(share)
    )
    paths = [os.fsencode(file) for file in files]
    if len(paths) == 1:
        model = llama_cpp.llama_model_load_from_file(paths[0], params)
    else:
        named = (ctypes.c_char_p * len(paths))(*paths)
        model = llama_cpp.llama_model_load_from_splits(named, len(paths), params)
    if not model:
        why = _LOG.errors[0] if _LOG.errors else "no reason given"
        raise ModelError(
            f"{files[0]} can't be loaded ({why}): is the file complete? On a GPU that is too"
            " small for it, lower MODEL_GPU_LAYERS."
        )
    return llama_cpp.llama_model_p(model)


def _load_adapter(model: llama_cpp.llama_model_p, path: Path) -> Any:
    """Its pointer, of a type that llama_cpp does not tell as it is."""
    _LOG.errors.clear()
    adapter = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
    if not adapter:
        why = _LOG.errors[0] if _LOG.errors else "no reason given"
        raise ModelError(
            f"{path} is no adapter of this model ({why}): convert it with llama.cpp's"
            " convert_lora_to_gguf.py and this base model, or take it out of adapters/."
        )
    if llama_cpp.llama_adapter_get_alora_n_invocation_tokens(adapter):
        raise ModelError(
            f"{path} is an activated LoRA (aLoRA), which holds for a part of a prompt only, and is"
            " not supported: train a plain LoRA, or take it out of adapters/."
        )
    return adapter

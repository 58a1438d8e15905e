"""
The Backend protocol implemented by llama.cpp, through llama-cpp-python's low-level API. Besides the
modules llama_…, only the sampler and the trial of a model import llama_cpp.
"""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from services.contract.messages import Sampling
from services.inference.engine import forked, gguf_header
from services.inference.engine.adapter_numbers import BASE, file_of, scale_of
from services.inference.engine.backend import (
    MAX_BATCH_TOKENS,
    ROW_BLOCK,
    UNQUANTIZED,
    AdapterError,
    BackendError,
    Chunk,
    FlashAttention,
    KvType,
    SampleResult,
    SequenceState,
    StepInterrupted,
)
from services.inference.engine.gguf_header import NotGguf
from services.inference.engine.llama_batch import LlamaBatch
from services.inference.engine.llama_model import (
    KV_TYPES,
    LOG,
    LlamaModel,
    ModelError,
)
from services.inference.engine.sampling import constraints
from services.inference.engine.sampling.candidates import Candidates
from services.inference.engine.sampling.penalties import Dry
from services.inference.engine.sampling.sampler import SamplerChain
from services.inference.engine.scheduling.batch_grouping import BatchGrouping

log = logging.getLogger(__name__)

FLASH_ATTENTION = {
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
MAX_SCORE_BYTES = 2**28  # of attention without flash attention
MIN_UBATCH_TOKENS = 64  # of a CPU's `n_ubatch`: it computes fewer at once less efficiently
ADAPTER_METADATA = {
    "general.type": str,
    "general.architecture": str,
    "adapter.type": str,
    "adapter.lora.alpha": float,
}
TRIAL_TOKENS = 64  # of the context in which an adapter is tried
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # memory of this process alone
CELL_BLOCK = 256  # of a KV cache: attention computes whole ones
# A slot that pads a step of a GPU may be as long as the longest stream, or have this many tokens:
# attention reads them for nothing. Chosen.
MIN_GPU_PADDED_TOKENS = 1024
NO_KV_CELLS = 1  # result of llama_decode: the KV cache is full
ABORTED = 2  # result of llama_decode: by the abort callback
# llama.cpp calls the abort callback after each operation, and ends the step if it returns true.
# Python code there would wait for the GIL each time. strlen returns 0, or false, for an empty text.
ABORT_IF_NOT_EMPTY = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)


class Llama(LlamaModel):
    """
    One GGUF model, in one file or split into `parts`, with a KV cache of `parallel` slots with
    `context` tokens each.

    `on_progress` gets the share of the file that is loaded, 0 to 1, and returns whether to go on.
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
        tensor_split: Sequence[float] = (),
        main_gpu: int | None = None,
        kv_type: KvType = "f16",
        flash_attention: FlashAttention = "auto",
    ) -> None:
        super().__init__(parts, gpu_layers, on_progress, tensor_split, main_gpu)
        self.context = self.usable_context(context)
        params = context_params(
            self._model, self.context, parallel, threads, kv_type, flash_attention
        )
        try:
            self._context = self._open_context(params)
        except ModelError:
            self.free_model()
            raise
        model = self._model
        self._is_recurrent = bool(
            llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)
        )
        # tokens of the sliding window; 0 if there is none, or if it never moves
        window = llama_cpp.llama_model_n_swa(model)
        self._window = window if window < self.context else 0
        self.is_truncatable = not self._is_recurrent and self._window == 0
        self.can_verify = self.is_truncatable
        # On a GPU more rows cost little, and the same block is faster. Padding is cut off again.
        self._always_pads = self.on_gpu and gpu_layers < 0 and self.is_truncatable
        # The cells of a sliding window are used in turn, so that a copy has them in another order,
        # in which attention adds them up.
        self.is_reuse_exact = self._window == 0
        self.state_format = _state_format(kv_type, params.flash_attn_type)
        self._adapters: dict[int, Any] = {}  # pointers, by the number of the file
        self._adapter = BASE  # active in the context
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._interruption = ctypes.create_string_buffer(2)  # not empty: end the step
        llama_cpp.llama_set_abort_callback(self._context, ABORT_IF_NOT_EMPTY, self._interruption)
        self._batch = LlamaBatch(MAX_BATCH_TOKENS)
        self._candidates = Candidates(len(self._vocabulary))
        self._parallel = parallel
        self._grouping = BatchGrouping()
        self._logits_address = 0
        self._all_logits = np.zeros((0, 0), np.float32)

    def warm_up(self) -> None:
        """
        Start the threads of OpenMP, which belong to the thread that computes: libgomp ends the
        process if it can't start one, which must not happen because of a request.
        """
        self._compute([Chunk(0, 0, [self.first_token], None)])
        self.truncate(0, 0)

    def sampler(
        self, sampling: Sampling, call: str | None = None, prompt: Sequence[int] = ()
    ) -> SamplerChain:
        constraints.check_logit_bias(sampling, self._vocabulary)
        grammar = constraints.compile_grammar(sampling, call, self._vocabulary)
        dry = self._dry(sampling, prompt)
        return SamplerChain(self._vocabulary, self._candidates, sampling, grammar, dry)

    def _dry(self, sampling: Sampling, prompt: Sequence[int]) -> Dry | None:
        if not sampling.dry_multiplier or sampling.dry_penalty_last_n == 0 or sampling.mirostat:
            return None
        return Dry(self._vocab, self._candidates, sampling, prompt, self.context)

    def decode(
        self,
        chunks: Sequence[Chunk],
        meanwhile: Callable[[], object] = lambda: None,
        padding: Sequence[Chunk] = (),
    ) -> Sequence[SampleResult | None]:
        self._activate(chunks[0].adapter)
        # grouping is learned for decode steps
        if self._always_pads or len(chunks[0].tokens) > 1:
            return self._decode(chunks, meanwhile, padding)
        began, count, batches = time.monotonic(), len(chunks), self._grouping.batches(len(chunks))
        groups = (chunks[n * count // batches : (n + 1) * count // batches] for n in range(batches))
        results = [each for group in groups for each in self._decode(group, padding=padding)]
        self._grouping.record(count, batches > 1 or bool(padding), time.monotonic() - began)
        meanwhile()
        return results

    def interrupt(self) -> None:
        if self.is_truncatable and not self.on_gpu:
            self._interruption.value = b"1"

    def max_padded_length(self, streams: int, longest: int) -> int:
        if self._always_pads:
            return max(longest, MIN_GPU_PADDED_TOKENS)
        if not self.is_truncatable or not self._grouping.is_padded(streams):
            return 0
        # attention computes whole blocks of cells, as many as the longest sequence needs
        return -(-longest // CELL_BLOCK) * CELL_BLOCK

    def verify(self, chunks: Sequence[Chunk]) -> Sequence[Iterator[SampleResult]]:
        self._activate(chunks[0].adapter)
        self._compute(chunks, is_all_output=True)
        lengths = [len(chunk.tokens) for chunk in chunks]
        rows, ends = self._logits(sum(lengths)), accumulate(lengths)
        return [
            map(_sampler(chunk).choose, rows[end - length : end])
            for chunk, length, end in zip(chunks, lengths, ends, strict=True)
        ]

    def _activate(self, adapter: int) -> None:
        """Switch the adapter. llama.cpp reserves its memory anew in the next step: milliseconds."""
        if adapter == self._adapter:
            return
        used = [] if adapter == BASE else [self._adapters[file_of(adapter)]]
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(used))(*used)
        scales = (ctypes.c_float * len(used))(*(scale_of(adapter) for _ in used))
        llama_cpp.llama_set_adapters_lora(self._context, pointers, len(used), scales)
        self._adapter = adapter

    def try_adapter(self, path: Path) -> None:
        if self.can_offload:
            return
        try:
            failure = forked.failure_of(lambda: self._failure_with(path))
        except OSError as error:  # a fork needs as much memory as the process has, if it is strict
            log.warning("adapter not tried path=%s reason=%r", path, str(error))
            return
        if failure:
            raise AdapterError(
                f"{path} can't be used with this model ({failure}). Convert it again, or remove it"
                " from adapters/."
            )

    def _failure_with(self, path: Path) -> str:
        """
        Return why a token can't be computed with an adapter, or "". Runs in a copy of the process,
        in which the context may be amid a step: it has one of its own.
        """
        try:
            adapter = _load_adapter(self._model, path)
        except AdapterError:
            return ""  # loading it says why
        params = context_params(self._model, TRIAL_TOKENS, 1, 1, "f32")
        params.n_batch = params.n_ubatch = TRIAL_TOKENS
        context = llama_cpp.llama_init_from_model(self._model, params)
        llama_cpp.llama_set_adapters_lora(
            context,
            (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter),
            1,
            (ctypes.c_float * 1)(1),
        )
        batch = LlamaBatch(1)
        batch.fill([Chunk(0, 0, [self.first_token], None)], is_all_output=True)
        if result := llama_cpp.llama_decode(context, batch.struct):
            return f"llama_decode failed with {result}"
        logits = llama_cpp.llama_get_logits(context)
        is_finite = np.isfinite(np.ctypeslib.as_array(logits, (self.vocabulary_size,))).any()
        return "" if is_finite else "the model computes NaN with it"

    def load_adapter(self, file: int, path: Path) -> None:
        self._adapters[file] = _load_adapter(self._model, path)

    def free_adapter(self, file: int) -> None:
        if file_of(self._adapter) == file:
            # llama.cpp compares pointers, and the next adapter may get this one's address
            self._activate(BASE)
        llama_cpp.llama_adapter_lora_free(self._adapters.pop(file))

    def _decode(
        self,
        chunks: Sequence[Chunk],
        meanwhile: Callable[[], object] = lambda: None,
        padding: Sequence[Chunk] = (),
    ) -> list[SampleResult | None]:
        computed = sorted((*chunks, *padding), key=lambda chunk: chunk.slot)
        # llama.cpp reuses its graph for the same number of outputs, so padding is output, too
        is_all_output = bool(padding)
        try:
            self._compute(computed, is_all_output)
        finally:
            for chunk in padding:
                self.truncate(chunk.slot, chunk.position)
        meanwhile()
        output = [chunk for chunk in computed if is_all_output or chunk.sampler is not None]
        sampled = {
            chunk.slot: _sampler(chunk).choose(logits)
            for chunk, logits in zip(output, self._logits(len(output)), strict=True)
            if chunk.sampler is not None
        }
        return [sampled.get(chunk.slot) for chunk in chunks]

    def _compute(self, chunks: Sequence[Chunk], is_all_output: bool = False) -> None:
        self._batch.fill(chunks, is_all_output)
        self._interruption.value = b""  # one that came after the end of the last step
        result = llama_cpp.llama_decode(self._context, self._batch.struct)
        if result == ABORTED:
            LOG.errors.clear()  # llama.cpp logs it as an error
            for chunk in chunks:
                self.truncate(chunk.slot, chunk.position)
            raise StepInterrupted
        if result == NO_KV_CELLS:
            raise BackendError("The model's KV cache is full. Send the request again.")
        if result != 0:
            reason = "".join(f" ({error})" for error in LOG.errors[-1:])
            raise BackendError(
                f"llama_decode failed with {result}{reason}. Send the request again."
            )

    def _logits(self, rows: int) -> npt.NDArray[np.float32]:
        """
        Return the logits [rows, n_vocab] behind the tokens of the step that are output: a view of
        llama.cpp's own memory, which the next step overwrites.
        """
        address = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.c_void_p).value
        has_moved = address != self._logits_address  # only when it grew
        if address is not None and (has_moved or rows > len(self._all_logits)):
            size = max(rows, self._parallel)
            floats = ctypes.c_float * (size * len(self._vocabulary))
            view = np.frombuffer(memoryview(floats.from_address(address)), np.float32)
            self._logits_address, self._all_logits = address, view.reshape(size, -1)
        return self._all_logits[:rows]

    def min_length(self, slot: int) -> int:
        if self._is_recurrent:
            return self.length(slot)
        if self._window == 0:
            return 0
        # the next token attends to the `_window` tokens before it, which must all be there
        first = int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))
        return first + self._window if first > 0 else 0

    def truncate(self, slot: int, length: int) -> None:
        is_kept = llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1)
        assert is_kept, "a sequence of this model can't be truncated at this length"

    def length(self, slot: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def save(self, slot: int) -> npt.NDArray[np.uint8]:
        return self._save(slot, llama_cpp.LLAMA_STATE_SEQ_FLAGS_NONE)

    def state(self, data: bytearray) -> npt.NDArray[np.uint8]:
        return np.frombuffer(data, np.uint8)

    def restore(self, slot: int, state: SequenceState) -> bool:
        self.truncate(slot, 0)  # an empty state would leave the slot as it is
        return self._restore(slot, state, llama_cpp.LLAMA_STATE_SEQ_FLAGS_NONE)

    def save_checkpoint(self, slot: int) -> npt.NDArray[np.uint8]:
        return self._save(slot, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    def rewind(self, slot: int, length: int, checkpoint: SequenceState) -> bool:
        # In this order: attention is truncated only where the recurrent part ends there already.
        if not self._restore(slot, checkpoint, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY):
            return False
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1))

    def _save(self, slot: int, flags: int) -> npt.NDArray[np.uint8]:
        size = llama_cpp.llama_state_seq_get_size_ext(self._context, slot, flags)
        # malloc would ask for huge pages (0115), which the kernel takes up to 20 ms to find
        state = np.frombuffer(mmap.mmap(-1, size, PRIVATE), np.uint8)
        data = _bytes(state)
        written = llama_cpp.llama_state_seq_get_data_ext(self._context, data, size, slot, flags)
        assert written == size, "llama.cpp wrote another size than it had announced"
        return state

    def _restore(self, slot: int, state: SequenceState, flags: int) -> bool:
        assert isinstance(state, np.ndarray)
        data, size = _bytes(state), state.nbytes
        return bool(llama_cpp.llama_state_seq_set_data_ext(self._context, data, size, slot, flags))

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        self.free_model()  # and its adapters

    def _open_context(self, params: llama_cpp.llama_context_params) -> llama_cpp.llama_context_p:
        LOG.errors.clear()
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(
                f"The KV cache for {params.n_seq_max} conversations of {self.context} tokens can't"
                f" be created ({LOG.reason}). If there is not enough memory, lower MODEL_CONTEXT or"
                " MODEL_PARALLEL, or set MODEL_KV_TYPE=q8_0."
            )
        return llama_cpp.llama_context_p(context)


def _sampler(chunk: Chunk) -> SamplerChain:
    assert isinstance(chunk.sampler, SamplerChain)
    return chunk.sampler


def _state_format(kv_type: KvType, flash_attention: int) -> str:
    """Return what the bytes of a state depend on, beside the model."""
    version = llama_cpp.__version__
    return f"llama-cpp-python {version}, KV cache {kv_type}, flash attention {flash_attention}"


def context_params(
    model: llama_cpp.llama_model_p,
    context: int,
    parallel: int,
    threads: int,
    kv_type: KvType,
    flash_attention: FlashAttention = "auto",
) -> llama_cpp.llama_context_params:
    """Return the parameters of `parallel` slots with `context` tokens each."""
    params: llama_cpp.llama_context_params = llama_cpp.llama_context_default_params()
    params.n_ctx = context * parallel
    params.n_batch = MAX_BATCH_TOKENS
    params.n_seq_max = parallel
    params.n_threads = params.n_threads_batch = threads
    # One KV cache per sequence: in a unified one, attention visits the cells of all sequences,
    # which costs up to 40 % per step (docs/decisions/0033).
    params.kv_unified = False
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.flash_attn_type = _flash_attention(flash_attention, model, kv_type, context)
    is_off = params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if is_off and not llama_cpp.llama_supports_gpu_offload():  # a GPU needs large batches
        params.n_ubatch = max(MIN_UBATCH_TOKENS, _ubatch(model, context))
    params.swa_full = False  # checkpoints give back what has left a sliding window
    params.no_perf = True
    return params


def _flash_attention(
    setting: FlashAttention, model: llama_cpp.llama_model_p, kv_type: KvType, context: int
) -> int:
    """
    Return llama.cpp's type. With `auto`, it is off on a CPU (docs/decisions/0028): it is slower
    for steps of up to 63 tokens, and larger chunks have logits that differ by up to 0.1. It is on
    where the scores of MIN_UBATCH_TOKENS tokens would need too much memory, and for a quantized KV
    cache, which llama.cpp reads only with it.
    """
    if setting != "auto":
        return FLASH_ATTENTION[setting]
    if kv_type not in UNQUANTIZED:
        return llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if llama_cpp.llama_supports_gpu_offload() or _ubatch(model, context) < MIN_UBATCH_TOKENS:
        return llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    return llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


def _ubatch(model: llama_cpp.llama_model_p, context: int) -> int:
    """
    Return how many tokens' attention scores, in float32, MAX_SCORE_BYTES hold, as a multiple of
    ROW_BLOCK.
    """
    bytes_per_token: int = 4 * llama_cpp.llama_model_n_head(model) * context
    tokens = MAX_SCORE_BYTES // max(1, bytes_per_token)
    return min(MAX_BATCH_TOKENS, tokens - tokens % ROW_BLOCK)


def _bytes(state: npt.NDArray[np.uint8]) -> ctypes.Array[ctypes.c_uint8]:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))  # type: ignore[return-value]


def _check_adapter_header(path: Path) -> None:
    """
    Check the header, and the types that llama.cpp asserts: it ends the process if one is wrong
    (`llama_adapter_lora_init_impl` in src/llama-adapter.cpp). Raises AdapterError.
    """
    try:
        header = gguf_header.read_whole(path).values
    except NotGguf as error:
        raise AdapterError(
            f"{path} is damaged or incomplete ({error}): copy it again, or remove it from"
            " adapters/."
        ) from error
    except OSError:
        return  # llama.cpp says why
    for key, kind in ADAPTER_METADATA.items():
        if not isinstance(header.get(key, kind()), kind):
            raise AdapterError(
                f"{path} is not an adapter of this model ({key} has another type). Convert it"
                " again, or remove it from adapters/."
            )


def _load_adapter(model: llama_cpp.llama_model_p, path: Path) -> Any:
    """Return the adapter's pointer, which llama_cpp annotates with a wrong type."""
    _check_adapter_header(path)
    LOG.errors.clear()
    adapter = llama_cpp.llama_adapter_lora_init(model, os.fsencode(path))
    if not adapter:
        raise AdapterError(
            f"{path} is not an adapter of this model ({LOG.reason}). Convert it with llama.cpp's"
            " convert_lora_to_gguf.py and this base model, or remove it from adapters/."
        )
    if llama_cpp.llama_adapter_get_alora_n_invocation_tokens(adapter):
        llama_cpp.llama_adapter_lora_free(adapter)
        raise AdapterError(
            f"{path} is an activated LoRA (aLoRA), which applies to a part of a prompt only. This"
            " is not supported: train a plain LoRA, or remove it from adapters/."
        )
    return adapter

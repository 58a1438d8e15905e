"""
Tries a model in a child process, without its weights: in a second, and in little memory.

llama.cpp aborts the process for some invalid files. Here that ends the child, and the worker gets
a sentence. A trial also says how much memory contexts of several sizes need, for every
architecture, since llama.cpp itself plans and logs it (as its `--fit` does, in common/fit.cpp).
"""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from signal import ITIMER_PROF, SIGINT, SIGKILL, SIGPROF, SIGTERM, Signals, setitimer

import llama_cpp
import msgspec

from services.inference.engine.backend import FlashAttention, KvType
from services.inference.engine.child_path import child_path
from services.inference.engine.forked import reason_of_abort
from services.inference.engine.ggml import load_backends
from services.inference.engine.llama import context_params
from services.inference.engine.llama_embedder import embedding_params
from services.inference.engine.llama_model import (
    ModelError,
    model_params,
    open_model,
    read_pieces,
    tokenize,
)

AUTO_CONTEXTS = (2048, 4096, 8192, 16384, 32768)  # tokens
MIN_CONTEXT = 64
MAX_TOKENIZER_SECONDS = 5  # of CPU time; a vocabulary of 262,144 tokens takes 0.3
MIB = 2**20
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_CACHE = re.compile(r"(?<!buffer )size = +([\d.]+) MiB")
_BUFFER = re.compile(r": +(\S+) +(?:compute|output) buffer size = +([\d.]+) MiB")
_HOST_BUFFER = re.compile(r"CPU.*|.*_Host")
_FROM_OUTSIDE = (SIGINT, SIGKILL, SIGTERM)  # the kernel sends SIGKILL when memory is short
# Characters whose UTF-8 has all bytes that can be in it.
_ALL_BYTES = "".join(
    map(
        chr,
        [
            *range(2**11),
            *range(2**11, 0xD800, 2**11),
            *range(0xE000, 2**16, 2**11),
            *range(2**16, 17 * 2**16, 2**15),
        ],
    )
).encode()


class TrialRequest(msgspec.Struct, frozen=True, kw_only=True):
    files: tuple[str, ...]
    context: int | None  # None: AUTO_CONTEXTS
    parallel: int
    threads: int
    gpu_layers: int
    tensor_split: tuple[float, ...]
    main_gpu: int | None
    kv_type: KvType
    flash_attention: FlashAttention
    is_embedding: bool = False


class ContextNeed(msgspec.Struct, frozen=True):
    """Bytes that a context of `tokens` per slot needs: its KV cache, and buffers beside it."""

    tokens: int
    cache: int
    host: int
    gpu: int


class Trial(msgspec.Struct, frozen=True, tag=True):
    """`needs` has one context or more, in ascending order."""

    trained: int  # tokens of the longest context in training
    layers: int
    needs: tuple[ContextNeed, ...]


class Refusal(msgspec.Struct, frozen=True, tag=True):
    reason: str


def run(request: TrialRequest) -> Trial:
    """Try the model. Raises ModelError, or RuntimeError for a bug in the child."""
    child = subprocess.run(
        [sys.executable, "-m", "services.inference.engine.trial"],
        input=msgspec.json.encode(request),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": child_path(), "GGML_NO_BACKTRACE": "1"},
    )
    errors = child.stderr.decode(errors="replace")
    if -child.returncode in _FROM_OUTSIDE:
        raise ModelError(
            f"The trial of {request.files[0]} was killed by {Signals(-child.returncode).name}. If"
            " the machine or the container ran out of memory, give it more. Then restart."
        )
    if child.returncode == -SIGPROF:
        raise ModelError(
            f"{request.files[0]} is damaged, or llama.cpp does not support it: its tokenizer runs"
            " without end. Download or convert the file again."
        )
    if child.returncode < 0:  # another signal
        raise ModelError(
            f"{request.files[0]} is damaged, or llama.cpp does not support it: it aborted"
            f" ({reason_of_abort(errors)}). Download or convert the file again."
        )
    if child.returncode:
        raise RuntimeError(f"the trial of a model failed: {errors}")
    result = msgspec.json.decode(child.stdout.splitlines()[-1], type=Trial | Refusal)
    if isinstance(result, Refusal):
        raise ModelError(f"{request.files[0]} can't be loaded: {result.reason}")
    return result


# --- in the child ---------------------------------------------------------------------------------


class _Log:
    """Everything that llama.cpp logs."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._callback = llama_cpp.llama_log_callback(self._on_message)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    @property
    def reason(self) -> str:
        return self.errors[0] if self.errors else "no reason given"

    def _on_message(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        self.lines.append(text.decode(errors="replace").strip())
        if level == _ERROR:
            self.errors.append(self.lines[-1])


def _try(request: TrialRequest) -> Trial | Refusal:
    load_backends()
    log = _Log()
    llama_cpp.llama_backend_init()
    params = model_params(request.gpu_layers, request.tensor_split, request.main_gpu)
    params.no_alloc = True
    model = open_model([Path(file) for file in request.files], params)
    if not model:
        return Refusal(f"{log.reason}. Check that the file is complete.")
    setitimer(ITIMER_PROF, MAX_TOKENIZER_SECONDS)  # SIGPROF ends the process
    why_not = _try_vocabulary(model)
    setitimer(ITIMER_PROF, 0)
    if why_not:
        return Refusal(f"{why_not}. Convert it again.")
    trained = llama_cpp.llama_model_n_ctx_train(model)
    if trained < MIN_CONTEXT:
        return Refusal(f"its context length of {trained} tokens is invalid. Convert it again.")
    wanted = AUTO_CONTEXTS if request.context is None else (request.context,)
    needs = []
    for tokens in sorted({min(tokens, trained) for tokens in wanted}):
        sizes = _sizes(model, tokens, request)
        log.lines.clear()
        context = llama_cpp.llama_init_from_model(model, sizes)
        if not context:
            return Refusal(f"{log.reason}. Other settings may work, such as MODEL_KV_TYPE.")
        needs.append(_need(tokens, log.lines))
        has_cache = llama_cpp.llama_get_memory(context) is not None
        assert bool(needs[-1].cache) == has_cache, "llama.cpp logs the size of each cache"
        llama_cpp.llama_free(context)
    return Trial(trained, llama_cpp.llama_model_n_layer(model), tuple(needs))


def _try_vocabulary(model: llama_cpp.llama_model_p) -> str | None:
    """
    Return why the tokenizer can't be used. llama.cpp aborts for bytes that a vocabulary lacks, and
    for tokens that it can't read, when they are used.
    """
    vocab = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return "it has no tokenizer"
    pieces = read_pieces(vocab)
    for special in (True, False):
        tokens = tokenize(vocab, _ALL_BYTES, special, add_special=True)
        if outside := [token for token in tokens if not 0 <= token < len(pieces)]:
            return f"its tokenizer gives the token {outside[0]}, and the last is {len(pieces) - 1}"
    return None


def _sizes(
    model: llama_cpp.llama_model_p, tokens: int, request: TrialRequest
) -> llama_cpp.llama_context_params:
    if request.is_embedding:
        return embedding_params(model, tokens, request.threads)
    return context_params(
        model,
        tokens,
        request.parallel,
        request.threads,
        request.kv_type,
        request.flash_attention,
    )


def _need(tokens: int, lines: Sequence[str]) -> ContextNeed:
    """Add up the sizes that llama.cpp logs while it creates a context without its memory."""
    caches = [float(found[1]) for line in lines if (found := _CACHE.search(line))]
    host, gpu = (sum(_buffers(lines, is_host)) for is_host in (True, False))
    return ContextNeed(tokens, *(int(size * MIB) for size in (sum(caches), host, gpu)))


def _buffers(lines: Sequence[str], is_host: bool) -> Iterator[float]:
    for line in lines:
        if (found := _BUFFER.search(line)) and bool(_HOST_BUFFER.fullmatch(found[1])) is is_host:
            yield float(found[2])


if __name__ == "__main__":
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=TrialRequest)
    print(msgspec.json.encode(_try(asked)).decode())

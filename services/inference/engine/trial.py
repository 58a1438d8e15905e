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
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import llama_cpp
import msgspec

from services.inference.engine.backend import KvType
from services.inference.engine.llama import context_params
from services.inference.engine.llama_embedder import embedding_params
from services.inference.engine.llama_model import ModelError, model_params, open_model

AUTO_CONTEXTS = (2048, 4096, 8192, 16384, 32768)  # tokens
MIN_CONTEXT = 64
PROJECT = Path(__file__).parents[3]
MIB = 2**20
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_CACHE = re.compile(r"(?<!buffer )size = +([\d.]+) MiB")
_BUFFER = re.compile(r": +(\S+) +(?:compute|output) buffer size = +([\d.]+) MiB")
_HOST_BUFFER = re.compile(r"CPU.*|.*_Host")
_FROM_OUTSIDE = (SIGINT, SIGKILL, SIGTERM)  # the kernel sends SIGKILL when memory is short
_ABORT = re.compile(r"GGML_ASSERT.*|GGML_ABORT.*|.*terminate called.*")


class TrialRequest(msgspec.Struct, frozen=True, kw_only=True):
    files: tuple[str, ...]
    context: int | None  # None: AUTO_CONTEXTS
    parallel: int
    threads: int
    gpu_layers: int
    tensor_split: tuple[float, ...]
    main_gpu: int | None
    kv_type: KvType
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
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-m", "services.inference.engine.trial"],
        input=msgspec.json.encode(request),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"},
    )
    errors = child.stderr.decode(errors="replace")
    if -child.returncode in _FROM_OUTSIDE:
        raise ModelError(
            f"The trial of {request.files[0]} was killed by {Signals(-child.returncode).name}. If"
            " the machine or the container ran out of memory, give it more. Then restart."
        )
    if child.returncode < 0:  # a signal
        raise ModelError(
            f"{request.files[0]} is damaged, or llama.cpp does not support it: it aborted"
            f" ({_reason_of_abort(errors)}). Download or convert the file again."
        )
    if child.returncode:
        raise RuntimeError(f"the trial of a model failed: {errors}")
    result = msgspec.json.decode(child.stdout.splitlines()[-1], type=Trial | Refusal)
    if isinstance(result, Refusal):
        raise ModelError(f"{request.files[0]} can't be loaded: {result.reason}")
    return result


def _reason_of_abort(errors: str) -> str:
    found = _ABORT.search(errors)
    return found[0] if found else "no reason given"


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
    log = _Log()
    llama_cpp.llama_backend_init()
    params = model_params(request.gpu_layers, request.tensor_split, request.main_gpu)
    params.no_alloc = True
    model = open_model([Path(file) for file in request.files], params)
    if not model:
        return Refusal(f"{log.reason}. Check that the file is complete.")
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


def _sizes(
    model: llama_cpp.llama_model_p, tokens: int, request: TrialRequest
) -> llama_cpp.llama_context_params:
    if request.is_embedding:
        return embedding_params(model, tokens, request.threads)
    return context_params(model, tokens, request.parallel, request.threads, request.kv_type)


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

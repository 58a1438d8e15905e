"""
Plans the memory: chooses the longest context window of the model that fits, and bounds the host KV
cache by what is left.
"""

import logging
from typing import NamedTuple

from services.inference.engine.memory import Memory
from services.inference.engine.trial import AUTO_CONTEXTS, ContextNeed, Trial

log = logging.getLogger(__name__)

HOST_SHARE = 0.25  # of the free memory; other workers will start, and other programs grow
GPU_SHARE = 0.8  # of the free GPU memory, which a worker needs not share
MIB = 2**20
REST = 300 * MIB  # of a worker beside weights, context and host KV cache (docs/sizing.md)
MIN_HOST_CACHE = 256 * MIB  # also where memory is short: recurrent models need their checkpoints


class ModelMemory(NamedTuple):
    """
    Bytes that are free once the weights are loaded, where `gpu_share` of the layers is on GPUs with
    memory of their own, and the host KV cache takes `host_cache`.
    """

    free: Memory
    gpu_share: float
    host_cache: int

    def need(self, context: ContextNeed) -> Memory:
        """Return the bytes of a context here and there."""
        host = (1 - self.gpu_share) * (context.cache + context.host)
        gpu = self.gpu_share * context.cache + context.gpu
        return Memory(int(host), int(gpu)) if self.gpu_share else Memory(int(host + gpu), 0)

    @property
    def budget(self) -> Memory:
        """Return the bytes that a context may take, so that the machine does not swap."""
        host = min(HOST_SHARE * self.free.host, self.free.host - self.host_cache)
        return Memory(int(host), int(GPU_SHARE * self.free.gpu))


def model_memory(
    memory: Memory, weights: int, host_cache: int, gpu_layers: int, trial: Trial
) -> ModelMemory:
    """Return the memory beside a model of `weights` bytes, of which `memory` is free before."""
    share = _gpu_share(gpu_layers, trial.layers) if memory.gpu else 0.0
    on_gpu = int(share * weights)
    free = Memory(max(0, memory.host - weights + on_gpu), max(0, memory.gpu - on_gpu))
    return ModelMemory(free, share, host_cache)


def choose(trial: Trial, memory: ModelMemory) -> int:
    """Return the tokens per slot of the largest context within the budget, else the smallest."""
    fitting = [each for each in trial.needs if _fits(memory.need(each), memory.budget)]
    chosen = (fitting or trial.needs[:1])[-1]
    if chosen.tokens == trial.trained:
        reason = "model"
    else:
        reason = "maximum" if chosen.tokens == AUTO_CONTEXTS[-1] else "memory"
    log.info("context chosen tokens=%d limit=%s %s", chosen.tokens, reason, _words(chosen, memory))
    return chosen.tokens


def warn_of_shortage(trial: Trial, tokens: int, memory: ModelMemory) -> None:
    """Log a warning if a context of this size needs more memory than there is."""
    context = _need(trial, tokens)
    if not _fits(memory.need(context), memory.free):
        log.warning(
            "context may not fit the memory tokens=%d %s: lower MODEL_CONTEXT or MODEL_PARALLEL,"
            " or set MODEL_KV_TYPE=q8_0",
            tokens,
            _words(context, memory),
        )


def bound_host_cache(trial: Trial, tokens: int, memory: ModelMemory) -> int:
    """
    Return the bytes that the host KV cache may take beside a context of this size. It fills up over
    hours, and would then exceed the limit of a container.
    """
    room = memory.free.host - memory.need(_need(trial, tokens)).host - REST
    bound = min(memory.host_cache, max(room, MIN_HOST_CACHE))
    if bound < memory.host_cache:
        log.info(
            "host KV cache bounded by memory mib=%d setting_mib=%d",
            bound // MIB,
            memory.host_cache // MIB,
        )
    return bound


def _need(trial: Trial, tokens: int) -> ContextNeed:
    (context,) = (each for each in trial.needs if each.tokens == min(tokens, trial.trained))
    return context


def _gpu_share(gpu_layers: int, layers: int) -> float:
    """llama.cpp offloads the output layer first, which has no KV cache."""
    return 1.0 if gpu_layers < 0 else min(1.0, max(0, gpu_layers - 1) / layers)


def _fits(need: Memory, room: Memory) -> bool:
    return need.host <= max(0, room.host) and need.gpu <= room.gpu


def _words(context: ContextNeed, memory: ModelMemory) -> str:
    sizes = {"need": memory.need(context), "budget": memory.budget, "free": memory.free}
    places = ("host", "gpu") if memory.free.gpu else ("host",)
    return " ".join(
        f"{place}_{name}_mib={max(0, getattr(size, place)) // MIB}"
        for place in places
        for name, size in sizes.items()
    )

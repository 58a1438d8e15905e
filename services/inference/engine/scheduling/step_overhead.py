"""
Measures the step overhead: what a step costs regardless of its tokens. On a GPU it exceeds the
prefill of a short question by far.
"""

import logging
import time
from collections.abc import Callable

from services.inference.engine.backend import MAX_BATCH_TOKENS, Backend, BackendError, Chunk

PROMPT_TOKENS = 32
MAX_PROMPTS = 4
SAMPLES = 4  # the fastest one counts; the first one also compiles or loads GPU kernels

log = logging.getLogger(__name__)


def measure_step_overhead(
    backend: Backend, slots: int, clock: Callable[[], float] = time.monotonic
) -> int:
    """
    Compare steps that prefill one prompt and several. Return the overhead as the number of prompt
    tokens whose prefill takes as long, at most MAX_BATCH_TOKENS; 0 if there is one slot only, the
    model can't truncate a sequence, or a step fails. Slots must be empty, and are empty afterwards.
    """
    prompts = min(slots, MAX_PROMPTS)

    def seconds(count: int) -> float:
        _clear(backend, prompts)
        began = clock()
        _prefill(backend, count)
        return clock() - began

    try:
        if prompts < 2 or not _can_truncate(backend):
            return 0
        samples = [(seconds(1), seconds(prompts)) for _ in range(SAMPLES)]
    except BackendError as error:
        log.warning("step overhead not measured error=%s", error)
        return 0
    finally:
        _clear(backend, prompts)
    one, several = (min(times) for times in zip(*samples, strict=True))
    prompt = (several - one) / (prompts - 1)
    tokens = PROMPT_TOKENS * (one - prompt) / prompt if prompt > 0 else MAX_BATCH_TOKENS
    overhead = min(MAX_BATCH_TOKENS, max(0, round(tokens)))
    log.info("step overhead measured tokens=%d", overhead)
    return overhead


def _can_truncate(backend: Backend) -> bool:
    _prefill(backend, 1)
    return backend.min_length(0) <= PROMPT_TOKENS // 2


def _prefill(backend: Backend, prompts: int) -> None:
    """
    Prefill this number of prompts. They differ: equal ones would all use the same experts of an MoE
    model, and look too fast.
    """
    first = backend.vocabulary_size // 2
    starts = [first + slot * PROMPT_TOKENS for slot in range(prompts)]
    tokens = (range(start, start + PROMPT_TOKENS) for start in starts)
    backend.decode([Chunk(slot, 0, each, None) for slot, each in enumerate(tokens)])


def _clear(backend: Backend, slots: int) -> None:
    for slot in range(slots):
        backend.truncate(slot, 0)

"""
What a step costs however little is computed in it: on a GPU far more than the tokens of a question.
"""

import logging
import time

from services.inference.engine.backend import Backend, BackendError, Chunk
from services.inference.engine.scheduling.prefill_budget import CHUNK_MAX

PROMPT = 32  # tokens
MOST = 4  # prompts
TRIES = 4  # of which the fastest counts; the first one also loads the GPU's programs

log = logging.getLogger(__name__)


def fixed_cost(backend: Backend, slots: int) -> int:
    """
    In tokens of a prompt that take as long to read, at most CHUNK_MAX: by the times of one prompt
    and of several in one step. 0 if there is one slot only, or what it holds can't be cut. The
    slots are empty before and after.
    """
    prompts = min(slots, MOST)
    try:
        if prompts < 2 or not _can_be_cut(backend):
            return 0
        tries = [(_seconds(backend, 1), _seconds(backend, prompts)) for _ in range(TRIES)]
    except BackendError as error:
        log.warning("what a step costs could not be measured: %s", error)
        return 0
    finally:
        _empty(backend, prompts)
    one, several = (min(times) for times in zip(*tries, strict=True))
    prompt = (several - one) / (prompts - 1)
    tokens = PROMPT * (one - prompt) / prompt if prompt > 0 else CHUNK_MAX
    cost = min(CHUNK_MAX, max(0, round(tokens)))
    log.info("a step costs as much as %d tokens of a prompt", cost)
    return cost


def _can_be_cut(backend: Backend) -> bool:
    _seconds(backend, 1)
    return backend.cut(0, PROMPT // 2)


def _seconds(backend: Backend, prompts: int) -> float:
    """
    That a step takes which reads so many prompts. They differ: a mixture of experts would read
    equal ones faster.
    """
    _empty(backend, prompts)
    middle = backend.vocabulary_size // 2
    chunks = [
        Chunk(slot, 0, range(middle + slot * PROMPT, middle + (slot + 1) * PROMPT), None)
        for slot in range(prompts)
    ]
    began = time.monotonic()
    backend.decode(chunks)
    return time.monotonic() - began


def _empty(backend: Backend, slots: int) -> None:
    for slot in range(slots):
        backend.cut(slot, 0)

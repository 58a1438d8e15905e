"""
What a step costs however little is computed in it: on a GPU far more than the tokens of a question.
"""

import time

from services.inference.engine.backend import Backend, BackendError, Chunk

PROMPT = 32  # tokens
TRIES = 4  # of which the fastest counts; the first one also loads the GPU's programs
MOST = 512  # tokens


def fixed_cost(backend: Backend) -> int:
    """
    In tokens of a prompt that take as long to read, by reading one prompt, and two at once: f + n
    and f + 2 n. 0 if the backend has one slot only, or can't cut what it holds. Leaves it empty.
    """
    try:
        one, two = (min(_seconds(backend, slots) for _ in range(TRIES)) for slots in (1, 2))
    except BackendError:
        return 0
    return min(MOST, max(0, round(PROMPT * (2 * one - two) / max(two - one, one / MOST))))


def _seconds(backend: Backend, slots: int) -> float:
    """Raises BackendError."""
    began = time.monotonic()
    backend.decode([Chunk(slot, 0, range(PROMPT), None) for slot in range(slots)])
    seconds = time.monotonic() - began
    were_cut = [backend.cut(slot, PROMPT // 2) and backend.cut(slot, 0) for slot in range(slots)]
    if not all(were_cut):
        raise BackendError("This kind of model can't keep a part of a sequence.")
    return seconds

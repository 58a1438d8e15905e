"""Tries a loaded model by one step, before any request does (`forked.py`)."""

import logging

import numpy as np

from services.contract.messages import Sampling
from services.inference.engine import forked
from services.inference.engine.backend import BackendError, Chunk, ComputeFailure
from services.inference.engine.llama import Llama
from services.inference.engine.llama_embedder import LlamaEmbedder
from services.inference.engine.llama_model import ModelError

log = logging.getLogger(__name__)


def run(model: Llama | LlamaEmbedder, name: str) -> None:
    """
    Compute a token. Raises ModelError, which calls the model `name`, if that fails or gives NaN.
    Nothing is tried where llama.cpp uses a GPU.
    """
    if model.can_offload:
        return
    try:
        failure = forked.failure_of(lambda: _step(model))
    except OSError as error:  # a fork needs as much memory as the process has, if that is strict
        log.warning("model not tried by a step reason=%r", str(error))
        return
    if failure:
        raise ModelError(
            f"{name} is damaged, or llama.cpp does not support it: its first step failed"
            f" ({failure}). Download or convert the file again."
        )


def _step(model: Llama | LlamaEmbedder) -> str:
    """Return why the step failed, or ""."""
    model.use_one_thread()
    token = model.first_token
    try:
        if isinstance(model, LlamaEmbedder):
            return "" if np.isfinite(model.embed([[token]])).all() else "it computes NaN"
        sampler = model.sampler(Sampling(temperature=0.0))
        (result,) = model.decode([Chunk(0, 0, [token], sampler)])
    except BackendError as error:
        return str(error)
    return result.message if isinstance(result, ComputeFailure) else ""

"""What an answer begins from: made of its session, or told by who resumes it."""

import secrets

import numpy as np

from services.contract.history import Context
from services.contract.messages import ChatRequest, Origin
from services.inference.calls import Call
from services.inference.engine.template import Prompt

MOST_TOLD = 2**16  # tokens of a prompt that a Started tells: a third of what NATS takes


def seed(request: ChatRequest) -> int:
    """Drawn here if the request leaves it out, since another worker may have to go on with it."""
    if request.resume:
        return request.resume.origin.seed
    return secrets.randbelow(2**32 - 1) if request.seed is None else request.seed


def of(call: Call, model: str, context: Context, prompt: Prompt) -> Origin:
    """`model` is a digest."""
    assert call.sampling.seed is not None
    return Origin(
        model=model,
        prompt=np.array(prompt.tokens, "<i4").tobytes(),
        exchanges_kept=prompt.kept,
        exchanges_dropped=prompt.dropped,
        seed=call.sampling.seed,
        asked_at=call.asked_at,
        epoch=context.epoch,
        applied_seq=context.applied_seq,
    )


def told(origin: Origin) -> Origin | None:
    """None if it is too long for a message."""
    return origin if len(origin.prompt) <= MOST_TOLD * 4 else None


def prompt(origin: Origin) -> list[int]:
    """Its tokens."""
    tokens: list[int] = np.frombuffer(origin.prompt, "<i4").tolist()
    return tokens

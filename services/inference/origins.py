"""What an answer begins from: made of its session, or told by who resumes it."""

import secrets

import numpy as np

from services.contract.errors import ServiceError
from services.contract.history import Context
from services.contract.messages import ChatRequest, Resume, ResumeState
from services.inference.calls import InFlightRequest
from services.inference.engine.output.resume import check_token_ids
from services.inference.engine.prompt.chat_template import RenderedPrompt
from services.inference.models import LoadedModel

MOST_TOLD = 2**16  # tokens of a prompt that a Started tells: a third of what NATS takes


def seed(request: ChatRequest) -> int:
    """Drawn here if the request leaves it out, since another worker may have to go on with it."""
    if request.resume:
        return request.resume.state.seed
    return secrets.randbelow(2**32 - 1) if request.seed is None else request.seed


def begun(
    call: InFlightRequest, model: LoadedModel, context: Context, prompt: RenderedPrompt
) -> ResumeState:
    assert call.sampling.seed is not None
    return ResumeState(
        model=model.info.digest,
        prompt=np.array(prompt.tokens, "<i4").tobytes(),
        exchanges_kept=prompt.kept,
        exchanges_dropped=prompt.dropped,
        seed=call.sampling.seed,
        asked_at=call.asked_at,
        epoch=context.epoch,
        applied_seq=context.applied_seq,
        adapter=_adapter(call, model),
    )


def told(origin: ResumeState) -> ResumeState | None:
    """None if it is too long for a message."""
    return origin if len(origin.prompt) <= MOST_TOLD * 4 else None


def prompt(origin: ResumeState) -> list[int]:
    """Its tokens."""
    tokens: list[int] = np.frombuffer(origin.prompt, "<i4").tolist()
    return tokens


def check(resume: Resume, call: InFlightRequest, model: LoadedModel) -> None:
    """
    Whether what others began can go on here. Raises ServiceError(model_not_found, invalid_request
    or context_length_exceeded).
    """
    origin = resume.state
    if (origin.model, origin.adapter) != (model.info.digest, _adapter(call, model)):
        raise ServiceError(
            "model_not_found",
            "The answer was begun by another model than this one: ask again.",
        )
    if not origin.prompt or len(origin.prompt) % 4:
        raise ServiceError("invalid_request", "The field `resume` has no whole tokens as `prompt`.")
    tokens = prompt(origin)
    check_token_ids(tokens, model.backend)
    if len(tokens) + max(1, len(resume.token_ids)) > model.backend.context:
        raise ServiceError(
            "context_length_exceeded",
            "The answer was begun in a larger context window than this worker's"
            f" {model.backend.context} tokens: give all workers the same MODEL_CONTEXT.",
        )


def _adapter(call: InFlightRequest, model: LoadedModel) -> str:
    """The digest that stands for it."""
    return model.served[call.adapter].digest if call.adapter else ""

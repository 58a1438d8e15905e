"""
An answer that was begun elsewhere: its tokens are said again without being computed, so that all
that depends on them (draws, penalties, grammar, stop strings, loops) is as it was after the last.
"""

from collections.abc import Sequence

from services.contract.errors import ServiceError
from services.contract.messages import Resume, Sampling
from services.inference.engine.backend import Backend, ConstraintFailure, Sampler
from services.inference.engine.output.answer import GeneratedText
from services.inference.engine.output.detokenizer import Detokenizer
from services.inference.engine.output.stops import StopRules


def resumed_answer(
    resume: Resume,
    sampling: Sampling,
    sampler: Sampler,
    backend: Backend,
    stops: StopRules | None = None,
) -> GeneratedText:
    """
    `sampler` is a new one, and then as it was there; it is closed where this raises
    ServiceError(invalid_request). May take a second, for a grammar.
    """
    try:
        check_resumable(resume.token_ids, backend)
        if not _text(resume.token_ids, backend).startswith(resume.text):
            raise _refusal("its text is not what its ids say")
        return _say_again(resume, GeneratedText(sampling, stops), sampler, backend)
    except ServiceError:
        sampler.close()
        raise


def check_resumable(tokens: Sequence[int], backend: Backend) -> None:
    """Whether the model has them all. Raises ServiceError(invalid_request)."""
    if not all(0 <= token < backend.vocabulary_size for token in tokens):
        raise _refusal("one of its tokens is none of the model's")


def _say_again(
    resume: Resume, answer: GeneratedText, sampler: Sampler, backend: Backend
) -> GeneratedText:
    for token in resume.token_ids:
        chosen = sampler.accept(token)
        if isinstance(chosen, ConstraintFailure):
            raise _refusal(chosen.message)
        answer.push(chosen, backend.piece(token), backend.is_end(token))
        if answer.reason:
            break
    answer.was_sent(len(resume.text))
    return answer


def _text(ids: Sequence[int], backend: Backend) -> str:
    detokenizer = Detokenizer()
    return "".join(detokenizer.push(backend.piece(token)) for token in ids)


def _refusal(why: str) -> ServiceError:
    return ServiceError("invalid_request", f"The answer can't be resumed: {why}.")

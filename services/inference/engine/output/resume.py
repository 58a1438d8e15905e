"""
Resumes an answer that another worker began. Its tokens are replayed through the sampler and the
stop rules, and then prefilled in one pass: random draws, penalties, grammar, stop strings and the
loop guard end up in the state that they had after the last token.
"""

import codecs
from collections.abc import Sequence

from services.contract.errors import ServiceError
from services.contract.messages import Resume
from services.inference.engine.backend import Backend, ConstraintFailure, Sampler
from services.inference.engine.output.generated_text import GeneratedText


def restore_answer(
    answer: GeneratedText, resume: Resume, sampler: Sampler, backend: Backend
) -> None:
    """
    Advance the new `answer` and its `sampler` by the tokens of `resume`. Closes the sampler and
    raises ServiceError(invalid_request) if they can't be tokens of this answer. May take a second
    with a grammar.
    """
    try:
        check_token_ids(resume.token_ids, backend)
        if not _decode(resume.token_ids, backend).startswith(resume.text):
            raise _refusal("the tokens do not decode to the text")
        _replay(answer, resume, sampler, backend)
    except ServiceError:
        sampler.close()
        raise


def check_token_ids(tokens: Sequence[int], backend: Backend) -> None:
    """Raise ServiceError(invalid_request) if a token is not in the model's vocabulary."""
    if not all(0 <= token < backend.vocabulary_size for token in tokens):
        raise _refusal("a token is not in the model's vocabulary")


def _replay(answer: GeneratedText, resume: Resume, sampler: Sampler, backend: Backend) -> None:
    for token in resume.token_ids:
        chosen = sampler.accept(token)
        if isinstance(chosen, ConstraintFailure):
            raise _refusal(chosen.message)
        answer.push(chosen, backend.piece(token), backend.is_end(token))
        if answer.finish_reason:
            break
    answer.skip_sent(len(resume.text))


def _decode(tokens: Sequence[int], backend: Backend) -> str:
    """Return the text without an incomplete character at the end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(b"".join(map(backend.piece, tokens)))


def _refusal(reason: str) -> ServiceError:
    return ServiceError("invalid_request", f"The answer can't be resumed: {reason}.")

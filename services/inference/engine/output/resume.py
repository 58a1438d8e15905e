"""
Resumes an answer that another worker began. Its tokens are replayed through the sampler, the parser
and the stop rules, and then prefilled in one pass: random draws, penalties, grammar, channel, stop
strings and the loop guard end up in the state that they had after the last token. Mirostat's state
depends on logits, so the events have it.
"""

from collections.abc import Iterator, Sequence

from services.contract.answer import merge, mirostat_mu
from services.contract.errors import ServiceError
from services.contract.messages import Resume, Token, ToolCallDelta
from services.inference.engine.backend import Backend, ConstraintFailure, Sampler
from services.inference.engine.output.generated_answer import GeneratedAnswer
from services.inference.engine.output.parts import (
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    ReasoningDelta,
)


def restore_answer(
    answer: GeneratedAnswer, resume: Resume, sampler: Sampler, backend: Backend
) -> None:
    """
    Advance the new `answer` and its `sampler` by the events of `resume`. Closes the sampler and
    raises ServiceError(invalid_request) if they can't be events of this answer. May take a second
    with a grammar.
    """
    try:
        tokens = token_ids(resume)
        check_token_ids(tokens, backend)
        _replay(answer, tokens, sampler, backend)
        if (mu := mirostat_mu(resume.events)) is not None:
            sampler.restore(mu)
        if not answer.skip_sent(list(_parts(resume))):
            raise _refusal("the tokens do not spell the answer")
    except ServiceError:
        sampler.close()
        raise


def token_ids(resume: Resume) -> list[int]:
    return [token for event in resume.events for token in event.token_ids]


def check_token_ids(tokens: Sequence[int], backend: Backend) -> None:
    """Raise ServiceError(invalid_request) if a token is not in the model's vocabulary."""
    if not all(0 <= token < backend.vocabulary_size for token in tokens):
        raise _refusal("a token is not in the model's vocabulary")


def _replay(
    answer: GeneratedAnswer, tokens: Sequence[int], sampler: Sampler, backend: Backend
) -> None:
    for token in tokens:
        sampler.force(answer.take_forced())
        chosen = sampler.accept(token)
        if isinstance(chosen, ConstraintFailure):
            raise _refusal(chosen.message)
        answer.push(chosen, backend.piece(token), backend.is_end(token))
        if answer.finish_reason:
            break


def _parts(resume: Resume) -> Iterator[AnswerPart]:
    """Yield the parts of the events, merged like those of GeneratedAnswer."""
    for event in merge(resume.events):
        match event:
            case Token(channel="content", text=text):
                yield ContentDelta(text)
            case Token(text=text):
                yield ReasoningDelta(text)
            case ToolCallDelta(name=name, arguments=arguments):
                yield CallStart(name)
                if arguments:
                    yield ArgumentsDelta(arguments)


def _refusal(reason: str) -> ServiceError:
    return ServiceError("invalid_request", f"The answer can't be resumed: {reason}.")

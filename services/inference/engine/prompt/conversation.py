"""A conversation as a template is shown it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from services.contract.messages import Turn
from services.inference.engine.prompt.tools import Json

# request id to the answer's tokens, without the end's; in a conversation its text to them
KnownAnswers = Mapping[str, Sequence[int]]


class TemplateMessage(NamedTuple):
    role: str
    content: str
    tokens: Sequence[int] = ()  # of an answer, where they are known
    more: Mapping[str, Any] = MappingProxyType({})  # that the template may show: calls, a name


class TemplateConversation(NamedTuple):
    """
    A conversation, and the functions that the template is to show. Marks in the functions and calls
    stand for the `hidden` texts: somebody wrote them, and they name markers.
    """

    messages: list[TemplateMessage]
    tools: Sequence[Json] = ()
    hidden: Sequence[str] = ()


def of_session(
    system: str, turns: Sequence[Turn], question: str, answers: KnownAnswers
) -> list[TemplateMessage]:
    messages = [TemplateMessage("system", system)] if system else []
    for turn in turns:
        messages.append(TemplateMessage("user", turn.prompt))
        messages.append(
            TemplateMessage("assistant", turn.response, answers.get(turn.request_id, ()))
        )
    return [*messages, TemplateMessage("user", question)]


def merge_system(messages: list[TemplateMessage]) -> list[TemplateMessage]:
    """For a model without a system role: its text stands before the first user message."""
    if messages[0].role != "system":
        return messages
    if len(messages) == 1:
        return [messages[0]._replace(role="user")]
    system, first, *rest = messages
    return [first._replace(content=f"{system.content}\n\n{first.content}"), *rest]

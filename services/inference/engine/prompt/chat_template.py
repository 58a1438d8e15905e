"""Prompts of one model: sessions, conversations and raw text to tokens."""

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from types import MappingProxyType
from typing import Any, NamedTuple

from services.contract import prompts
from services.contract.conversation import ChatMessage, Tool
from services.contract.errors import ServiceError
from services.contract.messages import Channel, ChatRequest, Turn
from services.inference.engine.backend import Backend
from services.inference.engine.output.parts import AnswerParser, PlainParser
from services.inference.engine.prompt import window
from services.inference.engine.prompt.assembler import PromptAssembler, TemplateMessage
from services.inference.engine.prompt.template_renderer import TemplateRenderer, with_prefix
from services.inference.engine.prompt.tokenizer import Tokenizer
from services.inference.engine.prompt.tools import ToolPrompt

# Tokens of earlier answers, without the end token: by request id for a session, else by text.
KnownAnswers = Mapping[str, Sequence[int]]

NO_ANSWERS: KnownAnswers = MappingProxyType({})
# Texts without a common prefix, so that the common prefix of their prompts is the template's own.
_PROBES = ("a", "B", "1", ".", " a", "\na", "\u00e9", "\u4e2d")


class RenderedPrompt(NamedTuple):
    """The tokens of a prompt, and how many exchanges of its session it has and lacks."""

    tokens: list[int]
    kept: int = 0
    dropped: int = 0
    channel: Channel = "content"


class RawPrompts:
    """Prompts without a chat template: text or tokens that the model continues."""

    markers: Mapping[int, bytes] = MappingProxyType({})
    reasoning_end: Sequence[int] = ()

    def __init__(self, backend: Backend, template_text: str, bos: str) -> None:
        """`bos` is the text that every prompt of the model begins with, maybe empty."""
        self._backend = backend
        self._bos = bos
        self._tokenizer = Tokenizer(backend, template_text)
        self.max_token_bytes = self._tokenizer.max_token_bytes
        self.tokenize = self._tokenizer.tokenize

    def parser(self, request: ChatRequest, channel: Channel) -> AnswerParser:
        return PlainParser()

    def with_bos(self, text: str) -> str:
        return with_prefix(text, self._bos)

    def raw_prompt(self, text: str | Sequence[int], room: int) -> RenderedPrompt:
        """
        Return the prompt as the caller wrote it, in which names of special tokens become these
        tokens. Raises ServiceError: context_length_exceeded if it leaves less than `room` tokens,
        or invalid_request for a token that the model does not have.
        """
        if isinstance(text, str):
            return self._fitting("prompt", self.tokenize(self.with_bos(text), special=True), room)
        last = self._backend.vocabulary_size - 1
        if (highest := max(text)) > last:
            raise ServiceError(
                "invalid_request",
                f"The prompt has token {highest}, but the last token of the model is {last}.",
            )
        return self._fitting("prompt", list(text), room)

    def stable_length(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's tokens the conversation's next prompt surely repeats."""
        return len(prompt)

    def _fitting(self, field: str, tokens: list[int], room: int) -> RenderedPrompt:
        if len(tokens) + room > self._backend.context:
            raise prompts.context_exceeded(field, str(len(tokens)), self._backend.context)
        return RenderedPrompt(tokens)


class NoTemplate(RawPrompts):
    """Stands in for a missing template: chats are rejected with `reason`, which says what to do."""

    def __init__(self, reason: str, backend: Backend, *, bos: str, adds_bos: bool) -> None:
        super().__init__(backend, "", bos if adds_bos else "")
        self.reason = reason
        self.tools = ToolPrompt(self._reject)

    def public_prefixes(self, _: str) -> list[list[int]]:
        return []

    def _reject(self, *_: Any) -> Any:
        raise ServiceError("model_unavailable", self.reason)

    session_prompt = conversation_prompt = tokenize_conversation = _reject


class ChatTemplate(RawPrompts):
    """
    Prompts by the chat template `source`, in Jinja as Hugging Face extends it. Raises TemplateError
    if it can't render a conversation.
    """

    def __init__(
        self, source: str, backend: Backend, *, bos: str, eos: str, adds_bos: bool
    ) -> None:
        first = bos if adds_bos else ""
        renderer = TemplateRenderer(source, {"bos_token": bos, "eos_token": eos}, first)
        self.tools = ToolPrompt(renderer.render)
        super().__init__(backend, renderer.sample + self.tools.sample, first)
        self._assembler = PromptAssembler(renderer, self._tokenizer)
        self._tail = self.tokenize(renderer.tail, special=True)

    def session_prompt(
        self,
        system: str,
        turns: Sequence[Turn],
        question: str,
        max_tokens: int,
        answers: KnownAnswers = NO_ANSWERS,
        previous_first: str = "",
    ) -> RenderedPrompt:
        """
        Return the prompt with as many exchanges as leave room for the answer: `max_tokens`, but at
        most half of the context window, so that a large limit doesn't push the session out. If not
        all exchanges fit, the oldest are dropped, and some more, so that the next prompts share a
        prefix. `previous_first` is the request id of the first exchange in the previous prompt.

        A question that leaves less room is sent without exchanges, and its answer gets the rest.
        Raises ServiceError(context_length_exceeded) if there is none.
        """
        tried: dict[int, list[int]] = {}

        def length(dropped: int) -> int:
            if dropped not in tried:
                messages = _session_messages(system, turns[dropped:], question, answers)
                tried[dropped] = self._assembler.tokens(messages)
            return len(tried[dropped])

        ids = [turn.request_id for turn in turns]
        previous = ids.index(previous_first) if previous_first in ids else 0
        context = self._backend.context
        room = context - min(max_tokens, context // 2)
        dropped = window.dropped_exchanges(len(turns), length, room, previous)
        if dropped is None:
            dropped = len(turns)
            if length(dropped) >= context:
                raise prompts.context_exceeded("prompt", str(length(dropped)), context)
        return RenderedPrompt(tried[dropped], len(turns) - dropped, dropped)

    def conversation_prompt(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        room: int,
        answers: KnownAnswers = NO_ANSWERS,
    ) -> RenderedPrompt:
        """
        Return the prompt of a whole conversation. Raises ServiceError: context_length_exceeded if
        it leaves less than `room` tokens, or invalid_request if the template rejects it.
        """
        tokens = self.tokenize_conversation(messages, tools, answers)
        return self._fitting("messages", tokens, room)

    def tokenize_conversation(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        answers: KnownAnswers = NO_ANSWERS,
    ) -> list[int]:
        """
        Return the prompt of a conversation of any length. Raises ServiceError(invalid_request) if
        the template rejects it.
        """
        rendered, tool_dicts = self.tools.template_input(messages, tools)
        try:
            return self._assembler.tokens(
                [_template_message(answers, **message) for message in rendered],
                tool_dicts,
                require_all=True,
            )
        except Exception as error:  # a template is a program, and can fail in any way
            raise ServiceError(
                "invalid_request", f"The model's chat template rejects the messages: {error}."
            ) from error

    def stable_length(self, prompt: Sequence[int]) -> int:
        """
        Return how many of a prompt's tokens the conversation's next prompt surely repeats: those
        before the last end of a message. What follows opens the answer, maybe with a thought that
        the next prompt drops, and depends on the request's switches.
        """
        reserved = next(iter(self._tokenizer.reserved(self._tail)), None)
        if reserved is None or reserved not in prompt:
            return max(0, len(prompt) - len(self._tail))
        return len(prompt) - 1 - list(reversed(prompt)).index(reserved)

    def public_prefixes(self, system: str) -> list[list[int]]:
        """
        Return the tokens with which prompts of all callers begin: with the server's `system`
        prompt, with a caller's own, and without one.
        """
        questions = [TemplateMessage("user", probe) for probe in _PROBES]
        head = TemplateMessage("system", system)
        conversations = (
            [[head, question] for question in questions] if system else [],
            [[TemplateMessage("system", probe), questions[0]] for probe in _PROBES],
            [[question] for question in questions],
        )
        prefixes = (commonprefix([*map(self._assembler.tokens, each)]) for each in conversations)
        return [list(prefix) for prefix in prefixes if prefix]


def _session_messages(
    system: str, turns: Sequence[Turn], question: str, answers: KnownAnswers
) -> list[TemplateMessage]:
    messages = [TemplateMessage("system", system)] if system else []
    for turn in turns:
        tokens = answers.get(turn.request_id, ())
        messages.append(TemplateMessage("user", turn.prompt))
        messages.append(TemplateMessage("assistant", turn.response, tokens))
    return [*messages, TemplateMessage("user", question)]


def _template_message(
    answers: KnownAnswers, role: str, content: str, **fields: Any
) -> TemplateMessage:
    is_answer = role == "assistant" and not fields
    return TemplateMessage(role, content, answers.get(content, ()) if is_answer else (), fields)

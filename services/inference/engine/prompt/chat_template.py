"""Prompts of one model: sessions, conversations and raw text to tokens."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from os.path import commonprefix
from types import MappingProxyType
from typing import Any, NamedTuple

from services.contract import prompts
from services.contract.conversation import ChatMessage, Tool, ToolResult
from services.contract.errors import ServiceError
from services.contract.messages import Channel, ChatRequest, Turn
from services.inference.engine.backend import Backend
from services.inference.engine.output.parts import AnswerParser, PlainParser
from services.inference.engine.prompt import window
from services.inference.engine.prompt.assembler import CONTENT, PromptAssembler, TemplateMessage
from services.inference.engine.prompt.format_probe import find_format
from services.inference.engine.prompt.model_format import THINKING_SWITCHES, ModelFormat
from services.inference.engine.prompt.template_process import (
    DEFAULT_LIMITS,
    RenderFailure,
    TemplateLimitError,
    TemplateLimits,
)
from services.inference.engine.prompt.template_renderer import (
    REASONING,
    TemplateError,
    TemplateRenderer,
    with_prefix,
)
from services.inference.engine.prompt.tokenizer import Tokenizer
from services.inference.engine.prompt.tools import ToolPrompt

log = logging.getLogger(__name__)

# Tokens of earlier answers and of their reasoning, by text, without the end token.
KnownAnswers = Mapping[str, Sequence[int]]

NO_ANSWERS: KnownAnswers = MappingProxyType({})
Variables = Mapping[str, Any]  # of a template, beside the conversation
NO_VARIABLES: Variables = MappingProxyType({})
SYSTEM_ROLES = ("system", "developer")
MAX_CACHED_TAILS = 64  # by the variables of requests
MAX_CACHED_CHARS = 1_000  # of such variables; a caller may send megabytes
MAX_TAIL_TOKENS = 64  # of what a template writes after the last message
# Texts without a common prefix, so that the common prefix of their prompts is the template's own.
_PROBES = ("a", "B", "1", ".", " a", "\na", "\u00e9", "\u4e2d")
_QUESTION = "QUESTIONqX"
_NO_EFFORTS = ("none", "no_think")  # values of `reasoning_effort` in templates


class PromptOptions(NamedTuple):
    """
    What a prompt has beside its messages. `tool_results` are those of the calls in a session's last
    answer. The answer continues `prefix`, or the content or reasoning of the last message.
    """

    tools: Sequence[Tool] = ()
    tool_results: Sequence[ToolResult] = ()
    variables: Variables = NO_VARIABLES
    prefix: str = ""
    continue_final: Channel | None = None

    @property
    def continued(self) -> Channel | None:
        """The channel of the text that the answer continues."""
        return "content" if self.prefix else self.continue_final

    @property
    def forbids_reasoning(self) -> bool:
        """Whether reasoning is turned off, which not every template can do."""
        return any(self.variables.get(name) is False for name in prompts.SWITCHES)


NO_OPTIONS = PromptOptions()


class _Tail(NamedTuple):
    """What a template writes after a question, and the last tokens of it."""

    text: str
    tokens: list[int]


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

    def may_reason(self, _: PromptOptions) -> bool:
        return False

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
        self.format = ModelFormat()

    def public_prefixes(self, _: str, __: Variables = NO_VARIABLES) -> list[list[int]]:
        return []

    def _reject(self, *_: Any, **__: Any) -> Any:
        raise ServiceError("model_unavailable", self.reason)

    session_prompt = conversation_prompt = truncated_prompt = tokenize_conversation = _reject


class ChatTemplate(RawPrompts):
    """
    Prompts by the chat template `source`, in Jinja as Hugging Face extends it. Raises TemplateError
    if it can't render a conversation.
    """

    def __init__(
        self,
        source: str,
        backend: Backend,
        *,
        bos: str,
        eos: str,
        adds_bos: bool,
        limits: TemplateLimits = DEFAULT_LIMITS,
    ) -> None:
        first = bos if adds_bos else ""
        try:
            renderer = TemplateRenderer(source, {"bos_token": bos, "eos_token": eos}, first, limits)
            with renderer.trying():
                found = find_format(renderer.render, source)
                renderer.reasoning_field = found.reasoning_field
                switches = _switches(renderer)
        except (RenderFailure, TemplateLimitError) as error:
            raise TemplateError(str(error)) from error
        super().__init__(backend, renderer.sample + found.sample, first)
        self.format = ModelFormat.of(found, switches, backend, self.tokenize)
        self.markers, self.reasoning_end = self.format.markers, self.format.reasoning_end
        self._tools, self._renderer = ToolPrompt(found), renderer
        self._assembler = PromptAssembler(renderer, self._tokenizer)
        self._tail = self.tokenize(renderer.tail, special=True)
        # each prompt needs it twice, and a rendering is a message to another process and back
        self._tails = lru_cache(MAX_CACHED_TAILS)(self._render_tail)

    def session_prompt(
        self,
        system: str,
        turns: Sequence[Turn],
        question: str,
        max_tokens: int,
        answers: KnownAnswers = NO_ANSWERS,
        previous_first: str = "",
        options: PromptOptions = NO_OPTIONS,
    ) -> RenderedPrompt:
        """
        Return the prompt with as many exchanges as leave room for the answer: `max_tokens`, but at
        most half of the context window, so that a large limit doesn't push the session out. If not
        all exchanges fit, the oldest are dropped, and some more, so that the next prompts share a
        prefix. `previous_first` is the request id of the first exchange in the previous prompt.

        A question that leaves less room is sent without exchanges, and its answer gets the rest.
        Raises ServiceError: context_length_exceeded if there is none, or invalid_request if the
        template rejects the prefix.
        """
        asked = Turn("", question, "", tool_results=tuple(options.tool_results))
        tried: dict[int, list[int]] = {}

        def length(dropped: int) -> int:
            if dropped not in tried:
                messages = [*_session_messages(system, (*turns[dropped:], asked))]
                tried[dropped] = self._tokens(messages, answers, options, require_all=False)
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
        tokens = tried[dropped]
        return RenderedPrompt(tokens, len(turns) - dropped, dropped, self._channel(tokens, options))

    def conversation_prompt(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        room: int,
        answers: KnownAnswers = NO_ANSWERS,
        options: PromptOptions = NO_OPTIONS,
    ) -> RenderedPrompt:
        """
        Return the prompt of a whole conversation. Raises ServiceError: context_length_exceeded if
        it leaves less than `room` tokens, or invalid_request if the template rejects it.
        """
        options = options._replace(tools=tools)
        tokens = self.tokenize_conversation(messages, tools, answers, options)
        rendered = self._fitting("messages", tokens, room)
        return rendered._replace(channel=self._channel(tokens, options))

    def truncated_prompt(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        max_tokens: int | None,
        answers: KnownAnswers = NO_ANSWERS,
        options: PromptOptions = NO_OPTIONS,
    ) -> RenderedPrompt:
        """
        Return the prompt of a conversation without its oldest exchanges, if all of them would leave
        less room than for an answer of `max_tokens`, or (None) a quarter of the context window, but
        at most half of it. System messages at the begin stay. Raises ServiceError as
        `conversation_prompt` does, if the last exchange does not fit.
        """
        head, exchanges = _exchanges(messages)
        tried: dict[int, list[int]] = {}

        def length(dropped: int) -> int:
            if dropped not in tried:
                kept = [*head, *chain.from_iterable(exchanges[dropped:])]
                tried[dropped] = self.tokenize_conversation(kept, tools, answers, options)
            return len(tried[dropped])

        context, last = self._backend.context, max(0, len(exchanges) - 1)
        room = context - min(max_tokens or context // 4, context // 2)
        dropped = window.dropped_in_steps(last, length, room)
        if dropped is None:
            length(dropped := last)
        rendered = self._fitting("messages", tried[dropped], 1)
        channel = self._channel(tried[dropped], options._replace(tools=tools))
        return rendered._replace(dropped=dropped, channel=channel)

    def tokenize_conversation(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        answers: KnownAnswers = NO_ANSWERS,
        options: PromptOptions = NO_OPTIONS,
    ) -> list[int]:
        """
        Return the prompt of a conversation of any length. Raises ServiceError(invalid_request) if
        the template rejects it.
        """
        options = options._replace(tools=tools)
        return self._tokens(messages, answers, options, require_all=True)

    def _tokens(
        self,
        messages: Sequence[ChatMessage],
        answers: KnownAnswers,
        options: PromptOptions,
        require_all: bool,
    ) -> list[int]:
        if options.prefix:
            messages = [*messages, ChatMessage("assistant", options.prefix)]
        try:
            rendered, tools = self._tools.template_input(messages, options.tools)
            return self._assembler.tokens(
                [_template_message(answers, **message) for message in rendered],
                tools,
                require_all,
                options.variables,
                _open_field(options, messages[-1], self.format),
            )
        except TemplateLimitError as error:
            raise _too_costly(error) from error
        except Exception as error:  # what a template makes of a conversation can be anything
            reason = str(error) or type(error).__name__
            raise ServiceError(
                "invalid_request", f"The model's chat template rejects the messages: {reason}."
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

    def parser(self, request: ChatRequest, channel: Channel) -> AnswerParser:
        if request.text is not None:
            return PlainParser()
        tools = () if request.tool_choice == "none" else request.tools or ()
        return self.format.parser(tools, channel)

    def may_reason(self, options: PromptOptions) -> bool:
        """Return whether the model may open a thought: the prompt has not closed it already."""
        is_closed = self.format.closes_reasoning(self._question_tail(options.variables).text)
        return not is_closed and options.continued != "content"

    def _question_tail(self, variables: Variables) -> _Tail:
        """Return what the template writes after a question: nothing if it refuses the variables."""
        text = json.dumps(dict(variables), sort_keys=True)
        render = self._tails if len(text) <= MAX_CACHED_CHARS else self._render_tail
        try:
            return render(text)
        except (RenderFailure, TemplateLimitError):
            return _Tail("", [])

    def _render_tail(self, variables: str) -> _Tail:
        """Return what the template writes after a question; the variables are an object in JSON."""
        messages = [{"role": "user", "content": _QUESTION}]
        rendered = self._renderer.render(messages, (), json.loads(variables))
        text = rendered.rpartition(_QUESTION)[2]
        return _Tail(text, self.tokenize(text, special=True)[-MAX_TAIL_TOKENS:])

    def _channel(self, tokens: Sequence[int], options: PromptOptions) -> Channel:
        """
        Return in which channel a prompt ends: by the markers after its last message. Text of people
        can't look like them, since it has other tokens, or the template writes more after it.
        """
        if options.continued:
            return options.continued
        tail = self._question_tail(options.variables)
        if tokens[len(tokens) - len(tail.tokens) :] == tail.tokens:
            return self.format.prompt_channel(tail.text)
        return self.format.prompt_channel(self._tokenizer.text(tokens[-MAX_TAIL_TOKENS:]))

    def public_prefixes(self, system: str, variables: Variables = NO_VARIABLES) -> list[list[int]]:
        """
        Return the tokens with which prompts of all callers begin: with the server's `system`
        prompt, with a caller's own, and without one. None, if the template fails on them.
        """
        try:
            with self._renderer.trying():
                return self._public_prefixes(system, variables)
        except (RenderFailure, TemplateLimitError) as error:
            log.warning("public prefixes unknown reason=%r", str(error))
            return []

    def _public_prefixes(self, system: str, variables: Variables) -> list[list[int]]:
        questions = [TemplateMessage("user", probe) for probe in _PROBES]
        head = TemplateMessage("system", system)
        conversations = (
            [[head, question] for question in questions] if system else [],
            [[TemplateMessage("system", probe), questions[0]] for probe in _PROBES],
            [[question] for question in questions],
        )

        def prompts_of(conversation: list[list[TemplateMessage]]) -> list[list[int]]:
            return [self._assembler.tokens(each, variables=variables) for each in conversation]

        prefixes = (commonprefix(prompts_of(each)) for each in conversations)
        return [list(prefix) for prefix in prefixes if prefix]


def _switches(renderer: TemplateRenderer) -> dict[str, tuple[Any, Any]]:
    """Return the variables that turn reasoning off and on, with their values."""
    reads = renderer.reads
    switches = {name: values for name, values in THINKING_SWITCHES.items() if name in reads}
    effort = _no_effort(renderer) if "reasoning_effort" in reads else None
    return switches | ({"reasoning_effort": (effort, None)} if effort else {})


def _no_effort(renderer: TemplateRenderer) -> str | None:
    """
    Return the `reasoning_effort` by which a template turns reasoning off. A template that only
    shows the effort, like any word, has none.
    """

    def rendered(effort: str) -> str | None:
        messages = [{"role": "user", "content": _QUESTION}]
        try:
            return renderer.render(messages, (), {"reasoning_effort": effort}).replace(effort, "")
        except RenderFailure:
            return None

    any_word = rendered("zq")
    return next((each for each in _NO_EFFORTS if rendered(each) not in (None, any_word)), None)


def _too_costly(error: TemplateLimitError) -> ServiceError:
    return ServiceError(
        "model_unavailable",
        f"The model's chat template was stopped: {error}. If other prompts work, send a shorter or"
        " another one; else let the operator set MODEL_CHAT_TEMPLATE to another template.",
    )


def _exchanges(
    messages: Sequence[ChatMessage],
) -> tuple[Sequence[ChatMessage], list[Sequence[ChatMessage]]]:
    """Return the system messages at the begin, and exchanges that begin with a user's message."""
    roles = ["", *(message.role for message in messages)]
    first = next((i for i, m in enumerate(messages) if m.role not in SYSTEM_ROLES), len(messages))
    starts = [i for i, (before, role) in enumerate(pairwise(roles)) if role == "user" != before]
    bounds = [first, *(start for start in starts if start > first), len(messages)]
    return messages[:first], [messages[start:end] for start, end in pairwise(bounds)]


def _session_messages(system: str, turns: Sequence[Turn]) -> Iterator[ChatMessage]:
    """Yield the messages of exchanges, of which the last one has no answer yet."""
    if system:
        yield ChatMessage("system", system)
    called: set[str] = set()  # ids of the calls in these exchanges
    for turn in turns:
        for result in turn.tool_results:
            if result.tool_call_id in called:
                yield ChatMessage("tool", result.content, tool_call_id=result.tool_call_id)
        # results of calls that the window has dropped
        orphans = [each.content for each in turn.tool_results if each.tool_call_id not in called]
        if question := "\n".join(filter(None, [*orphans, turn.prompt])):
            yield ChatMessage("user", question)
        elif not turn.tool_results:
            yield ChatMessage("user", "")
        called |= {call.id for call in turn.tool_calls}
        if turn is not turns[-1]:
            calls, reasoning = turn.tool_calls or None, turn.reasoning or None
            yield ChatMessage("assistant", turn.response, tool_calls=calls, reasoning=reasoning)


def _open_field(options: PromptOptions, last: ChatMessage, form: ModelFormat) -> str:
    """
    Return the field of the last message that the answer continues, or "". Raises ValueError if the
    template has no reasoning.
    """
    match options.continued:
        case None:
            return ""
        case "content":
            return CONTENT
    if not form.found.reasoning_field:
        raise ValueError("it has no reasoning that could be continued")
    if last.text:
        raise ValueError("the reasoning of a message with content can't be continued")
    return REASONING


def _template_message(
    answers: KnownAnswers, role: str, content: str, **fields: Any
) -> TemplateMessage:
    known = answers if role == "assistant" else NO_ANSWERS
    reasoning = fields.get(REASONING, "")
    return TemplateMessage(role, content, known.get(content, ()), fields, known.get(reasoning, ()))

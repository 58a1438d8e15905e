"""
The model's own chat template: a conversation to prompt tokens.

Only the template's text may become the tokens that tell roles apart, and an answer whose tokens are
known is put in as these tokens: so the prompt goes on from what the KV cache holds, even where its
text would tokenize differently.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from os.path import commonprefix
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2

from services.contract import prompts
from services.contract.conversation import ChatMessage, Tool
from services.contract.errors import ServiceError
from services.contract.messages import Turn
from services.inference.engine.backend import Backend
from services.inference.engine.prompt import jinja, window
from services.inference.engine.prompt.conversation import (
    KnownAnswers,
    TemplateConversation,
    TemplateMessage,
    merge_system,
    of_session,
)
from services.inference.engine.prompt.marks import Marks
from services.inference.engine.prompt.tokenizer import RenderedText, Tokenizer
from services.inference.engine.prompt.tools import Json, ToolPrompt

_PROBES = ("a", "B", "1", ".", " a", "\na", "\u00e9", "\u4e2d")
"""Contents without a common prefix: the common prefix of their prompts is the template's."""


class TemplateError(Exception):
    """The template can't be used; the message says what is wrong with it."""


class RenderedPrompt(NamedTuple):
    tokens: list[int]
    kept: int  # exchanges of the context that are in it
    dropped: int  # exchanges that did not fit


class _Piece(NamedTuple):
    """What is rendered between two known answers."""

    text: str | None  # none where the template refuses the contents
    frame: str  # with marks in the places of the contents


class _Style(NamedTuple):
    """The variables that a template expects, found by rendering it."""

    absent: Json  # variables for missing tools and documents
    parts: frozenset[str]  # the roles whose content must be a list of parts

    def variants(self, roles: Sequence[str]) -> Iterator["_Style"]:
        """
        Yield the styles to try, the common ones first: Hugging Face passes None where others pass
        nothing, and most templates take a string.
        """
        for absent in ({"tools": None, "documents": None}, {}):
            for more in ((), *((role,) for role in roles), roles):
                yield _Style(absent, self.parts | set(more))

    def message(self, message: Json) -> Json:
        if message["role"] not in self.parts:
            return message
        return message | {"content": [{"type": "text", "text": message["content"]}]}


class PlainText:
    """Prompts without a template: text or tokens that the model continues."""

    opens_reasoning = False  # whether the prompt ends inside <think>, which the answer continues
    _tokenizer: Tokenizer

    def __init__(self, backend: Backend, *, bos: str, adds_bos: bool) -> None:
        self._backend = backend
        self._bos, self._adds_bos = bos, adds_bos

    def plain(self, text: str | Sequence[int], room: int) -> RenderedPrompt:
        """
        Return the prompt without the template: the caller writes all of it, markers too. Raises
        ServiceError: context_length_exceeded, or invalid_request for unknown token ids.
        """
        if isinstance(text, str):
            tokens = self.tokenize(self.begun(text), special=True)
            return self._whole_prompt("prompt", tokens, room)
        if max(text) >= self._backend.vocabulary_size:
            raise ServiceError(
                "invalid_request",
                f"The prompt has token {max(text)}, but the last token of the model is"
                f" {self._backend.vocabulary_size - 1}.",
            )
        return self._whole_prompt("prompt", list(text), room)

    @property
    def longest_token(self) -> int:
        """The maximum number of bytes of text that one token stands for."""
        return self._tokenizer.longest_token

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text; with `special`, names of control tokens become these."""
        return self._tokenizer.tokenize(text, special)

    def begun(self, text: str) -> str:
        """Return the text with the BOS of the model, if its prompts begin with one."""
        missing = self._adds_bos and not text.startswith(self._bos)
        return self._bos + text if missing else text

    def _whole_prompt(self, field: str, tokens: list[int], room: int) -> RenderedPrompt:
        if len(tokens) + room > self._backend.context:
            raise prompts.context_exceeded(field, str(len(tokens)), self._backend.context)
        return RenderedPrompt(tokens, 0, 0)


class NoTemplate(PlainText):
    """Stands in for a missing template: chats are refused with `why`, which says what to do."""

    def __init__(self, why: str, backend: Backend, *, bos: str, adds_bos: bool) -> None:
        super().__init__(backend, bos=bos, adds_bos=adds_bos)
        self.why = why
        self.functions = ToolPrompt(self._refuse)
        self._tokenizer = Tokenizer(backend, "")

    def heads(self, _: str) -> list[list[int]]:
        return []

    def prompt(self, *_: Any) -> RenderedPrompt:
        raise ServiceError("model_unavailable", self.why)

    def conversation(self, *_: Any) -> RenderedPrompt:
        raise ServiceError("model_unavailable", self.why)

    def tokens_of(self, *_: Any) -> list[int]:
        raise ServiceError("model_unavailable", self.why)

    def _refuse(self, *_: Any) -> str:
        raise ServiceError("model_unavailable", self.why)


class ChatTemplate(PlainText):
    """
    `source` is Jinja as Hugging Face's templates use it. Raises TemplateError if it can't show
    a chat.
    """

    def __init__(
        self, source: str, backend: Backend, *, bos: str, eos: str, adds_bos: bool
    ) -> None:
        super().__init__(backend, bos=bos, adds_bos=adds_bos)
        self._eos = eos
        self._style = _Style({}, frozenset())
        self._content, self._answer, self._hidden = Marks(), Marks(), Marks()
        try:
            self._template = jinja.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"its Jinja can't be parsed: {error}") from error
        if why_not := self._fit("user", "assistant", "user"):
            raise TemplateError(why_not)
        self._has_system_role = self._fit("system", "user") is None
        example = self._example()
        self.opens_reasoning = example.rstrip().endswith("<think>")
        self.functions = ToolPrompt(self._show)
        self._tokenizer = Tokenizer(backend, example + self.functions.sample)

    def prompt(
        self,
        system: str,
        turns: Sequence[Turn],
        question: str,
        max_tokens: int,
        answers: KnownAnswers = MappingProxyType({}),
        since: str = "",
    ) -> RenderedPrompt:
        """
        Return the prompt with as many exchanges as leave room for the answer: `max_tokens`, but at
        most half of the context window, so that a large limit doesn't push the session out. If not
        all exchanges fit, the oldest are dropped, whole, and some more, so that the next prompts
        can share a prefix. `since` is the first exchange of the last prompt.

        A question that leaves less room is sent without exchanges, and its answer gets the rest.
        Raises ServiceError(context_length_exceeded) if there is none.
        """
        tried: dict[int, list[int]] = {}

        def length(dropped: int) -> int:
            if dropped not in tried:
                messages = of_session(system, turns[dropped:], question, answers)
                messages = messages if self._has_system_role else merge_system(messages)
                tried[dropped] = self._tokens(TemplateConversation(messages))
            return len(tried[dropped])

        last = next((i for i, turn in enumerate(turns) if turn.request_id == since), 0)
        context = self._backend.context
        room = context - min(max_tokens, context // 2)
        dropped = window.dropped(len(turns), length, room, last)
        if dropped is None:
            dropped = len(turns)
            if length(dropped) >= context:
                raise prompts.context_exceeded("prompt", str(length(dropped)), context)
        return RenderedPrompt(tried[dropped], len(turns) - dropped, dropped)

    def conversation(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        room: int,
        answers: KnownAnswers = MappingProxyType({}),
    ) -> RenderedPrompt:
        """
        The prompt of a conversation as it is; `answers` are known by their text. Raises
        ServiceError: context_length_exceeded if it leaves less than `room` tokens, or
        invalid_request if the template rejects it.
        """
        return self._whole_prompt("messages", self.tokens_of(messages, tools, answers), room)

    def tokens_of(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        answers: KnownAnswers = MappingProxyType({}),
    ) -> list[int]:
        """Of a conversation, whether it fits or not. Raises ServiceError(invalid_request)."""
        shown = self._shown(*self.functions.show(messages, tools), answers)
        try:
            pieces, said = self._cut(shown)
            self._check_all_shown(shown, pieces)
            return self._joined(shown, pieces, said)
        except Exception as error:  # a template is a program, and can fail in any way
            raise ServiceError(
                "invalid_request", f"The model's chat template refuses the messages: {error}."
            ) from error

    def heads(self, system: str) -> list[list[int]]:
        """
        Return the public heads as tokens: how prompts begin before any caller's text, with the
        server's `system` prompt, with a caller's, and without one.
        """
        head = TemplateMessage("system", system)
        questions = [TemplateMessage("user", probe) for probe in _PROBES]
        conversations = (
            [[head, question] for question in questions] if system else [],
            [[TemplateMessage("system", probe), questions[0]] for probe in _PROBES],
            [[question] for question in questions],
        )
        return [found for each in conversations if (found := self._common(each))]

    def _common(self, conversations: Sequence[list[TemplateMessage]]) -> list[int]:
        """Return the common prefix of the prompts of all conversations."""
        if not self._has_system_role:
            conversations = [merge_system(messages) for messages in conversations]
        return list(
            commonprefix([self._tokens(TemplateConversation(each)) for each in conversations])
        )

    def _shown(
        self, messages: list[Json], tools: list[Json], answers: KnownAnswers
    ) -> TemplateConversation:
        hidden: list[str] = []

        def hide(marker: str) -> str:
            hidden.append(marker)
            return self._hidden.of(len(hidden) - 1)

        def message(role: str, content: str, **more: Any) -> TemplateMessage:
            is_answer = role == "assistant" and not more
            tokens = answers.get(content, ()) if is_answer else ()
            return TemplateMessage(role, content, tokens, self._tokenizer.hide(more, hide))

        shown = [message(**told) for told in messages]
        shown = shown if self._has_system_role else merge_system(shown)
        return TemplateConversation(shown, self._tokenizer.hide(tools, hide), hidden)

    def _check_all_shown(self, shown: TemplateConversation, pieces: Sequence[_Piece]) -> None:
        """Of a message with calls, a template may leave the text out."""
        found = {n for piece in pieces for n in self._content.split(piece.frame).numbers}
        for number, message in enumerate(shown.messages):
            if number not in found and "tool_calls" not in message.more:
                raise ValueError(f"it does not show number {number}, of {message.role!r}")

    def _tokens(self, shown: TemplateConversation) -> list[int]:
        return self._joined(shown, *self._cut(shown))

    def _joined(
        self,
        shown: TemplateConversation,
        pieces: Sequence[_Piece],
        answers: dict[int, RenderedText],
    ) -> list[int]:
        contents = [message.content for message in shown.messages]
        for i, said in answers.items():
            contents[i] = said.rest
        tokens: list[int] = []
        for piece, known in zip_longest(pieces, answers.values()):
            self._add(tokens, piece, contents, shown.hidden)
            tokens += known.tokens if known else []
        return tokens

    def _cut(self, shown: TemplateConversation) -> tuple[list[_Piece], dict[int, RenderedText]]:
        """
        Cut at the known answers: those whose tokens say their text, and which the template shows
        as they are. Another (trimmed, say) is text like all else.
        """
        messages = shown.messages

        def render(messages: list[TemplateMessage]) -> str:
            return self._render(shown._replace(messages=messages))

        said = {i: self._tokenizer.said(m.tokens, m.content) for i, m in enumerate(messages)}
        said = {i: answer for i, answer in said.items() if answer.tokens}
        try:
            whole = render(messages)
        except Exception:  # it may raise for what is in a content, which must not end a session
            return [_Piece(None, render(self._framed(messages, {})))], {}
        while said:
            texts, numbers = self._answer.split(render(self._marked(messages, said)))
            frames, framed = self._answer.split(render(self._framed(messages, said)))
            is_each_once = numbers == framed == list(said)
            changed = _changed(whole, texts, said) if is_each_once else list(said)
            if not changed:
                return [_Piece(*pair) for pair in zip(texts, frames, strict=True)], said
            said = {i: answer for i, answer in said.items() if i not in changed}
        return [_Piece(whole, render(self._framed(messages, {})))], {}

    def _marked(
        self, messages: list[TemplateMessage], said: dict[int, RenderedText]
    ) -> list[TemplateMessage]:
        """With marks for the known answers."""
        return [
            m._replace(content=self._answer.of(i) + said[i].rest) if i in said else m
            for i, m in enumerate(messages)
        ]

    def _framed(
        self, messages: list[TemplateMessage], said: dict[int, RenderedText]
    ) -> list[TemplateMessage]:
        """
        With marks for the contents too: what is left is the template's own. Beside calls, no text
        is none.
        """
        return [
            m._replace(content=(self._answer.of(i) if i in said else "") + self._content.of(i))
            if m.content or "tool_calls" not in m.more
            else m
            for i, m in enumerate(messages)
        ]

    def _add(
        self, tokens: list[int], piece: _Piece, contents: list[str], hidden: Sequence[str]
    ) -> None:
        """
        The piece as a whole, which is what models were trained on, if no markers come of it but the
        template's own. Else the contents by themselves: what the template did to them is lost.
        """
        texts, numbers = self._content.split(piece.frame)
        inner = [contents[i] for i in numbers]
        if (whole := self._whole(piece, inner, hidden, tokens)) is not None:
            tokens += whole
            return
        for text, number in zip_longest(texts, numbers):
            tokens += self._own(text, hidden, tokens)
            if number is not None:
                tokens += self._tokenizer.content(contents[number], tokens)

    def _whole(
        self, piece: _Piece, contents: list[str], hidden: Sequence[str], before: list[int]
    ) -> list[int] | None:
        """None if that would forge something."""
        if piece.text is None or any(map(self._tokenizer.names_a_marker, contents)):
            return None
        tokens = self._own(piece.text, hidden, before)
        own = self._own(piece.frame, hidden, before)
        is_forged = self._tokenizer.markers(tokens) != self._tokenizer.markers(own)
        return None if is_forged else tokens

    def _own(self, text: str, hidden: Sequence[str], before: Sequence[int]) -> list[int]:
        """Of text that may become markers, but for what is hidden in it."""
        texts, numbers = self._hidden.split(text)
        tokens = [*before[-1:]]
        for part, number in zip_longest(texts, numbers):
            tokens += self._tokenizer.template(part, tokens)
            if number is not None:
                tokens += self._tokenizer.content(hidden[number], tokens)
        return tokens[len(before[-1:]) :]

    def _example(self) -> str:
        roles = ["system"] if self._has_system_role else []
        messages = [TemplateMessage(role, "") for role in (*roles, "user", "assistant", "user")]
        return self._render(TemplateConversation(self._framed(messages, {})))

    def _render(self, shown: TemplateConversation) -> str:
        messages = [{"role": m.role, "content": m.content, **m.more} for m in shown.messages]
        return self._show(messages, shown.tools)

    def _show(self, messages: Sequence[Json], tools: Sequence[Json]) -> str:
        variables = self._style.absent | ({"tools": tools} if tools else {})
        rendered = self._template.render(
            messages=[self._style.message(message) for message in messages],
            add_generation_prompt=True,
            bos_token=self._bos,
            eos_token=self._eos,
            **variables,
        )
        return self.begun(rendered)

    def _fit(self, *roles: str) -> str | None:
        """
        Set the first style in which the template can render a conversation of these roles. Return
        None, or why it can't in any.
        """
        settled, reasons = self._style, []
        for style in settled.variants(roles):
            self._style = style
            if (why_not := self._why_not(*roles)) is None:
                return None
            reasons.append(why_not)
        self._style = settled
        return reasons[0]

    def _why_not(self, *roles: str) -> str | None:
        """Why such a conversation can't be shown, all of it."""
        messages = self._framed([TemplateMessage(role, "") for role in roles], {})
        try:
            rendered = self._render(TemplateConversation(messages))
        except Exception as error:  # a template is a program, and can fail in any way
            return f"it fails on a conversation: {error}"
        if set(self._content.split(rendered).numbers) != set(range(len(roles))):
            return "it does not show all messages of a conversation"
        return None


def _changed(whole: str, texts: list[str], said: dict[int, RenderedText]) -> list[int]:
    """
    The answers that are not, as they are, between these texts in the whole. Behind a changed one it
    goes on where the next text is found.
    """
    if not whole.startswith(texts[0]):
        return list(said)
    changed = []
    at = len(texts[0])
    for (i, answer), text in zip(said.items(), texts[1:], strict=True):
        if whole.startswith(answer.text + text, at):
            at += len(answer.text + text)
        else:
            changed.append(i)
            at = max(at, whole.find(text, at)) + len(text)
    return changed if changed or at == len(whole) else list(said)

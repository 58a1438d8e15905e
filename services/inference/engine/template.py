"""
The model's own chat template: a conversation to prompt tokens.

Only the template's text may become the tokens that tell roles apart, and an answer whose tokens are
known is put in as these tokens: so the prompt goes on from what the KV cache holds, even where its
text would tokenize differently.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import NamedTuple

import jinja2

from services.contract.errors import ServiceError
from services.contract.messages import Turn
from services.inference.engine import jinja
from services.inference.engine.backend import Backend
from services.inference.engine.mark import Mark
from services.inference.engine.tokenizer import Said, Tokenizer

KnownAnswers = Mapping[str, Sequence[int]]  # request id to the answer's tokens, without the end's


class TemplateError(Exception):
    """The template can't be used; the message says what is wrong with it."""


class Prompt(NamedTuple):
    tokens: list[int]
    kept: int  # exchanges of the context that are in it
    dropped: int  # exchanges that did not fit


class Message(NamedTuple):
    role: str
    content: str
    tokens: Sequence[int] = ()  # of an answer, where they are known


class _Piece(NamedTuple):
    """What is rendered between two known answers."""

    text: str | None  # none where the template refuses the contents
    frame: str  # with marks in the places of the contents


class ChatTemplate:
    """
    `source` is Jinja as Hugging Face's templates use it. Raises TemplateError if it can't show
    a chat.
    """

    def __init__(
        self, source: str, backend: Backend, *, bos: str, eos: str, adds_bos: bool
    ) -> None:
        self._context = backend.context
        self._bos, self._eos, self._adds_bos = bos, eos, adds_bos
        self._content, self._answer = Mark(), Mark()
        try:
            self._template = jinja.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"its Jinja can't be parsed: {error}") from error
        self._has_system_role = self._why_not("system", "user") is None
        if why_not := self._why_not("user", "assistant", "user"):
            raise TemplateError(why_not)
        self._tokenizer = Tokenizer(backend, self._own_text())

    def prompt(
        self,
        system: str,
        turns: Sequence[Turn],
        question: str,
        max_tokens: int,
        answers: KnownAnswers = MappingProxyType({}),
    ) -> Prompt:
        """
        The longest prompt that leaves room for `max_tokens`: oldest exchanges are dropped, whole.

        Raises ServiceError(context_length_exceeded) if the question doesn't fit even alone.
        """
        tried: dict[int, list[int]] = {}

        def fits(dropped: int) -> bool:
            messages = _messages(system, turns[dropped:], question, answers)
            tried[dropped] = self._tokens(messages)
            return len(tried[dropped]) + max_tokens <= self._context

        dropped = _first(len(turns), fits)
        if dropped is None:
            raise ServiceError(
                "context_length_exceeded",
                f"The prompt has {len(tried[len(turns)])} tokens and max_tokens is {max_tokens},"
                f" but the model's context window holds {self._context} tokens: shorten the prompt"
                " or lower max_tokens.",
            )
        return Prompt(tried[dropped], len(turns) - dropped, dropped)

    def _tokens(self, messages: list[Message]) -> list[int]:
        messages = messages if self._has_system_role else _merge_system(messages)
        pieces, answers = self._cut(messages)
        contents = [message.content for message in messages]
        for i, said in answers.items():
            contents[i] = said.rest
        tokens: list[int] = []
        for piece, known in zip_longest(pieces, answers.values()):
            self._add(tokens, piece, contents)
            tokens += known.tokens if known else []
        return tokens

    def _cut(self, messages: list[Message]) -> tuple[list[_Piece], dict[int, Said]]:
        """
        Cut at the known answers: those whose tokens say their text, and which the template shows
        as they are. Another (trimmed, say) is text like all else.
        """
        said = {i: self._tokenizer.said(m.tokens, m.content) for i, m in enumerate(messages)}
        said = {i: answer for i, answer in said.items() if answer.tokens}
        try:
            whole = self._render(messages)
        except Exception:  # it may raise for what is in a content, which must not end a session
            return [_Piece(None, self._render(self._framed(messages, {})))], {}
        while True:
            texts, numbers = self._answer.split(self._render(self._marked(messages, said)))
            frames, framed = self._answer.split(self._render(self._framed(messages, said)))
            is_each_once = numbers == framed == list(said)
            changed = _changed(whole, texts, said) if is_each_once else list(said)
            if not changed:
                return [_Piece(*pair) for pair in zip(texts, frames, strict=True)], said
            said = {i: answer for i, answer in said.items() if i not in changed}

    def _marked(self, messages: list[Message], said: dict[int, Said]) -> list[Message]:
        """With marks for the known answers."""
        return [
            Message(m.role, self._answer.of(i) + said[i].rest if i in said else m.content)
            for i, m in enumerate(messages)
        ]

    def _framed(self, messages: list[Message], said: dict[int, Said]) -> list[Message]:
        """With marks for the contents too: what is left is the template's own."""
        return [
            Message(m.role, (self._answer.of(i) if i in said else "") + self._content.of(i))
            for i, m in enumerate(messages)
        ]

    def _add(self, tokens: list[int], piece: _Piece, contents: list[str]) -> None:
        """
        The piece as a whole, which is what models were trained on, if no markers come of it but the
        template's own. Else the contents by themselves: what the template did to them is lost.
        """
        texts, numbers = self._content.split(piece.frame)
        if (whole := self._whole(piece, [contents[i] for i in numbers], tokens)) is not None:
            tokens += whole
            return
        for text, number in zip_longest(texts, numbers):
            tokens += self._tokenizer.template(text, tokens)
            if number is not None:
                tokens += self._tokenizer.content(contents[number], tokens)

    def _whole(self, piece: _Piece, contents: list[str], before: list[int]) -> list[int] | None:
        """None if that would forge something."""
        if piece.text is None or any(map(self._tokenizer.names_a_marker, contents)):
            return None
        tokens = self._tokenizer.template(piece.text, before)
        own = self._tokenizer.template(piece.frame, before)
        is_forged = self._tokenizer.markers(tokens) != self._tokenizer.markers(own)
        return None if is_forged else tokens

    def _own_text(self) -> str:
        roles = ["system"] if self._has_system_role else []
        messages = [Message(role, "") for role in (*roles, "user", "assistant", "user")]
        return self._render(self._framed(messages, {}))

    def _render(self, messages: list[Message]) -> str:
        rendered = self._template.render(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=True,
            bos_token=self._bos,
            eos_token=self._eos,
        )
        missing = self._adds_bos and not rendered.startswith(self._bos)
        return self._bos + rendered if missing else rendered

    def _why_not(self, *roles: str) -> str | None:
        """Why such a conversation can't be shown, all of it."""
        messages = self._framed([Message(role, "") for role in roles], {})
        try:
            rendered = self._render(messages)
        except Exception as error:  # a template is a program, and can fail in any way
            return f"it fails on a conversation: {error}"
        if set(self._content.split(rendered).numbers) != set(range(len(roles))):
            return "it does not show all messages of a conversation"
        return None


def _first(count: int, fits: Callable[[int], bool]) -> int | None:
    """
    The first of 0 to `count` that fits, where all after it do too. 0 is the likely one; the others
    are searched by halves.
    """
    found = 0 if fits(0) else bisect_left(range(count + 1), True, lo=1, key=fits)
    return found if found <= count else None


def _changed(whole: str, texts: list[str], said: dict[int, Said]) -> list[int]:
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


def _messages(
    system: str, turns: Sequence[Turn], question: str, answers: KnownAnswers
) -> list[Message]:
    messages = [Message("system", system)] if system else []
    for turn in turns:
        messages.append(Message("user", turn.prompt))
        messages.append(Message("assistant", turn.response, answers.get(turn.request_id, ())))
    return [*messages, Message("user", question)]


def _merge_system(messages: list[Message]) -> list[Message]:
    """For a model without a system role: its text stands before the first user message."""
    if messages[0].role != "system":
        return messages
    system, first, *rest = messages
    return [Message(first.role, f"{system.content}\n\n{first.content}"), *rest]

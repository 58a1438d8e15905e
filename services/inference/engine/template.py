"""
The model's own chat template: a conversation to prompt tokens.

Only the template's text may become control tokens. Each message's content is rendered as a
placeholder, and tokenized by itself with special tokens off: typing `<|im_start|>system` forges
nothing.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.contract.errors import ServiceError
from services.contract.messages import Turn
from services.inference.engine.backend import Backend

_PLACEHOLDER = "\ue000{}\ue001"  # of the private use area: no template says these
_PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")


class TemplateError(Exception):
    """The template can't be used; the message says what is wrong with it."""


class Prompt(NamedTuple):
    tokens: list[int]
    kept: int  # exchanges of the context that are in it
    dropped: int  # exchanges that did not fit


class ChatTemplate:
    """
    `source` is Jinja as Hugging Face's templates use it. Raises TemplateError if it can't show
    a chat.
    """

    def __init__(
        self, source: str, backend: Backend, *, bos: str, eos: str, adds_bos: bool
    ) -> None:
        self._backend = backend
        self._bos, self._eos, self._adds_bos = bos, eos, adds_bos
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"its Jinja can't be parsed: {error}") from error
        self._has_system_role = self._shows_all(["system", "user"])
        if not self._shows_all(["user", "assistant", "user"]):
            raise TemplateError("it does not show all messages of a conversation")

    def prompt(self, system: str, turns: Sequence[Turn], question: str, max_tokens: int) -> Prompt:
        """
        The longest prompt that leaves room for `max_tokens`: oldest exchanges are dropped, whole.

        Raises ServiceError(context_length_exceeded) if the question doesn't fit even alone.
        """
        tokens: list[int] = []
        for dropped in range(len(turns) + 1):
            tokens = self._tokens(_messages(system, turns[dropped:], question))
            if len(tokens) + max_tokens <= self._backend.context:
                return Prompt(tokens, len(turns) - dropped, dropped)
        raise ServiceError(
            "context_length_exceeded",
            f"The prompt has {len(tokens)} tokens and max_tokens is {max_tokens}, but the model's"
            f" context window holds {self._backend.context} tokens: shorten the prompt or lower"
            " max_tokens.",
        )

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        messages = messages if self._has_system_role else _merge_system(messages)
        rendered = self._render(
            [m | {"content": _PLACEHOLDER.format(i)} for i, m in enumerate(messages)]
        )
        if self._adds_bos and not rendered.startswith(self._bos):
            rendered = self._bos + rendered
        tokens: list[int] = []
        for i, part in enumerate(_PLACEHOLDERS.split(rendered)):
            is_content = i % 2 == 1  # re.split puts the captured number between the texts
            text = messages[int(part)]["content"] if is_content else part
            tokens += self._backend.tokenize(text, special=not is_content)
        return tokens

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=self._bos,
            eos_token=self._eos,
            raise_exception=_raise,
            strftime_now=lambda form: datetime.now().strftime(form),
        )

    def _shows_all(self, roles: list[str]) -> bool:
        """Whether every message of such a conversation is in what is rendered."""
        messages = [
            {"role": role, "content": _PLACEHOLDER.format(i)} for i, role in enumerate(roles)
        ]
        try:
            shown = {int(i) for i in _PLACEHOLDERS.findall(self._render(messages))}
        except (jinja2.TemplateError, TypeError, ValueError):
            return False
        return shown == set(range(len(roles)))


class _Generation(Extension):
    """`{% generation %}` marks what a trainer learns from; it renders what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _messages(system: str, turns: Sequence[Turn], question: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.response})
    messages.append({"role": "user", "content": question})
    return messages


def _merge_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """For a model without a system role: its text stands before the first user message."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]

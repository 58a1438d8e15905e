"""
Renders a model's chat template: Jinja as Hugging Face's `apply_chat_template` extends it
(https://huggingface.co/docs/transformers/chat_templating), in a process of its own, since templates
are programs of strangers.
"""

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

from services.inference.engine.prompt import template_process
from services.inference.engine.prompt.template_process import (
    DEFAULT_LIMITS,
    RenderFailure,
    TemplateLimitError,
    TemplateLimits,
    variables_of,
)

Json = dict[str, Any]

_CHANGING = "strftime_now", "random", "lipsum"  # functions and filters
REASONING = "reasoning"  # of a message, which the template may want under another name


class TemplateError(Exception):
    """The template can't be used. The message is a clause that says why."""


class Placeholders:
    """
    Numbered strings that stand for texts while a template is rendered. They contain a random
    number, so nobody can write them, and no letters, since a template may change their case.
    """

    def __init__(self) -> None:
        self._start = f"\ue000{secrets.randbits(64)}\ue001"
        self._pattern = re.compile(f"{self._start}(\\d+)\ue001")

    def __getitem__(self, number: int) -> str:
        return f"{self._start}{number}\ue001"

    def split(self, text: str) -> tuple[list[str], list[int]]:
        """Return the n + 1 texts around n placeholders, and the numbers of these."""
        parts = self._pattern.split(text)
        return parts[::2], [int(number) for number in parts[1::2]]


class _Variables(NamedTuple):
    """What a template expects: variables for missing tools, and roles with a list as content."""

    missing: Json
    list_roles: Sequence[str]

    def message(self, message: Json) -> Json:
        if message["role"] not in self.list_roles or isinstance(message["content"], list):
            return message
        return message | {"content": [{"type": "text", "text": message["content"]}]}


# Common variants first: Hugging Face passes None for missing tools where others pass nothing, and
# most templates take a string as content.
_VARIANTS = [
    _Variables(missing, roles)
    for missing in ({"tools": None, "documents": None}, {})
    for count in range(4)
    for roles in combinations(("user", "assistant", "system"), count)
]


class TemplateRenderer:
    """
    Renders conversations with one template. Which variables it expects is found by rendering
    probes. Raises TemplateError if it can render no conversation, or TemplateLimitError.
    """

    def __init__(
        self, source: str, constants: Json, bos: str, limits: TemplateLimits = DEFAULT_LIMITS
    ) -> None:
        """
        `constants` are the variables `bos_token` and `eos_token`; `bos` is the text that every
        prompt begins with, maybe empty.
        """
        self._limits = limits
        self._must_end_by: float | None = None
        self._constants, self._bos = constants, bos
        self.source = source
        self.is_repeatable = not any(name in source for name in _CHANGING)
        """Whether the same conversation always gives the same text."""
        self.reasoning_field = ""  # found later, by rendering
        try:
            self.reads = variables_of(source, limits)  # variables
        except RenderFailure as error:
            raise TemplateError(f"its Jinja can't be parsed: {error}") from error
        with self.trying():
            self._find_variables()

    def _find_variables(self) -> None:
        chat = ("user", "assistant", "user")
        usable = [each for each in _VARIANTS if self._failure(each, chat) is None]
        if not usable:
            raise TemplateError(self._failure(_VARIANTS[0], chat))
        with_system = [each for each in usable if self._failure(each, ("system", "user")) is None]
        self.has_system_role = bool(with_system)
        self._variables = (with_system or usable)[0]
        roles = ("system", *chat) if self.has_system_role else chat
        placeholders = Placeholders()
        self.sample = self.render(_probe(placeholders, roles))
        self.tail = placeholders.split(self.sample)[0][-1]  # what follows the last question

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Limit the seconds of all renderings together, while only one thread uses the template."""
        self._must_end_by = time.monotonic() + self._limits.trying_seconds
        try:
            yield
        finally:
            self._must_end_by = None

    def render(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        is_prompt: bool = True,
    ) -> str:
        """
        Return the text of the messages and, if `is_prompt`, the begin of an answer. `variables` are
        further ones of the template. Raises RenderFailure if the template raises an exception, or
        TemplateLimitError.
        """
        return self._render(self._variables, messages, tools, variables, is_prompt)

    def _message(self, message: Json, expected: "_Variables") -> Json:
        """Return the message with its reasoning where the template looks for it."""
        reasoning = message.get(REASONING)
        if not isinstance(reasoning, str) or self.reasoning_field in ("", REASONING):
            return expected.message(message)
        rest = {key: value for key, value in message.items() if key != REASONING}
        if self.reasoning_field != "content":
            return expected.message(rest | {self.reasoning_field: reasoning})
        parts = [{"type": "thinking", "thinking": reasoning}]
        parts += [{"type": "text", "text": rest["content"]}] if rest["content"] else []
        return rest | {"content": parts}

    def _render(
        self,
        expected: _Variables,
        messages: Sequence[Json],
        tools: Sequence[Json] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        is_prompt: bool = True,
    ) -> str:
        if self._must_end_by is not None and time.monotonic() > self._must_end_by:
            seconds = self._limits.trying_seconds
            raise TemplateLimitError(f"it takes more than {seconds:g} seconds to try it")
        given = dict(variables) | self._constants | expected.missing
        given |= {
            "messages": [self._message(message, expected) for message in messages],
            "add_generation_prompt": is_prompt,
        }
        given |= {"tools": list(tools)} if tools else {}
        return with_prefix(template_process.render(self.source, given, self._limits), self._bos)

    def _failure(self, variables: _Variables, roles: Sequence[str]) -> str | None:
        """Return why a conversation of these roles can't be rendered, or None."""
        placeholders = Placeholders()
        try:
            rendered = self._render(variables, _probe(placeholders, roles))
        except RenderFailure as error:
            return f"it fails on a conversation: {error}"
        _, numbers = placeholders.split(rendered)
        if set(numbers) != set(range(len(roles))):
            return "it does not show all messages of a conversation"
        return None


def _probe(placeholders: Placeholders, roles: Sequence[str]) -> list[Json]:
    return [{"role": role, "content": placeholders[i]} for i, role in enumerate(roles)]


def with_prefix(text: str, prefix: str) -> str:
    return text if text.startswith(prefix) else prefix + text

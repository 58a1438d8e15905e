"""
Renders a model's chat template: Jinja as Hugging Face's `apply_chat_template` extends it
(https://huggingface.co/docs/transformers/chat_templating), in a sandbox, since templates are
programs of strangers.
"""

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Json = dict[str, Any]


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
    list_roles: frozenset[str]

    def alternatives(self, roles: Sequence[str]) -> Iterator["_Variables"]:
        """
        Yield what to try, common variants first: Hugging Face passes None for missing tools where
        others pass nothing, and most templates take a string as content.
        """
        for missing in ({"tools": None, "documents": None}, {}):
            for more in ((), *((role,) for role in roles), roles):
                yield _Variables(missing, self.list_roles | set(more))

    def message(self, message: Json) -> Json:
        if message["role"] not in self.list_roles:
            return message
        return message | {"content": [{"type": "text", "text": message["content"]}]}


class TemplateRenderer:
    """
    Renders conversations with one template. Which variables it expects is found by rendering
    probes. Raises TemplateError if it can render no conversation.
    """

    def __init__(self, source: str, *, bos: str, eos: str, adds_bos: bool) -> None:
        self._bos, self._eos, self._adds_bos = bos, eos, adds_bos
        self._variables = _Variables({}, frozenset())
        try:
            self._template = compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"its Jinja can't be parsed: {error}") from error
        if reason := self._choose_variables("user", "assistant", "user"):
            raise TemplateError(reason)
        self.has_system_role = self._choose_variables("system", "user") is None
        roles = ("system",) if self.has_system_role else ()
        self.sample = self.render(_probe(Placeholders(), *roles, "user", "assistant", "user"))

    def render(self, messages: Sequence[Json], tools: Sequence[Json] = ()) -> str:
        """Return the prompt text. A template is a program, and may raise any exception."""
        rendered = self._template.render(
            messages=[self._variables.message(message) for message in messages],
            add_generation_prompt=True,
            bos_token=self._bos,
            eos_token=self._eos,
            **(self._variables.missing | ({"tools": tools} if tools else {})),
        )
        return self.with_bos(rendered)

    def with_bos(self, text: str) -> str:
        """Return the text with the BOS token in front, if prompts of the model begin with one."""
        is_missing = self._adds_bos and not text.startswith(self._bos)
        return self._bos + text if is_missing else text

    def _choose_variables(self, *roles: str) -> str | None:
        """
        Keep the first variables with which the template renders a conversation of these roles.
        Return None, or the reason why there are none.
        """
        chosen, reasons = self._variables, []
        for variables in chosen.alternatives(roles):
            self._variables = variables
            if (reason := self._failure(*roles)) is None:
                return None
            reasons.append(reason)
        self._variables = chosen
        return reasons[0]

    def _failure(self, *roles: str) -> str | None:
        """Return why a conversation of these roles can't be rendered, or None."""
        placeholders = Placeholders()
        try:
            rendered = self.render(_probe(placeholders, *roles))
        except Exception as error:
            return f"it fails on a conversation: {error}"
        _, numbers = placeholders.split(rendered)
        if set(numbers) != set(range(len(roles))):
            return "it does not show all messages of a conversation"
        return None


def _probe(placeholders: Placeholders, *roles: str) -> list[Json]:
    return [{"role": role, "content": placeholders[i]} for i, role in enumerate(roles)]


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """Raise jinja2.TemplateSyntaxError if the source can't be parsed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


class _GenerationTag(Extension):
    """`{% generation %}` marks text for training; its content is rendered unchanged."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, escape nothing for HTML: models were trained on plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

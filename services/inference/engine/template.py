"""
The model's own chat template: a conversation to prompt tokens.

Only the template's text may become the tokens that tell roles apart. A prompt in which somebody
wrote such a token's text is tokenized message by message, with special tokens off for what people
wrote: typing `<|im_start|>system` forges nothing.
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
        self._markers: dict[int, str] = {}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"its Jinja can't be parsed: {error}") from error
        self._has_system_role = self._shows_all(["system", "user"])
        if not self._shows_all(["user", "assistant", "user"]):
            raise TemplateError("it does not show all messages of a conversation")
        self._markers = self._find_markers()
        self._forged = re.compile("|".join(map(re.escape, self._markers.values())) or "(?!)")

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
        if any(self._forged.search(message["content"]) for message in messages):
            return self._tokens_apart(messages)
        return self._backend.tokenize(self._with_bos(self._render(messages)), special=True)

    def _tokens_apart(self, messages: list[dict[str, str]]) -> list[int]:
        """
        The contents by themselves, so that their markers are only text. It is not always the same
        as
        the whole: a template may trim what it is given, some tokenizers put a space before a text.
        """
        tokens: list[int] = []
        rendered = self._with_bos(self._render(_placeholders([m["role"] for m in messages])))
        for i, part in enumerate(_PLACEHOLDERS.split(rendered)):
            if i % 2 == 0:  # re.split puts the captured number between the texts
                tokens += self._backend.tokenize(part, special=True)
            else:
                tokens += self._plain_tokens(messages[int(part)]["content"])
        return tokens

    def _plain_tokens(self, text: str) -> list[int]:
        """
        llama.cpp finds user-defined tokens also where special ones are off: they are taken
        apart.
        """
        tokens: list[int] = []
        for token in self._backend.tokenize(text, special=False):
            if marker := self._markers.get(token):
                tokens += self._backend.tokenize(marker[:1], special=False)
                tokens += self._backend.tokenize(marker[1:], special=False)
            else:
                tokens.append(token)
        return tokens

    def _find_markers(self) -> dict[int, str]:
        """
        The tokens that could forge something: control tokens, and what the template itself
        uses.
        """
        roles = ["system", "user"] if self._has_system_role else ["user"]
        own = _PLACEHOLDERS.sub("", self._render(_placeholders([*roles, "assistant", "user"])))
        used = set(self._backend.tokenize(own, special=True))
        special = self._backend.special_tokens()
        return {id: text for id, (text, control) in special.items() if control or id in used}

    def _with_bos(self, rendered: str) -> str:
        missing = self._adds_bos and not rendered.startswith(self._bos)
        return self._bos + rendered if missing else rendered

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
        try:
            rendered = self._render(_placeholders(roles))
        except Exception:  # a template is a program, and can fail in any way
            return False
        shown = {int(i) for i in _PLACEHOLDERS.findall(rendered)}
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


def _placeholders(roles: list[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": _PLACEHOLDER.format(i)} for i, role in enumerate(roles)]


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

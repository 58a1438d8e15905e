"""How one model's answers are written: what its chat template, as far as probes tell, trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from services.contract.conversation import Tool, ToolChoice
from services.contract.messages import Channel
from services.inference.engine.backend import Backend
from services.inference.engine.output.answer_format import ID, KEY, NAME, AnswerFormat
from services.inference.engine.output.answer_parser import FormatParser
from services.inference.engine.output.parts import AnswerParser, PlainParser
from services.inference.engine.prompt.answer_grammar import AnswerGrammar
from services.inference.engine.prompt.format_probe import FoundFormat

HOLES = (ID, KEY, NAME)


@dataclass(frozen=True)
class ModelFormat:
    """
    The format of a model's answers. `markers` are the control tokens that occur in it, whose piece
    is empty, with their text. `reasoning_end` are the tokens that close reasoning.
    """

    answer: AnswerFormat = AnswerFormat()
    reasoning_field: str = ""  # of messages; "content" for a part of the content; "": none
    wants_text_arguments: bool = False
    shows_calls: bool = False
    markers: Mapping[int, bytes] = field(default_factory=lambda: MappingProxyType({}))
    reasoning_end: tuple[int, ...] = ()
    ends: frozenset[str] = frozenset()  # texts of the tokens that end an answer

    @classmethod
    def of(
        cls, found: FoundFormat, backend: Backend, tokenize: Callable[[str, bool], list[int]]
    ) -> "ModelFormat":
        """Return the format for a model's vocabulary."""
        special = backend.special_tokens()
        text = "\n".join(found.answer.literals)
        markers = {
            id: token.text.encode()
            for id, token in special.items()
            if token.text in text and token.text.strip() and not backend.piece(id)
        }
        reasoning = found.answer.reasoning
        end = reasoning.end + reasoning.between if reasoning else ""
        return cls(
            found.answer,
            found.reasoning_field,
            found.wants_text_arguments,
            found.shows_calls,
            MappingProxyType({id: t for id, t in markers.items() if not backend.is_end(id)}),
            tuple(tokenize(end, True)) if end else (),
            frozenset(t.decode() for id, t in markers.items() if backend.is_end(id)),
        )

    def parser(self, tools: Sequence[Tool], channel: Channel = "content") -> AnswerParser:
        """Return a parser of one answer. `tools` are those that it may call."""
        if not tools and self.answer == AnswerFormat():
            return PlainParser()
        parameters = {tool.function.name: tool.function.parameters for tool in tools}
        return FormatParser(self.answer, parameters, channel)

    def prompt_channel(self, tail: str) -> Channel:
        """Return in which channel a prompt ends; `tail` is the template's text at its end."""
        reasoning = self.answer.reasoning
        if reasoning is None or self.answer.header:
            return "content"
        start, end = reasoning.start.strip(), reasoning.end.strip()
        return "reasoning" if tail.rfind(start) > tail.rfind(end) else "content"

    def closes_reasoning(self, tail: str) -> bool:
        """Return whether a prompt with this end has closed its reasoning already."""
        reasoning = self.answer.reasoning
        return reasoning is not None and reasoning.end.strip() in tail

    def answer_lark(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        parallel: bool | None,
        response: str | None,
        channel: Channel = "content",
        may_reason: bool = True,
    ) -> str | None:
        """
        Return Lark for an answer that must be a call or, if the model may choose, for calls or
        `response`, the Lark of any other answer. None: the answer is not constrained. Reasoning
        that the prompt has opened comes first; with `may_reason` the model may open it.

        Several calls are allowed if `parallel` is true, or None and no call is forced. Raises
        ServiceError(invalid_request) for a schema that can't be used.
        """
        grammar = AnswerGrammar(self.answer, self._tokens, self.ends)
        return grammar.lark(tools, choice, parallel, response, channel, may_reason)

    @property
    def _tokens(self) -> Mapping[str, int]:
        return {text.decode(): id for id, text in self.markers.items()}

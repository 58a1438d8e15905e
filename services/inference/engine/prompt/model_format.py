"""How one model's answers are written: what its chat template, as far as probes tell, trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from services.contract.conversation import Tool, ToolChoice
from services.contract.messages import Channel
from services.inference.engine.backend import Backend
from services.inference.engine.output.answer_format import HERMES, AnswerFormat
from services.inference.engine.output.answer_parser import FormatParser
from services.inference.engine.output.parts import AnswerParser, PlainParser
from services.inference.engine.prompt.answer_grammar import AnswerGrammar
from services.inference.engine.prompt.format_probe import FoundFormat

# Variables that templates read to think, or not: values for off and on; None: leave it unset.
THINKING_SWITCHES: Mapping[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "thinking_mode": ("disabled", "enabled"),
    "thinking_budget": (0, None),
}


@dataclass(frozen=True)
class ModelFormat:
    """
    The format of a model's answers. `markers` are the control tokens that occur in it, whose piece
    is empty, with their text. `reasoning_end` are the tokens that close reasoning.
    """

    found: FoundFormat = FoundFormat()
    markers: Mapping[int, bytes] = field(default_factory=lambda: MappingProxyType({}))
    reasoning_end: tuple[int, ...] = ()
    ends: frozenset[str] = frozenset()  # texts of the tokens that end an answer
    # Variables that are read to think, or not, with values as in THINKING_SWITCHES.
    switches: Mapping[str, tuple[Any, Any]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(
        cls,
        found: FoundFormat,
        switches: Mapping[str, tuple[Any, Any]],
        backend: Backend,
        tokenize: Callable[[str, bool], list[int]],
    ) -> "ModelFormat":
        """Return the format for a model's vocabulary."""
        special = backend.special_tokens()
        text = "\n".join(found.answer.literals)
        markers = {
            id: token.text.encode()
            for id, token in special.items()
            if token.text.strip() and token.text in text and not backend.piece(id)
        }
        reasoning = found.answer.reasoning
        turn = found.answer.next_turn
        end = reasoning.end + reasoning.between + turn if reasoning else ""
        return cls(
            found,
            MappingProxyType({id: t for id, t in markers.items() if not backend.is_end(id)}),
            tuple(tokenize(end, True)) if end else (),
            frozenset(t.decode() for id, t in markers.items() if backend.is_end(id)),
            MappingProxyType(switches),
        )

    @property
    def answer(self) -> AnswerFormat:
        return self.found.answer

    def variables(
        self,
        enable_thinking: bool | None,
        reasoning_effort: str | None,
        given: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """
        Return the template's variables for a request: `given` ones, and the template's own switches
        for the two fields, which win.
        """
        variables = dict(given)
        thinks = enable_thinking
        if thinks is None and reasoning_effort is not None:
            thinks = reasoning_effort != "none"
        if thinks is None:
            thinks = given.get("enable_thinking")
        if thinks is not None:
            values = {name: switch[thinks] for name, switch in self.switches.items()}
            own = {name: value for name, value in values.items() if value is not None}
            is_own_choice = enable_thinking is None and reasoning_effort is None
            variables = own | variables if is_own_choice else variables | own
            variables["enable_thinking"] = thinks
        if reasoning_effort not in (None, "none"):
            variables["reasoning_effort"] = reasoning_effort
        return variables

    def parser(self, tools: Sequence[Tool], channel: Channel = "content") -> AnswerParser:
        """Return a parser of one answer. `tools` are those that it may call."""
        if not tools and self.answer.is_plain:
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
        """Return whether a prompt with this end has closed its reasoning, or begun the content."""
        reasoning, begin = self.answer.reasoning, self.answer.content_start.strip()
        text = tail.rstrip()
        if begin and text.endswith(begin):
            return True
        return reasoning is not None and text.endswith(reasoning.end.strip())

    def answer_lark(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        parallel: bool | None = None,
        response: str | None = None,
        channel: Channel = "content",
        may_reason: bool = True,
    ) -> str | None:
        """
        Return Lark for an answer that must be a call or, if the model may choose, for calls or any
        other answer, whose Lark is `response`, with the rule `answer`. None: the answer is not
        constrained. Reasoning that the prompt has opened comes first; with `may_reason` the model
        may open it.

        Several calls are allowed if `parallel` is true, or None and no call is forced. Raises
        ServiceError(invalid_request) for a schema that can't be used.
        """
        form = self.answer
        if not self.found.is_native:
            form = form._replace(calls=HERMES, header=None)
        grammar = AnswerGrammar(form, self._tokens, self.ends)
        return grammar.lark(tools, choice, parallel, response, channel, may_reason)

    @property
    def _tokens(self) -> Mapping[str, int]:
        return {text.decode(): id for id, text in self.markers.items()}

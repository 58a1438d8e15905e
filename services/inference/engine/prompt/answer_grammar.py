"""
The grammar of answers in a model's own form, in llguidance's Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from collections.abc import Iterable, Mapping, Sequence

from services.contract.conversation import NamedTool, Tool, ToolChoice
from services.contract.messages import Channel
from services.inference.engine.output.answer_format import HERMES, NAME, AnswerFormat, ObjectFormat
from services.inference.engine.prompt.argument_grammar import ArgumentGrammar, arguments_schema
from services.inference.engine.prompt.lark_writer import LarkWriter, quote
from services.inference.engine.sampling.constraints import check_cost, schema_lark
from services.inference.engine.sampling.json_schema import rebase_refs

_SPACES = r"/[ \n]{0,4}/"


class AnswerGrammar:
    """
    Writes the Lark of one answer. `tokens` are the control tokens of markers by their text; `ends`
    are the texts of tokens that end an answer, which a grammar leaves out.
    """

    def __init__(
        self, form: AnswerFormat, tokens: Mapping[str, int], ends: Iterable[str] = ()
    ) -> None:
        self._form = form
        self._calls = form.calls or HERMES
        self._ends = frozenset(ends)
        self._writer = LarkWriter(tokens, ends)

    def lark(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        parallel: bool | None,
        response: str | None,
        channel: Channel,
        may_reason: bool,
    ) -> str | None:
        has_calls = bool(tools) and choice != "none"
        if response is None and (not has_calls or choice == "auto"):
            return None
        answers = []
        if has_calls:
            if isinstance(choice, NamedTool):
                tools = [tool for tool in tools if tool.function.name == choice.function.name]
            check_cost({"anyOf": [arguments_schema(tool) for tool in tools]}, "tools")
            is_forced = choice != "auto"
            self._add_calls(tools, not is_forced if parallel is None else parallel, is_forced)
            answers.append("calls")
        if response is not None and (choice == "auto" or not has_calls):
            is_begun = channel == "content" and not may_reason
            answers.append(self._writer.add("content", self._content("answer", is_begun)))
        start = f"start: {self._thought(channel, may_reason)} ({' | '.join(answers)})"
        rules = self._writer.rules.values()
        return "\n".join([start, *rules, *([response] if response else [])])

    def _thought(self, channel: Channel, may_reason: bool) -> str:
        reasoning = self._form.reasoning
        if reasoning is None or channel == "content" and not may_reason:
            return ""
        closed = self._writer.until(reasoning.end)
        turn = self._form.next_turn
        after = self._writer.text(turn) if turn else ""
        spaces = "" if self._form.header else _SPACES  # a header may begin with a space
        if channel == "reasoning":
            return f"{closed} {after} {spaces}"
        start = reasoning.start if self._form.header else reasoning.start.strip()
        return f"({spaces} {self._writer.text(start)} {closed} {after} {spaces})?"

    def _content(self, response: str, is_begun: bool) -> str:
        """Return Lark for a response in content, which the prompt may have begun."""
        form = self._form
        if form.header:
            optional = "?" if is_begun else ""
            return f"({self._writer.text(form.header.content)}){optional} {response}"
        if not form.content_start:
            return response
        start, end = self._writer.text(form.content_start), self._writer.text(form.content_end)
        return f"({start})? {response} ({end})?"

    # calls

    def _add_calls(self, tools: Sequence[Tool], is_parallel: bool, is_forced: bool) -> None:
        form, text = self._calls, self._writer.text
        is_marked = bool((form.section_open + form.call_open).strip())
        for number, tool in enumerate(tools):
            name = f"call{number}"
            self._writer.add(name, self._call(name, tool, not is_forced and not is_marked))
        self._writer.add("call", " | ".join(f"call{number}" for number in range(len(tools))))
        if self._form.header:
            more = f"({text(self._between_messages)} call)*" if self._between_messages else ""
            self._writer.add("calls", f"call {more if is_parallel else ''}")
            return
        close = form.call_close.rstrip()
        spaces = form.call_close[len(close) :]
        one = f"call {text(close)}"
        between = text(spaces + form.separator + form.call_open)
        more = f"({between} {one})*" if is_parallel and form.can_repeat else ""
        section_close = form.section_close.rstrip()
        end = text(spaces + section_close) if section_close else ""
        opened = text((form.section_open + form.call_open).lstrip())
        self._writer.add("calls", f"{self._before_calls(is_marked)} {opened} {one} {more} {end}")

    def _before_calls(self, is_marked: bool) -> str:
        """Return Lark for white space and empty content before calls."""
        if not is_marked:
            return ""
        start, end = self._form.content_start, self._form.content_end
        empty = f"({self._writer.text(start)} {self._writer.text(end)})?" if start else ""
        return f"{empty} {_SPACES}"

    @property
    def _between_messages(self) -> str:
        """The text between two messages with calls; "" if a call ends the answer."""
        header = self._form.header
        if not header or not header.ends:
            return header.start if header else ""
        is_end = header.call or header.ends[0] in self._ends
        return "" if is_end else header.ends[0] + header.start

    def _call(self, rule: str, tool: Tool, is_bare: bool) -> str:
        """Return Lark for a call: with its header, or between its opening and its closing text."""
        form, header, text = self._calls, self._form.header, self._writer.text
        if header is None:
            return self._body(rule, tool, is_bare)
        head = text(header.call_header.replace(NAME, tool.function.name))
        if header.call:
            return f"{head} {_json_arguments(tool)}"
        opened, closed = form.section_open + form.call_open, form.call_close + form.section_close
        return f"{head} {text(opened)} {self._body(rule, tool, is_bare)} {text(closed.rstrip())}"

    def _body(self, rule: str, tool: Tool, is_bare: bool) -> str:
        """Return Lark for name and arguments."""
        form, written, text = self._calls, self._calls.object, self._writer.text
        if written and is_bare:
            return _json_call(tool, written)
        if written:
            name = quote(tool.function.name)[1:-1]
            begin = text(written.begin + name + written.middle)
            return f"{begin} {_json_arguments(tool)} {text(written.end)}"
        arguments = _json_arguments(tool)  # rejects what can't be enforced
        if form.argument:
            arguments = ArgumentGrammar(self._writer, form.argument, tool, rule).lark()
        return f"{quote(tool.function.name)} {text(form.name_end)} {arguments}"


def _json_arguments(tool: Tool) -> str:
    return schema_lark(arguments_schema(tool), bool(tool.function.strict), "tools")


def _json_call(tool: Tool, form: ObjectFormat) -> str:
    """
    Return Lark for a call as JSON that matches a schema. If only its keys distinguish a call from
    other JSON, both must have the same lexemes.
    """
    key = form.arguments_key
    arguments = rebase_refs(arguments_schema(tool), f"/properties/{key}")
    properties = {form.name_key: {"const": tool.function.name}, key: arguments}
    call = {"type": "object", "properties": properties, "required": [form.name_key, key]}
    closed = call | {"additionalProperties": False}
    return schema_lark(closed, bool(tool.function.strict), "tools")

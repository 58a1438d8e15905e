"""
Finds out how a model writes its answers, by rendering conversations with its chat template.

The idea, and the pitfalls, are those of llama.cpp's docs/autoparser.md: texts around placeholders
are compared between renderings.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from services.inference.engine.output.answer_format import (
    ID,
    KEY,
    AnswerFormat,
    ArgumentFormat,
    CallFormat,
    HeaderFormat,
    ObjectFormat,
    ReasoningFormat,
    ValueSyntax,
)
from services.inference.engine.output.call_values import GEMMA_QUOTE
from services.inference.engine.prompt.known_formats import described_calls, known_format
from services.inference.engine.prompt.template_process import RenderFailure

Json = dict[str, Any]
Render = Callable[..., str]  # messages, tools, variables, add_generation_prompt to a prompt

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")
THINKING = {"enable_thinking": True, "thinking": True, "thinking_mode": "enabled"}
NOT_THINKING = {"enable_thinking": False, "thinking": False, "thinking_mode": "disabled"}

NAMESPACE, _SIGN = "]<]minimax[>[", "\ue013"  # brackets before a tag that enclose nothing

QUESTION, CONTENT, THOUGHT = "QUESTIONqX", "CONTENTqX", "THOUGHTqX"
DESCRIPTION, RESULT = "DESCRIPTIONqX", "RESULTqX"
NAMES, KEYS, VALUES = ("alphaqX", "betaqX"), ("firstqX", "nextqX"), ("oneqX", "twoqX")
IDS = ("qXqXqXqX1", "qXqXqXqX2")

_ELEMENT = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_OPEN_ELEMENT = re.compile(r"(<[^<>\s]+>\w*|\[/?[A-Z_]+\])\s*\Z")
_NEXT_ELEMENT = re.compile(r"\s*(</?[^<>\s]+>|\[[^\[\]]+\])")
_THINK_TAG = re.compile(r"<(/?)([\w:|]*(?:think|reason|thought)[\w:|]*)>")
_PARTIAL_ELEMENT = re.compile(r"[<\[][^<>\[\]]*\Z|[<\[]/?\Z")


class FoundFormat(NamedTuple):
    """
    The answer's format, and how the template wants its input. `reasoning_field` is the message
    field for earlier reasoning, "content" for a part of the content, or "" if it shows none.
    `sample` is rendered text with calls.
    """

    answer: AnswerFormat = AnswerFormat()
    reasoning_field: str = ""
    wants_text_arguments: bool = False
    accepts_text_arguments: bool = True  # also arguments that are no object
    is_native: bool = False  # the template shows tools, calls and results
    writes_calls: bool = True  # else they are written into the content
    takes_reasoning_beside: bool = True  # of content and calls
    sample: str = ""


class _Probe:
    """Renders one template. A rendering that fails is None."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self.wants_text = False

    def render(
        self,
        *messages: Json,
        tools: Sequence[Json] = (),
        variables: Mapping[str, Any] | None = None,
        is_prompt: bool = False,
    ) -> str | None:
        try:
            rendered = self._render(messages, tools, variables or {}, is_prompt)
            return rendered.replace(NAMESPACE + "<", "<" + _SIGN)
        except RenderFailure:
            return None

    def tail(self, *messages: Json, **options: Any) -> str | None:
        """Return what is rendered after the question."""
        text = self.render({"role": "user", "content": QUESTION}, *messages, **options)
        found = text.rfind(QUESTION) if text else -1
        return text[found + len(QUESTION) :] if text and found >= 0 else None

    def prompts(self, **options: Any) -> list[str]:
        """Return the ends of prompts, without and with thinking."""
        found = (
            self.tail(is_prompt=True, variables=each, **options)
            for each in ({}, NOT_THINKING, THINKING)
        )
        return list(dict.fromkeys(each for each in found if each is not None))

    def calls(self, count: int, arguments: Json | str, **fields: Any) -> str | None:
        """Return what is rendered after the question for an assistant's calls."""
        made = [
            {
                "id": IDS[i],
                "type": "function",
                "function": {
                    "name": NAMES[i],
                    "arguments": json.dumps(arguments) if self.wants_text else arguments,
                },
            }
            for i in range(count)
        ]
        variables = fields.pop("variables", None)
        message = {"role": "assistant", "content": "", "tool_calls": made} | fields
        return self.tail(message, tools=TOOLS, variables=variables)


def _tool(name: str) -> Json:
    properties = {key: {"type": "string", "description": "x"} for key in KEYS}
    parameters = {"type": "object", "properties": properties, "required": []}
    function = {"name": name, "description": DESCRIPTION, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [_tool(name) for name in NAMES]


def find_format(render: Render, source: str) -> FoundFormat:
    """Return the format of a template's answers. `source` is its Jinja."""
    probe = _Probe(render)
    known = known_format(source)
    field, before, after = _shown_reasoning(probe)
    reasoning = _reasoning(before, after)
    if not (reasoning or known):
        field, reasoning = "", _reasoning_of_prompts(probe, source)
    answer = known or _content_format(probe, AnswerFormat(reasoning))
    calls, sample = _calls(probe, answer)
    described = None if calls or answer.header else described_calls(source)
    if answer.header is None or not answer.header.call:
        answer = answer._replace(calls=calls or described)
    writes_calls = described is None
    shows_calls = bool(sample) or not writes_calls
    return FoundFormat(
        answer,
        field,
        wants_text_arguments=probe.wants_text,
        accepts_text_arguments=probe.calls(1, "text") is not None,
        is_native=shows_calls and _shows_tools(probe, writes_calls),
        writes_calls=writes_calls,
        takes_reasoning_beside=_takes_reasoning_beside(probe, field),
        sample=sample,
    )


def _shows_tools(probe: _Probe, with_calls: bool) -> bool:
    """Return whether a conversation shows tools, and results of calls."""
    text = _with_result(probe, with_calls)
    return text is not None and DESCRIPTION in text and RESULT in text and NAMES[0] in text


def _with_result(probe: _Probe, with_calls: bool = True) -> str | None:
    function = {"name": NAMES[0], "arguments": "{}" if probe.wants_text else {}}
    call = {"id": IDS[0], "type": "function", "function": function}
    message = {"role": "assistant", "content": "" if with_calls else CONTENT}
    result = {"role": "tool", "content": RESULT, "tool_call_id": IDS[0], "name": NAMES[0]}
    question = {"role": "user", "content": QUESTION}
    called = message | ({"tool_calls": [call]} if with_calls else {})
    return probe.render(question, called, result, tools=TOOLS, is_prompt=True)


def _takes_reasoning_beside(probe: _Probe, field: str) -> bool:
    if not field or field == "content":
        return True
    arguments = {KEYS[0]: VALUES[0]}
    plain = probe.calls(1, arguments, content=CONTENT)
    return (
        plain is None or probe.calls(1, arguments, content=CONTENT, **{field: THOUGHT}) is not None
    )


# reasoning


def _shown_reasoning(probe: _Probe) -> tuple[str, str, str]:
    """Return the field of reasoning, and the texts before and after it, if they are shown."""
    for field in (*REASONING_FIELDS, "content"):
        for text in _renderings_with_reasoning(probe, field):
            if text and text.count(THOUGHT) == 1:
                before, _, after = text.partition(THOUGHT)
                return field, before, after
    return "", "", ""


def _renderings_with_reasoning(probe: _Probe, field: str) -> Iterator[str | None]:
    plain: Json = {"role": "assistant", "content": CONTENT, field: THOUGHT}
    if field == "content":
        parts = ({"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": CONTENT})
        plain["content"] = list(parts)
    for variables in ({}, THINKING):
        yield probe.tail(plain, variables=variables)
    if field != "content":
        for text in (False, True):
            probe.wants_text = text
            for variables in ({}, THINKING):
                yield probe.calls(1, {KEYS[0]: VALUES[0]}, variables=variables, **{field: THOUGHT})
        probe.wants_text = False


def _reasoning(before: str, after: str) -> ReasoningFormat | None:
    start, end = _OPEN_ELEMENT.search(before), _NEXT_ELEMENT.match(after)
    if not start or not end:
        return None
    between = after[end.end() :].partition(CONTENT)
    spaces = re.match(r"\s*", between[0])
    opening = start[0]
    return ReasoningFormat(opening, after[: end.end()], "", spaces[0] if spaces else "")


def _reasoning_of_prompts(probe: _Probe, source: str) -> ReasoningFormat | None:
    """Return the tags that prompts open or close, or that the template removes from answers."""
    for text in (*probe.prompts(), source):
        if found := _THINK_TAG.search(text):
            return ReasoningFormat(f"<{found[2]}>", f"</{found[2]}>")
    return None


# content


def _content_format(probe: _Probe, answer: AnswerFormat) -> AnswerFormat:
    """Add markers around the content, and the repeated begin of a turn."""
    message = {"role": "assistant", "content": CONTENT}
    plain = probe.tail(message)
    thoughtful = probe.tail(message | dict.fromkeys(REASONING_FIELDS, THOUGHT))
    if plain is None or CONTENT not in plain:
        return answer
    before, _, after = plain.partition(CONTENT)
    begun = _without_prompt(before, probe.prompts())
    start = _without_reasoning(begun, answer.reasoning).strip()
    if not start:
        return answer
    closing = _NEXT_ELEMENT.match(after)
    end = closing[1] if closing else ""
    turn = ""
    if thoughtful and THOUGHT in thoughtful and answer.reasoning:
        between = thoughtful.partition(THOUGHT)[2].partition(CONTENT)[0]
        between = between.strip().removeprefix(answer.reasoning.end.strip())
        turn = between.removesuffix(start).strip()
    return answer._replace(content_start=start, content_end=end, turn=turn)


def _without_prompt(text: str, prompts: Sequence[str]) -> str:
    """Return the text after the longest prompt that it begins with."""
    lengths = [len(each) for each in prompts if text.startswith(each)]
    if lengths:
        return text[max(lengths) :]
    shared = max((commonprefix([text, each]) for each in prompts), key=len, default="")
    return text[len(_cut(shared)) :]


def _without_reasoning(text: str, reasoning: ReasoningFormat | None) -> str:
    """Remove an empty thought at the begin."""
    if reasoning is None:
        return text
    rest = text.lstrip().removeprefix(reasoning.start.strip()).lstrip()
    closed = rest.removeprefix(reasoning.end.strip())
    return closed if closed != rest else text


def _cut(text: str) -> str:
    """Return the text without a marker at its end that is incomplete."""
    return _PARTIAL_ELEMENT.sub("", text)


# calls


def _calls(probe: _Probe, answer: AnswerFormat) -> tuple[CallFormat | None, str]:
    """Return the format of calls, and a sample, if the template shows calls."""
    arguments = {KEYS[0]: VALUES[0], KEYS[1]: VALUES[1]}
    for wants_text in (False, True):
        probe.wants_text = wants_text
        one = probe.calls(1, arguments)
        if one and _shows_arguments(one):
            break
    else:
        probe.wants_text = False
        return None, ""
    two = probe.calls(2, arguments)
    if two and not all(name in two for name in NAMES):
        two = None
    prompts = probe.prompts(tools=TOOLS)
    one, two = (text and _body(text, prompts, answer) for text in (one, two))
    sample = _sample(probe, arguments).replace("<" + _SIGN, NAMESPACE + "<")
    if not one:
        return None, sample
    if (form := _object_calls(one, two, probe, answer)) is not None:
        return form, sample
    if (form := _named_calls(one, two, probe, answer)) is not None:
        return _with_namespace(form), sample
    return None, sample


def _with_namespace(form: CallFormat) -> CallFormat:
    def restore(fields: Any) -> Any:
        return [
            each.replace("<" + _SIGN, NAMESPACE + "<") if isinstance(each, str) else each
            for each in fields
        ]

    argument = form.argument and ArgumentFormat(*restore(form.argument))
    if argument and KEY in argument.close:
        argument = argument._replace(mids=argument.mids[:1], syntax="xml")
    return CallFormat(*restore(form))._replace(argument=argument)


def _shows_arguments(text: str) -> bool:
    return all(part in text for part in (NAMES[0], *KEYS, *VALUES)) and '\\"' not in text


def _sample(probe: _Probe, arguments: Json) -> str:
    made = probe.calls(2, arguments) or probe.calls(1, arguments) or ""
    return made + (_with_result(probe) or "")


def _body(text: str, prompts: Sequence[str], answer: AnswerFormat) -> str:
    """Return what the model writes of a rendered answer, and what follows it."""
    body = _without_prompt(text, prompts)
    is_continued = any(text.startswith(each) for each in prompts)
    if prompts and not is_continued and (last := _ELEMENT.findall(prompts[0])):
        body = body[body.find(last[-1]) + len(last[-1]) :] if last[-1] in body else body
    body = _without_reasoning(body, answer.reasoning)
    empty = answer.content_start.strip() + answer.content_end.strip()
    stripped = body.lstrip()
    if empty and stripped.startswith(empty):
        return stripped.removeprefix(empty)
    return body


class _Around(NamedTuple):
    """The texts around one call and between two. `between` is None if there can be only one."""

    before: str
    between: str | None
    after: str

    def split(self) -> tuple[str, str, str, str, str]:
        """Return section_open, call_open, call_close, separator and section_close."""
        if self.between is None:
            end = _NEXT_END.match(self.after)
            return "", self.before, end[0] if end else "", "", ""
        close = _cut(commonprefix([self.between, self.after]))
        rest = self.between[len(close) :]
        open_ = _common_suffix(rest, self.before)
        separator = rest[: len(rest) - len(open_)]
        section_open = self.before[: len(self.before) - len(open_)]
        return section_open, open_, close, separator, self.after[len(close) :]


_NEXT_END = re.compile(r"[^<\[]*(?:</[^<>\s]+>)?")


def _common_suffix(one: str, other: str) -> str:
    suffix = commonprefix([one[::-1], other[::-1]])[::-1]
    if len(suffix) == len(one):
        return suffix
    # not from within a marker
    start = one[: len(one) - len(suffix)]
    if partial := re.search(r"[<\[][^<>\[\]]*\Z", start):
        closing = re.search(r"[>\]]", suffix)
        return suffix[closing.end() :] if closing and partial else suffix
    return suffix


def _object_calls(
    one: str, two: str | None, probe: _Probe, answer: AnswerFormat
) -> CallFormat | None:
    """Return the format if calls are JSON objects that contain the name."""
    first = _object_around(one, NAMES[0])
    if first is None:
        return None
    start, end, form = first
    between = None
    if two and (second := _object_around(two, NAMES[1])):
        own = _object_around(two, NAMES[0])
        between = two[own[1] : second[0]] if own else None
    after = _until_end(one[end:], probe, answer)
    section_open, call_open, close, separator, section_close = _Around(
        one[:start], between, after
    ).split()
    if between is None:
        close = after
    return CallFormat(
        section_open,
        call_open,
        "",
        close,
        separator,
        section_close,
        form,
        can_repeat=between is not None,
    )


def _until_end(after: str, probe: _Probe, answer: AnswerFormat) -> str:
    """Return the text before the end of the turn, or before the begin of another one."""
    plain = probe.tail({"role": "assistant", "content": CONTENT}, tools=TOOLS) or ""
    end_of_turn = plain.partition(CONTENT)[2].strip().removeprefix(answer.content_end).strip()
    if end_of_turn:
        after = after.partition(end_of_turn)[0]
    if not answer.content_start:
        for element in _ELEMENT.findall((probe.prompts() or probe.prompts(tools=TOOLS) or [""])[0]):
            after = after.partition(element)[0]
    if answer.header:
        for element in answer.header.ends:
            after = after.partition(element)[0]
    return after


def _object_around(text: str, name: str) -> tuple[int, int, ObjectFormat] | None:
    """Return where the JSON object with a call begins and ends, and how it is written."""
    at = text.find(name)
    if at < 1 or text[at - 1] != '"':
        return None
    decoder = json.JSONDecoder()
    starts = [found.start() for found in re.finditer(r"\{", text[:at])]
    for start in reversed(starts):
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if end > at and (form := _object_form(value, text[start:end], name)):
            return start, end, form
    return None


def _object_form(value: Any, text: str, name: str) -> ObjectFormat | None:
    if not isinstance(value, dict):
        return None
    keys = [key for key, item in value.items() if item == name]
    arguments = [key for key, item in value.items() if isinstance(item, dict) and KEYS[0] in item]
    if not arguments:
        return None
    written = re.search(r"\{\s*" + json.dumps(KEYS[0]), text)
    if not written or not keys and arguments != [name]:
        return None
    _, end = json.JSONDecoder().raw_decode(text, written.start())
    at = text.find(name)
    begin, middle = text[:at], text[at + len(name) : written.start()]
    rest = text[end:]
    for each in IDS:
        begin, rest = begin.replace(each, ID), rest.replace(each, ID)
    begin = re.sub(r'(id": ")\d(")', rf"\g<1>{ID}\2", begin)
    return ObjectFormat(keys[0] if keys else "", arguments[0] if keys else "", begin, middle, rest)


def _named_calls(
    one: str, two: str | None, probe: _Probe, answer: AnswerFormat
) -> CallFormat | None:
    """Return the format if the name is outside of JSON."""
    at = _name_before_arguments(one)
    if at < 0:
        return None
    before, rest = one[:at], one[at + len(NAMES[0]) :]
    name_end, argument, after = _arguments(rest, probe)
    if name_end is None:
        return None
    after = _until_end(after, probe, answer)
    between = None
    if two:
        second = two.rfind(NAMES[1], 0, two.find(KEYS[0], two.find(NAMES[1])))
        start = two.rfind(VALUES[1], 0, second) + len(VALUES[1])
        between = two[start:second]
        if argument is None:
            between = between[between.find("}") + 1 :]
        else:
            between = _after_value(between, argument)
    if answer.header:
        before = before.rpartition(answer.header.body)[2]
        between = between and _without_header(between, answer.header)
    before, name_end = _with_id_holes(before), _with_id_holes(name_end)
    between = between and _with_id_holes(between)
    section_open, call_open, close, separator, section_close = _Around(
        before, between, after
    ).split()
    if between is None:
        close, section_close = after, ""
    if not (section_open + call_open).strip():
        return None
    return CallFormat(
        section_open,
        call_open,
        name_end,
        close,
        separator,
        section_close,
        argument=argument,
        can_repeat=between is not None,
    )


def _without_header(text: str, header: HeaderFormat) -> str:
    """Return the text between two calls without the header between them."""
    end = min((at for each in header.ends if (at := text.find(each)) >= 0), default=len(text))
    return text[:end] + text.rpartition(header.body)[2]


def _name_before_arguments(text: str) -> int:
    """Return where the name is written that the arguments follow."""
    return text.rfind(NAMES[0], 0, text.find(KEYS[0]))


def _with_id_holes(text: str) -> str:
    for each in IDS:
        text = text.replace(each, ID)
    text = re.sub(r"\A:\d(?=<)", f":{ID}", text)
    return re.sub(r'(index=")\d(")', rf"\g<1>{ID}\2", text)


def _after_value(text: str, argument: ArgumentFormat) -> str:
    quote = _quote_at(text)
    return text.removeprefix(quote).removeprefix(argument.close.replace(KEY, KEYS[1]))


def _quote_at(text: str) -> str:
    return next((q for q in (GEMMA_QUOTE, '"', "'") if text.startswith(q)), "")


def _arguments(rest: str, probe: _Probe) -> tuple[str | None, ArgumentFormat | None, str]:
    """Return the text between name and arguments, the arguments' format, and the text after."""
    written = re.search(r"\{\s*" + json.dumps(KEYS[0]), rest)
    if written:
        try:
            _, end = json.JSONDecoder().raw_decode(rest, written.start())
        except ValueError:
            return None, None, ""
        return rest[: written.start()], None, rest[end:]
    first_key, first, next_key, second = (
        rest.find(part) for part in (KEYS[0], VALUES[0], KEYS[1], VALUES[1])
    )
    if not first_key < first < next_key < second:
        return None, None, ""
    before = rest[:first_key]
    mid = rest[first_key + len(KEYS[0]) : first]
    # the texts after the two values; a key that is repeated there becomes a hole
    joint = rest[first + len(VALUES[0]) :].replace(KEYS[0], KEY)
    joint = joint[: joint.find(KEYS[1])]
    after = rest[second + len(VALUES[1]) :].replace(KEYS[1], KEY)
    quote = _quote_at(joint)
    joint, after, mid = (
        joint.removeprefix(quote),
        after.removeprefix(quote),
        mid.removesuffix(quote),
    )
    close = "" if quote else _cut(commonprefix([joint, after]))
    open_ = _common_suffix(joint[len(close) :], before)
    separator = joint[len(close) : len(joint) - len(open_)]
    mids = (("string", mid), *(() if quote else _other_mids(probe)))
    argument = ArgumentFormat(open_, mids, close, separator, _syntax(probe, quote))
    return before[: len(before) - len(open_)], argument, after[len(close) :]


def _syntax(probe: _Probe, quote: str) -> ValueSyntax:
    """Return how strings are written that have this mark around them, or none."""
    if quote:
        return "gemma" if quote == GEMMA_QUOTE else "python"
    written = probe.calls(1, {KEYS[0]: "a<b>\nc"}) or ""
    return "cdata" if "<![CDATA[" in written else "raw"


def _other_mids(probe: _Probe) -> Iterator[tuple[str, str]]:
    """Yield the texts between key and value for values that are no strings."""
    values = {"number": 4711, "boolean": True, "null": None, "object": {"a": 1}, "array": [1]}
    for kind, value in values.items():
        text = probe.calls(1, {KEYS[0]: value}) or ""
        at = text.find(KEYS[0]) + len(KEYS[0])
        written = _WRITTEN[kind].search(text, at)
        if at >= len(KEYS[0]) and written:
            yield kind, text[at : written.start()]


_WRITTEN = {
    "number": re.compile("4711"),
    "boolean": re.compile("true|True"),
    "null": re.compile(r"(?<=[>\n])(?:null|None)"),
    "object": re.compile(r"\{"),
    "array": re.compile(r"\["),
}

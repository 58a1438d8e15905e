"""Answers as the templates that llama.cpp ships render them, to be parsed again."""

import json
import re
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from services.contract.conversation import ChatMessage, Function, FunctionCall, Tool, ToolCall
from services.contract.messages import Channel
from services.inference.engine.output.parts import (
    AnswerParser,
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    ReasoningDelta,
    text_of,
)
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.prompt.model_format import THINKING_SWITCHES
from services.inference.engine.prompt.template_renderer import Json
from tests.inference.engine.prompt.shipped_templates import SOURCES
from tests.inference.fake_backend import FakeBackend

TOOLS = (
    Tool(
        Function(
            "act",
            "acts",
            {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "x"},
                    "more": {"type": "string", "description": "x"},
                    "count": {"type": "integer", "description": "x"},
                    "ratio": {"type": "number", "description": "x"},
                    "flag": {"type": "boolean", "description": "x"},
                    "data": {
                        "type": "object",
                        "description": "x",
                        "additionalProperties": {"type": "string"},
                        "properties": {
                            "a": {"type": "array"},
                            "h": {
                                "type": "array",
                                "prefixItems": [
                                    {"type": kind}
                                    for kind in ("string", "integer", "object", "array", "null")
                                ],
                            },
                        },
                    },
                },
                "required": [],
            },
        )
    ),
    Tool(
        Function(
            "go_to.place",
            "goes",
            {
                "type": "object",
                "properties": {"where": {"type": "string", "description": "x"}},
                "required": ["where"],
            },
        )
    ),
)
ARGUMENTS: dict[str, Json] = {
    "plain": {"text": "Rome", "count": 12},
    "quotes": {"text": 'say "hi", it\'s \\ {x} [y] (z) a=b, c: d', "more": "'"},
    "lines": {"text": "def f():\n    return 1\n\n# end", "count": -3},
    "tags": {"text": "<b>bold</b> </x> <p=q> a<b>c && [INST] {{ y }}", "flag": False},
    "emoji": {"text": "🙂 é 中文 «x»", "more": "a\tb"},
    "nested": {
        "data": {"a": [1, 2.5, {"b": "c, d"}], "e": 'f"g', "h": ["1", 2, {}, [], None, True]}
    },
    "values": {"flag": True, "ratio": -0.5, "count": 0},
    "empty": {},
    "numbers in strings": {"text": "42", "more": "true"},
    "empty string": {"text": "", "count": 1},
}
QUESTION, CONTENT = "What now?", "I look *at* it: 1 < 2.\n\n- one"
THOUGHT = "First <b>this</b>,\nthen {that}."


class Answer(NamedTuple):
    """What a model said: reasoning, content, and calls as names with arguments."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, Any], ...]


class Turn(NamedTuple):
    """An answer, the text that a model generates for it, and where its prompt ends."""

    answer: Answer
    text: str
    channel: Channel


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(
        SOURCES[name], FakeBackend({}, 10**7), bos="<s>", eos="<EOS>", adds_bos=False
    )


VARIABLES: tuple[Json, ...] = (
    {name: on for name, (_, on) in THINKING_SWITCHES.items() if on is not None},
    {},
)


def rendered(name: str, answer: Answer, variables: Json, *more: ChatMessage) -> str:
    """Return the conversation after its question. A template may raise anything."""
    chat = template(name)
    calls = tuple(
        ToolCall(f"call{i:05}", FunctionCall(called, json.dumps(arguments, ensure_ascii=False)))
        for i, (called, arguments) in enumerate(answer.calls)
    )
    messages = [ChatMessage("user", QUESTION)]
    if answer != Answer("", "", ()):
        messages.append(
            ChatMessage(
                "assistant",
                answer.content,
                tool_calls=calls or None,
                reasoning=answer.reasoning or None,
            )
        )
    messages += more
    given, dicts = chat._tools.template_input(messages, TOOLS)
    if not chat._renderer.has_system_role and given[0]["role"] == "system":
        text = f"{given[0]['content']}\n\n{given[1]['content']}"
        given = [given[1] | {"content": text}, *given[2:]]
    is_prompt = len(messages) == 1
    text = chat._renderer.render(given, dicts, variables, is_prompt)
    return text.rpartition(QUESTION)[2]


def turn(name: str, answer: Answer, *more: ChatMessage) -> Turn:
    """
    Return the part of a rendered turn that the model generates. A template that leaves out content
    or reasoning makes an answer without them. One that takes the last answer for the begin of a
    thought shows another answer if `more` follows.
    """
    chat = template(name)
    for variables in VARIABLES:
        try:
            text = rendered(name, answer, variables, *more)
        except Exception:
            if len(answer.calls) < 2:
                raise
            return turn(name, answer._replace(calls=answer.calls[:1]), *more)
        if answer.reasoning in text:
            break
    end = _end_of_turn(name, variables)
    reasoning = chat.format.answer.reasoning
    start = reasoning.start.strip() if reasoning else ""
    off = {switch: values[0] for switch, values in chat.format.switches.items()}
    prompts = [rendered(name, Answer("", "", ()), each) for each in (*VARIABLES, off)]
    prompts += [prompt.partition(start)[0] for prompt in prompts if start]
    begun = [prompt for prompt in prompts if text.startswith(prompt)]
    prompt = max(begun, key=len, default="")
    if not begun:  # the prompt repeats an instruction that the rendered turn lacks
        last = re.findall(r"<[^<>]+>", prompts[0])[-1]
        prompt = text[: text.find(last) + len(last)]
    channel = chat.format.prompt_channel(prompt)
    body = text[len(prompt) :]
    if channel == "reasoning" and reasoning and reasoning.end not in body and not more:
        return turn(name, answer, ChatMessage("user", "And then?"))
    if start and start not in text and answer.reasoning and answer.reasoning in body:
        channel = chat.format.prompt_channel(prompts[0])  # the template leaves out the opening
    body = body.rpartition(end)[0] if end in body else body
    for token in ENDS:
        body = body.removesuffix(token)
    shown = Answer(
        answer.reasoning if answer.reasoning in body else "",
        answer.content if answer.content in body else "",
        answer.calls[: _shown_calls(answer, body)],
    )
    return Turn(shown, body, channel)


# Tokens that end an answer and that templates write after calls.
ENDS = ("<|tool_response>", "<|calls|>", "<|eom_id|>", "<｜hy_eos:opensource｜>", "<|call|>")


def _shown_calls(answer: Answer, body: str) -> int:
    """Return how many calls are shown; some templates show one, or none beside content."""
    if all(name in body for name, _ in answer.calls):
        return len(answer.calls)
    return int(answer.calls[0][0] in body)


def _end_of_turn(name: str, variables: Json) -> str:
    plain = rendered(name, Answer("", "CONTENTqX", ()), variables).rpartition("CONTENTqX")[2]
    return plain.strip().removeprefix(template(name).format.answer.content_end).strip() or "\0"


def parse(parser: AnswerParser, pieces: list[str]) -> list[AnswerPart]:
    parts: list[AnswerPart] = []
    for piece in pieces:
        parts += parser.push(piece)
    return merged([*parts, *parser.flush()])


def merged(parts: list[AnswerPart]) -> list[AnswerPart]:
    """Join consecutive deltas of one kind."""
    joined: list[AnswerPart] = []
    for part in parts:
        if joined and type(part) is type(joined[-1]) and not isinstance(part, CallStart):
            part = type(part)(text_of(joined.pop()) + text_of(part))
        joined.append(part)
    return joined


def read(parts: list[AnswerPart]) -> Answer:
    """Return the answer that the parts spell."""

    def text(kind: type[AnswerPart]) -> str:
        return "".join(text_of(part) for part in parts if isinstance(part, kind))

    calls = [
        (first.name, json.loads(text_of(second)))
        for first, second in pairwise([*parts, ArgumentsDelta("")])
        if isinstance(first, CallStart)
    ]
    return Answer(text(ReasoningDelta).strip(), text(ContentDelta).strip(), tuple(calls))


def answers() -> dict[str, Answer]:
    """Return answers of all kinds by name."""
    plain = ("act", ARGUMENTS["plain"])
    place = ("go_to.place", {"where": "a b"})
    calls = {f"{name} arguments": (("act", each),) for name, each in ARGUMENTS.items()}
    return {
        "content": Answer("", CONTENT, ()),
        "thought": Answer(THOUGHT, CONTENT, ()),
        **{name: Answer("", "", each) for name, each in calls.items()},
        "thought and call": Answer(THOUGHT, "", (plain,)),
        "content and two calls": Answer("", CONTENT, (plain, place)),
        "all": Answer(THOUGHT, CONTENT, (("act", {}), place, ("act", ARGUMENTS["quotes"]))),
    }

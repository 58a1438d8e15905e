"""
Formats that rendering does not show: answers begin inside a header, say, or the template tells how
to write calls, but can't render them. They are known by texts of the template.
"""

from services.inference.engine.output.answer_format import (
    NAME,
    AnswerFormat,
    ArgumentFormat,
    CallFormat,
    HeaderFormat,
    ObjectFormat,
    ReasoningFormat,
)

HARMONY = HeaderFormat(
    "<|start|>assistant",
    "<|message|>",
    ("<|end|>", "<|call|>", "<|return|>"),
    r"to=functions\.([^\s<>]+)",
    "analysis",
    r"\s*(?:to?|(?:<|to=)(?:(?!<\|(?:call|end|start|return)\|>)[A-Za-z0-9_\s.=<|>:-])*)?",
    "<|channel|>final<|message|>",
    f" to=functions.{NAME}<|channel|>commentary json<|message|>",
)
MUSE = HeaderFormat(
    "<|start|>assistant",
    "<|message|>",
    ("<|eom|>", "<|eot|>"),
    "",
    "to=self",
    r"\s*(?:to?|to=[A-Za-z0-9_.:-]*(?:<[|\w]*)?)?",
    " to=user<|message|>",
    f" to={NAME}<|message|>",
)
# Prompts end with `>>>`.
FUNCTIONARY = HeaderFormat(
    ">>>", "\n", (), r"\A(?!all\Z)([\w.-]+)\Z", "", r"[\w.-]*", "all\n", f"{NAME}\n"
)


_MUSE = AnswerFormat(ReasoningFormat(" to=self<|message|>", "<|eom|>"), header=MUSE)

# Texts that a template has, and the format of its answers
_ANSWERS: tuple[tuple[tuple[str, ...], AnswerFormat], ...] = (
    (
        ("<|channel|>analysis<|message|>",),
        AnswerFormat(ReasoningFormat("<|channel|>analysis<|message|>", "<|end|>"), header=HARMONY),
    ),
    (("to=self<|message|>",), _MUSE),
    (("assistant to=self",), _MUSE),
    (
        ("[BEGIN FINAL RESPONSE]", "Here are my reasoning steps:"),  # Apriel
        AnswerFormat(
            ReasoningFormat("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n")
        ),
    ),
    (
        ("<|open|>", "<|sep|>"),  # Kimi K3
        AnswerFormat(
            ReasoningFormat("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
            content_start="<|open|>response<|sep|>",
            content_end="<|close|>response<|sep|>",
        ),
    ),
    ((">>>all",), AnswerFormat(header=FUNCTIONARY)),
)
# A text that a template has, and the format of calls that it tells or implies, but can't render
_CALLS = {
    "List of tools: ": CallFormat(  # LFM2
        "<|tool_call_start|>[",
        "",
        "(",
        ")",
        ", ",
        "]<|tool_call_end|>",
        argument=ArgumentFormat("", (("string", "="),), "", ", ", "python"),
    ),
    "<|tool_call|> followed by a JSON list": CallFormat(  # Granite 3
        "<|tool_call|>[",
        separator=", ",
        section_close="]",
        object=ObjectFormat("name", "arguments", '{"name": "', '", "arguments": ', "}"),
    ),
}


def known_format(source: str) -> AnswerFormat | None:
    """Return the format of a template's answers, if it is known."""
    return next((form for texts, form in _ANSWERS if all(each in source for each in texts)), None)


def described_calls(source: str) -> CallFormat | None:
    """Return the format of a template's calls, if it is known."""
    return next((form for text, form in _CALLS.items() if text in source), None)

"""A whole conversation in the format of OpenAI's API: messages, tools and tool calls."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

ToolName = Annotated[str, Meta(min_length=1, max_length=256)]
ToolCallId = Annotated[str, Meta(max_length=256)]


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class FunctionCall(Struct, frozen=True):
    """
    A tool call as a model wrote it: any name, and arguments that need not be a JSON object. Past
    calls go into the prompt without validation.
    """

    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    """
    An assistant's message may have `tool_calls` and `reasoning`. A tool's result names its
    `tool_call_id`.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """Return the content, with one part per line."""
        if isinstance(self.content, tuple):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ToolResult(Struct, frozen=True):
    """The result of a tool call in a session's last answer."""

    tool_call_id: ToolCallId
    content: str


class Function(Struct, frozen=True, omit_defaults=True):
    """
    `parameters` is a JSON schema of an object. Forced calls are constrained to it, like answers to
    the schema of a response format.
    """

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    function: Function
    type: Literal["function"] = "function"


class FunctionName(Struct, frozen=True):
    name: ToolName


class NamedTool(Struct, frozen=True):
    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool
MAX_MESSAGES = 10_000
Conversation = Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=MAX_MESSAGES)]
ToolResults = Annotated[tuple[ToolResult, ...], Meta(max_length=128)]
Tools = Annotated[tuple[Tool, ...], Meta(min_length=1, max_length=1024)]

"""
Translates the body of Anthropic's `/v1/messages` to that of a chat completion.
https://docs.anthropic.com/en/api/messages
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from services.contract.errors import ServiceError
from services.edge.api.fields import NOT_TEXT, Fields, honoured, names
from services.edge.api.openai_requests import ChatCompletionBody
from services.edge.api.translation import NULL, Object, Translation, _decode, _invalid
from services.edge.errors import DetailedError

Json = dict[str, Any]


class MessagesRequest(Struct, frozen=True, kw_only=True):
    """The fields of a body that are honoured, as they are sent."""

    model: str | None = None
    messages: Annotated[tuple[Json, ...], Meta(min_length=1)]
    max_tokens: int | None = None
    system: str | tuple[Json, ...] | None = None
    tools: tuple[Json, ...] | None = None
    tool_choice: Json | None = None
    thinking: Json | None = None
    output_config: Json | None = None
    output_format: Json | None = None
    stop_sequences: tuple[str, ...] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


BODY = Fields(
    honoured(MessagesRequest),
    names("metadata service_tier container context_management cache_control inference_geo speed"),
    {"mcp_servers": "the server calls no tools: send them in `tools`"},
)
MESSAGE = Fields(names("role content"), names("id type model stop_reason stop_sequence usage"))
BLOCK = Fields(
    names("type text thinking signature data id name input tool_use_id content"),
    names("cache_control citations is_error caller"),
)
TOOL = Fields(
    names("type name description input_schema strict"),
    names("cache_control eager_input_streaming defer_loading input_examples allowed_callers"),
)
CHOICE = Fields(names("type name disable_parallel_tool_use"))
OUTPUT = Fields(names("format effort"))
FORMAT = Fields(names("type schema"), names("name"))
RENAMED = {"stop_sequences": "stop"}
"""Fields that a chat completion has under another name."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
CLIENT_TOOLS = ("custom", "function")
REASONING_BLOCKS = ("thinking", "redacted_thinking")

# Claude Code puts a header of this kind, different in each request, at the start of `system`: the
# rest of the prompt would never be found in the prefix cache.
# https://github.com/anthropics/claude-code/issues/24168
_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")


class MessagesBody(ChatCompletionBody, frozen=True, kw_only=True):
    """The body of `POST /v1/messages`, as that of a chat completion."""


def to_chat(translation: Translation, given: Object) -> dict[str, Any]:
    """Return the fields of MessagesBody. Raises ServiceError."""
    return translation.chat(_Messages(translation).chat_body(given))


class _Messages:
    """Rewrites one body; fields without effect are noted in the translation."""

    def __init__(self, translation: Translation) -> None:
        self._translation = translation

    def chat_body(self, given: Object) -> Object:
        _reject_thread(given)
        body = self._translation.keep(given, BODY, "$")
        self._translation.renamed |= {ours: theirs for theirs, ours in RENAMED.items()}
        output = self._output(body)
        messages = [*self._system(body.pop("system", None)), *self._messages(body)]
        fields: dict[str, Any] = {RENAMED.get(name, name): value for name, value in body.items()}
        fields |= output | self._choice(fields.pop("tool_choice", None)) | {"messages": messages}
        if "tools" in fields:
            fields["tools"] = self._tools(fields["tools"])
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant" and not last.get("tool_calls"):
            fields["continue_final_message"] = True
        return {name: Raw(msgspec.json.encode(value)) for name, value in fields.items()}

    # --- fields of the body ---

    def _system(self, given: Raw | None) -> Iterator[dict[str, Any]]:
        if given is None:
            return
        value = self._text_or_blocks(given, "$.system")
        blocks = [value] if isinstance(value, str) else self._texts(value, "$.system")
        if text := "\n".join(filter(None, (_BILLING.sub("", block) for block in blocks))):
            yield {"role": "system", "content": text}

    def _output(self, body: dict[str, Any]) -> dict[str, Any]:
        """Remove the fields for the format of the answer, and return ours."""
        found: dict[str, Any] = {}
        given = body.pop("output_format", None)
        path = "$.output_format"
        if config := body.pop("output_config", None):
            kept = self._keep(config, OUTPUT, "$.output_config")
            found = {"reasoning_effort": kept["effort"]} if "effort" in kept else {}
            given, path = kept.get("format", given), "$.output_config.format"
        if given is not None:
            schema = {"name": "answer", "schema": self._keep(given, FORMAT, path).get("schema")}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        return found

    def _choice(self, given: Raw | None) -> dict[str, Any]:
        if given is None:
            return {}
        choice = self._keep(given, CHOICE, "$.tool_choice")
        kind = _decode(choice.get("type", Raw(b'"auto"')), str, "$.tool_choice.type")
        if kind != "tool" and kind not in CHOICES:
            raise _invalid(
                f"The tool choice `{kind}` is unknown: use auto, any, tool or none", "$.tool_choice"
            )
        named = {"type": "function", "function": {"name": choice.get("name")}}
        fields: dict[str, Any] = {"tool_choice": CHOICES.get(kind, named)}
        if "disable_parallel_tool_use" in choice:
            path = "$.tool_choice.disable_parallel_tool_use"
            is_one = _decode(choice["disable_parallel_tool_use"], bool, path)
            fields["parallel_tool_calls"] = not is_one
        return fields

    def _tools(self, given: Raw) -> list[dict[str, Any]]:
        tools = self._translation.decode_foreign(given, list[Object], "$.tools")
        return [self._tool(tool, f"$.tools[{n}]") for n, tool in enumerate(tools)]

    def _tool(self, given: Object, path: str) -> dict[str, Any]:
        kind = _decode(given.get("type", Raw(b'"custom"')), str, f"{path}.type")
        if kind not in CLIENT_TOOLS:
            raise _invalid(f"The tool type `{kind}` is not supported: only `custom` is", path)
        tool = self._translation.keep(given, TOOL, path)
        tool.pop("type", None)
        if "input_schema" in tool:
            tool["parameters"] = tool.pop("input_schema")
        return {"type": "function", "function": tool}

    # --- messages ---

    def _messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        messages = body.pop("messages", Raw(b"[]"))
        given = self._translation.decode_foreign(messages, list[Object], "$.messages")
        return [
            message
            for number, each in enumerate(given)
            for message in self._message(each, f"$.messages[{number}]")
        ]

    def _message(self, given: Object, path: str) -> Iterator[dict[str, Any]]:
        """Yield the results of tools as messages of their own, before the text beside them."""
        message = self._translation.keep(given, MESSAGE, path)
        content = self._text_or_blocks(message.get("content", Raw(b'""')), f"{path}.content")
        role = _decode(message.get("role", Raw(b'""')), str, f"{path}.role")
        if isinstance(content, str):
            yield {"role": role, "content": content}
            return
        parts: list[dict[str, Any]] = []
        calls: list[dict[str, Any]] = []
        for number, given_block in enumerate(content):
            block_path = f"{path}.content[{number}]"
            block = self._translation.keep(given_block, BLOCK, block_path)
            match _decode(block.get("type", Raw(b'""')), str, f"{block_path}.type"):
                case "text":
                    parts.append({"type": "text", "text": block.get("text", "")})
                case "tool_use":
                    calls.append(_call(block))
                case "tool_result":
                    yield self._result(block, f"{block_path}.content")
                case kind if kind in REASONING_BLOCKS:
                    parts.append(block)
                case kind:
                    raise _invalid(f"The block type `{kind}` is not supported: {NOT_TEXT}", path)
        if parts or calls:
            yield {"role": role, "content": parts} | ({"tool_calls": calls} if calls else {})

    def _result(self, block: Mapping[str, Any], path: str) -> dict[str, Any]:
        value = self._text_or_blocks(block.get("content", Raw(b'""')), path)
        text = value if isinstance(value, str) else "\n".join(self._texts(value, path))
        return {"role": "tool", "tool_call_id": block.get("tool_use_id", ""), "content": text}

    def _texts(self, blocks: list[Object], path: str) -> list[str]:
        texts = []
        for number, given in enumerate(blocks):
            block = self._translation.keep(given, BLOCK, f"{path}[{number}]")
            kind = _decode(block.get("type", Raw(b'"text"')), str, f"{path}[{number}].type")
            if kind != "text":
                raise _invalid(f"The block type `{kind}` is not supported: {NOT_TEXT}", path)
            texts.append(_decode(block.get("text", Raw(b'""')), str, f"{path}[{number}].text"))
        return texts

    def _text_or_blocks(self, given: Raw, path: str) -> Any:
        """Decode a text or a list of blocks."""
        return self._translation.decode_foreign(given, str | list[Object], path)

    def _keep(self, given: Raw, kind: Fields, path: str) -> dict[str, Any]:
        return self._translation.keep(_decode(given, Object, path), kind, path)


def _reject_thread(given: Object) -> None:
    """
    Raise DetailedError for a body that begins or continues a conversation on the server. Its
    `error_code` makes Anthropic's clients, whose tool runner tries this first, send all messages.
    """
    if bytes(given.get("thread", NULL)) == NULL:
        return
    message = "The field `thread` is not supported: send the whole conversation in `messages`."
    details = {"error_code": "thread_unsupported_request", "unsupported": []}
    raise DetailedError(ServiceError("invalid_request", message), message, details=details)


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = bytes(block.get("input", b"{}")).decode()
    function = {"name": block.get("name", ""), "arguments": arguments}
    return {"id": block.get("id", ""), "type": "function", "function": function}

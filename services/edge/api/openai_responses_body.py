"""Bodies of `/v1/responses` and `/v1/conversations`, and their translation from any client."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from services.contract.conversation import ToolChoice, Tools
from services.contract.history import Metadata
from services.contract.messages import (
    MaxTokens,
    ModelName,
    ReasoningEffort,
    Sampling,
    Stop,
)
from services.edge.api import fields
from services.edge.api.fields import Fields, honoured, names
from services.edge.api.openai_responses_items import (
    REFERENCE,
    Item,
    function_call,
    function_call_output,
    message,
    reasoning,
)
from services.edge.api.openai_responses_objects import decode_reasoning
from services.edge.api.translation import (
    Object,
    Translation,
    _decode,
    _invalid,
    _text,
)

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"


class ConversationReference(Struct, frozen=True):
    id: str


class ResponseBody(Sampling, frozen=True, kw_only=True):
    """The body of `POST /v1/responses`, and of `POST /v1/responses/input_tokens`."""

    model: ModelName | None = None
    input: str | tuple[dict[str, Any], ...] = ()  # items are translated
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationReference | None = None
    store: bool = True
    stream: bool = False
    background: bool = False
    truncation: Literal["auto", "disabled"] = "disabled"
    max_output_tokens: MaxTokens | None = None
    max_tool_calls: int | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Meta(max_length=32)] | None = None  # type: ignore[assignment]
    tools: Tools | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: tuple[str, ...] = ()
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: Metadata = {}
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @property
    def items(self) -> list[Item]:
        """Return the input as items. Those without an id are complete but for it."""
        return [message("user", [self.input])] if isinstance(self.input, str) else [*self.input]

    @property
    def conversation_id(self) -> str | None:
        given = self.conversation
        return given.id if isinstance(given, ConversationReference) else given

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the fields of `Sampling`, with those that have other names here."""
        given = {name: getattr(self, name) for name in Sampling.__struct_fields__}
        wants_logprobs = LOGPROBS in self.include or self.top_logprobs
        limits = (self.max_output_tokens, self.max_tokens, self.max_completion_tokens)
        return given | {
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "max_tokens": None,
            "max_completion_tokens": min(filter(None, limits), default=None),
            "logprobs": (self.top_logprobs or 0) if wants_logprobs else None,
        }

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the fields that the response repeats, without those at their defaults."""
        same = (
            "instructions", "background", "store", "truncation", "max_output_tokens",
            "max_tool_calls", "parallel_tool_calls", "temperature", "top_p", "top_logprobs",
            "text", "reasoning", "metadata", "prompt_cache_key", "safety_identifier", "user",
        )  # fmt: skip
        defaults = ResponseBody()
        values = {name: getattr(self, name) for name in same}
        repeated = {k: v for k, v in values.items() if v != getattr(defaults, k)}
        if self.tools:
            tools = msgspec.to_builtins(self.tools)
            repeated["tools"] = [_flat(tool) for tool in tools]
        if self.tool_choice != "auto":
            choice = msgspec.to_builtins(self.tool_choice)
            repeated["tool_choice"] = choice if isinstance(choice, str) else _flat(choice)
        return repeated


class ConversationBody(Struct, frozen=True):
    """The body of `POST /v1/conversations`, and of its routes for metadata and items."""

    items: tuple[dict[str, Any], ...] = ()  # are translated
    metadata: Metadata = {}


RESPONSE = Fields(
    honoured(ResponseBody, *fields.SYNONYMS) - {"logprobs"},
    names("""
        service_tier prompt_cache_retention prompt_cache_options stream_options moderation
        context_management client_metadata personality access_programs background_options n
        provider extra_body extra_headers timeout
    """),
    {
        "prompt": "send the text of the template as `instructions` and `input`",
        "messages": "send them as `input`",
        "image": "the model generates text only",
    },
)
CONVERSATION = Fields(honoured(ConversationBody))
TEXT = Fields(names("format verbosity"))
TEXT_FORMAT = Fields(names("type name schema strict description"))
REASONING = Fields(names("effort summary generate_summary"), names("context mode"))
MESSAGE = Fields(names("type role content id status phase name"), names("annotations metadata"))
CALL = Fields(
    names("type call_id name arguments input id status"), names("caller namespace async created_by")
)
OUTPUT = Fields(
    names("type call_id output id status name"), names("caller namespace created_by is_error")
)
THOUGHT = Fields(names("type summary content encrypted_content id status"), names("format"))
HOSTED = names("""
    file_search_call web_search_call computer_call computer_call_output code_interpreter_call
    image_generation_call local_shell_call local_shell_call_output shell_call shell_call_output
    apply_patch_call apply_patch_call_output mcp_list_tools mcp_approval_request
    mcp_approval_response mcp_call tool_search_call tool_search_output compaction ghost_snapshot
    program program_output additional_tools configuration_update
""")
"""Items that the tools of other servers have made. The model can't read them."""
ROLES = ("user", "system", "developer", "assistant")


class ResponsesTranslation(Translation):
    """Translates one body. Every method raises ServiceError."""

    def response(self, given: Object) -> dict[str, Any]:
        body = self._body(given, RESPONSE)
        if "input" in body:
            body["input"] = self._input(body["input"], "$.input")
        if "text" in body:
            self._translate_text(body)
        if "reasoning" in body:
            self._translate_reasoning(body)
        self._translate_tools(body)
        return body

    def conversation(self, given: Object) -> dict[str, Any]:
        body = self.keep(given, CONVERSATION, "$")
        if "items" in body:
            body["items"] = self._input(body["items"], "$.items")
        return body

    def _translate_text(self, body: dict[str, Any]) -> None:
        """Set the answer's format. OpenAI's chat API has the schema in an object of its own."""
        text = self.keep(_decode(body["text"], Object, "$.text"), TEXT, "$.text")
        if "verbosity" in text:
            self._ignore("text.verbosity")
        path = "$.text.format"
        given = _decode(text.get("format", Raw(b'{"type":"text"}')), Object, path)
        chosen = self.keep(given, TEXT_FORMAT, path)
        body["text"] = {**text, "format": chosen}
        if bytes(chosen.get("type", b"")) == b'"json_schema"':
            schema = {name: value for name, value in chosen.items() if name != "type"}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            body["response_format"] = chosen

    def _translate_reasoning(self, body: dict[str, Any]) -> None:
        path = "$.reasoning"
        options = self.keep(_decode(body["reasoning"], Object, path), REASONING, path)
        for name in ("summary", "generate_summary"):
            if name in options:
                self._ignore(f"reasoning.{name}")
        body["reasoning"] = {"effort": None, "summary": None, **options}
        if "effort" in options:
            self._set_default(body, "reasoning_effort", options["effort"], "reasoning")

    def _translate_tools(self, body: dict[str, Any]) -> None:
        given = _decode(body.pop("tools", Raw(b"[]")), list[Object], "$.tools")
        functions = []
        for tool in given:
            kind = _decode(tool.get("type", Raw(b'"function"')), str, "$.tools[].type")
            if kind == "function":
                functions.append(tool)
            else:  # a client like Codex offers them to every server
                self._ignore(f"$.tools[].{kind}")
        if tools := self._tools(Raw(msgspec.json.encode(functions))):
            body["tools"] = tools
        self._translate_choice(body)

    # --- items ---

    def _input(self, given: Raw, path: str) -> Raw | list[Item]:
        if bytes(given)[:1] == b'"':
            return given
        parts = _decode(given, list[Object], path)
        self._count(parts)
        found = [self._item(each, f"{path}[{n}]") for n, each in enumerate(parts)]
        return [item for item in found if item is not None]

    def _item(self, given: Object, path: str) -> Item | None:
        """Return None for an item that the model can't read, and need not."""
        kind = _decode(given.get("type", Raw(b'"message"')), str, f"{path}.type")
        match kind:
            case "message":
                return self._input_message(given, path)
            case "function_call" | "custom_tool_call":
                return self._function_call(given, path)
            case "function_call_output" | "custom_tool_call_output":
                kept = self.keep(given, OUTPUT, path)
                output = self._joined(kept.get("output", Raw(b'""')), f"{path}.output")
                return function_call_output(self._id(kept, "call_id", path), output)
            case "reasoning":
                return self._thought(given, path)
            case _ if kind == REFERENCE:
                return {"type": kind, "id": self._id(given, "id", path)}
        if kind not in HOSTED:
            raise _invalid(f"The item type `{kind}` is not supported: remove the item", path)
        self._ignore(f"{path}.{kind}")
        return None

    def _input_message(self, given: Object, path: str) -> Item:
        kept = self.keep(given, MESSAGE, path)
        role = _decode(kept.get("role", Raw(b'"user"')), str, f"{path}.role")
        if role not in ROLES:
            raise _invalid(f"Invalid enum value {role!r:.50}", f"{path}.role")
        texts = self._texts(kept.get("content", Raw(b'""')), f"{path}.content")
        return message(role, texts)

    def _function_call(self, given: Object, path: str) -> Item:
        """Accept any name and arguments, because a model wrote them."""
        kept = self.keep(given, CALL, path)
        arguments = kept.get("arguments", Raw(b'""'))
        if "input" in kept:  # of a custom tool
            arguments = Raw(msgspec.json.encode(f'{{"input":{bytes(kept["input"]).decode()}}}'))
        name, text = (_decoded_text(each, path) for each in (kept.get("name"), arguments))
        return function_call(self._id(kept, "call_id", path), name, text)

    def _thought(self, given: Object, path: str) -> Item:
        kept = self.keep(given, THOUGHT, path)
        text = self._reasoning_text(kept.get("content", Raw(b"[]")), f"{path}.content")
        if not text and "encrypted_content" in kept:
            encoded = _decode(kept["encrypted_content"], str, f"{path}.encrypted_content")
            text = decode_reasoning(encoded)
        text = text or self._reasoning_text(kept.get("summary", Raw(b"[]")), f"{path}.summary")
        if not text:
            self._ignore(f"{path}.encrypted_content")
        return reasoning(text)

    def _texts(self, given: Raw, path: str) -> list[str]:
        """Return the text of each part of a content."""
        if bytes(given)[:1] == b'"':
            return [_decode(given, str, path)]
        parts = _decode(given, list[Raw], path)
        self._count(parts)
        found = [self._part(part, f"{path}[{n}]", is_answer=False) for n, part in enumerate(parts)]
        texts = [part["text"] for part in found if isinstance(part, dict)]
        return [_decode(text, str, path) if isinstance(text, Raw) else text for text in texts]

    def _joined(self, given: Raw, path: str) -> str:
        """Return the text of a tool's output, which may be any JSON."""
        if bytes(given)[:1] == b"[":
            return "\n".join(self._texts(given, path))
        return _decoded_text(given, path)

    def _id(self, given: Object, name: str, path: str) -> str:
        if name not in given:
            raise _invalid(f"Object missing required field `{name}`", path)
        return _decode(given[name], str, f"{path}.{name}")


def _decoded_text(given: Raw | None, path: str) -> str:
    text = _text(given)
    return _decode(text, str, path) if isinstance(text, Raw) else text


def _flat(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool, or a choice of one, in the form of this API."""
    defaults = {"parameters": None, "strict": None} if "parameters" in tool["function"] else {}
    return {"type": "function", **defaults, **tool["function"]}

"""Validation of requests beyond their types, for edge and worker, and keys derived from them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from services.contract import responses, subjects
from services.contract.codec import encode
from services.contract.conversation import ChatMessage, ToolResult
from services.contract.errors import ServiceError
from services.contract.messages import (
    ChatRequest,
    JsonSchemaFormat,
    PromptRequest,
    TextFormat,
    ToolCallDelta,
)

MAX_BYTES = 64 * 1024
"""Of a prompt: ten exchanges and a prompt fit the NATS message limit of 1 MiB."""
MAX_CONVERSATION_BYTES = 512 * 1024
"""Of a stateless request, as JSON."""
MAX_DEPTH = 64
"""Nesting levels of a schema, and of the arguments of tool calls."""
NO_REASONING = "none"
"""The `reasoning_effort` that turns reasoning off."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates that must be booleans: the string "false" would be true."""
RESERVED_VARIABLES = frozenset(
    "messages tools documents add_generation_prompt bos_token eos_token".split()
)
"""Variables of chat templates that a request has other fields for, or that the model sets."""
ROUTING_CHARACTERS = 1000
"""Length of the prefix of a text that selects the worker."""


def is_stateless(request: ChatRequest) -> bool:
    """Return whether the request contains its whole prompt, so that no session is used."""
    return request.messages is not None or request.text is not None


def stored_session(request: ChatRequest) -> str | None:
    """Return the id of the session that the answer is appended to; None: it is not stored."""
    if request.turn is not None:
        return responses.session_of(request.request_id or "")
    return None if is_stateless(request) else request.session_id


def asked(request: ChatRequest) -> tuple[str, tuple[ToolResult, ...]]:
    """
    Return the prompt and the tool results of the request's exchange: of a conversation, what comes
    after its last answer.
    """
    if request.messages is None:
        return request.prompt, request.tool_results or ()
    answers = [i for i, m in enumerate(request.messages) if m.role == "assistant"]
    new = request.messages[answers[-1] + 1 if answers else 0 :]
    texts = [message.text for message in new if message.role == "user"]
    results = [ToolResult(m.tool_call_id or "", m.text) for m in new if m.role == "tool"]
    return "\n".join(texts), tuple(results)


def routing_key(tenant: str, request: ChatRequest) -> str:
    """
    Return the key that selects the worker: the session, or without one the prefix of the request,
    which the next turns of its conversation repeat.
    """
    if request.session_id:
        return subjects.session_key(tenant, request.session_id)
    return f"{tenant}.{_digest(_prefix(request))}"


def conversation_key(tenant: str, request: ChatRequest) -> str:
    """
    Return the key under which the worker caches the tokens of the conversation for its next turn.

    A stateless conversation is identified by its session and its first user message, so that a
    request for the chat's title has another key. Empty for a single question without a session,
    which will hardly have a next turn.
    """
    if session_id := stored_session(request):
        return subjects.session_key(tenant, session_id)
    has_answers = any(message.role == "assistant" for message in request.messages or ())
    if not has_answers and not request.session_id:
        return ""
    return f"{tenant}.={_digest(request.session_id, _prefix(request))}"


def is_stateless_key(key: str) -> bool:
    """Return whether the conversation key is that of a stateless conversation."""
    return "=" in key  # no session key has one


def _prefix(request: ChatRequest) -> str:
    if not request.messages:
        return str(request.text)[:ROUTING_CHARACTERS]
    first_user = next((i for i, m in enumerate(request.messages) if m.role == "user"), 0)
    return "".join(message.text for message in request.messages[: first_user + 1])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def size_bytes(request: ChatRequest) -> int:
    """Return the size of the prompt in bytes, an upper bound of its tokens without a template."""
    if request.text is not None:
        return len(request.text.encode()) if isinstance(request.text, str) else len(request.text)
    if request.messages is not None:
        return _tools_bytes(request) + sum(
            len(text.encode()) for m in request.messages for text in _texts(m)
        )
    results = sum(len(result.content.encode()) for result in request.tool_results or ())
    return len((request.prompt + request.prefix).encode()) + results + _tools_bytes(request)


def _tools_bytes(request: ChatRequest) -> int:
    return len(msgspec.json.encode(request.tools)) if request.tools else 0


def check(prompt: PromptRequest) -> None:
    """
    Validate a request.

    Raises ServiceError: payload_too_large, or invalid_request if the prompt is blank or fields
    contradict each other.
    """
    check_template_kwargs(prompt.chat_template_kwargs or {})
    if prompt.enable_thinking and prompt.reasoning_effort == NO_REASONING:
        raise ServiceError(
            "invalid_request",
            "The field `enable_thinking` is true, but `reasoning_effort` is `none`: remove one of"
            " them.",
        )
    _check_tools(prompt)
    if isinstance(prompt, ChatRequest):
        _check_turn(prompt)
        _check_resume(prompt)
    if isinstance(prompt.response_format, JsonSchemaFormat):
        check_depth("response_format", prompt.response_format.json_schema.schema)
    if isinstance(prompt, ChatRequest) and is_stateless(prompt):
        _check_stateless(prompt)
    else:
        _check_prompt(prompt)
    if prompt.grammar and not isinstance(prompt.response_format, TextFormat | None):
        raise ServiceError(
            "invalid_request",
            "Both `grammar` and `response_format` constrain the answer: remove one of them.",
        )
    _check_min_tokens(prompt)


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise ServiceError(invalid_request) if these can't be variables for the chat template."""
    check_depth("chat_template_kwargs", kwargs)
    for name, value in kwargs.items():
        if not name.isidentifier() or name in RESERVED_VARIABLES:
            raise ServiceError(
                "invalid_request",
                f"The field `chat_template_kwargs` can't set {name!r:.100}: remove it.",
            )
        if name in SWITCHES and not isinstance(value, bool):
            raise ServiceError(
                "invalid_request", f"Expected `bool` - at `$.chat_template_kwargs.{name}`."
            )


def _check_min_tokens(prompt: PromptRequest) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        maximum = getattr(prompt, field)
        if maximum is not None and (prompt.min_tokens or 0) > maximum:
            raise ServiceError(
                "invalid_request",
                f"The field `min_tokens` is {prompt.min_tokens}, but `{field}` is {maximum}: lower"
                " the one or raise the other.",
            )


def check_depth(field: str, value: Any) -> None:
    """Raise ServiceError(invalid_request) if the JSON has too many nesting levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for parent in level for part in _containers(parent)]
        if not level:
            return
    raise ServiceError(
        "invalid_request", f"The field `{field}` is nested deeper than {MAX_DEPTH} levels."
    )


def _containers(parent: Any) -> list[Any]:
    """Return the lists and objects directly inside a list or an object."""
    if not isinstance(parent, dict | list):
        return []
    values = parent.values() if isinstance(parent, dict) else parent
    return [value for value in values if value.__class__ is dict or value.__class__ is list]


def check_conversation_bytes(what: str, size: int) -> None:
    """Raise ServiceError(payload_too_large) above MAX_CONVERSATION_BYTES."""
    if size > MAX_CONVERSATION_BYTES:
        raise ServiceError(
            "payload_too_large",
            f"The {what} has {size:,} bytes; the maximum is {MAX_CONVERSATION_BYTES:,}. Shorten"
            " it.",
        )


def context_exceeded(field: str, tokens: str, context: int) -> ServiceError:
    """
    Return the error for a prompt that alone exceeds the context window.

    LiteLLM and others recognise it by the start of its message
    (litellm/litellm_core_utils/exception_mapping_utils.py).
    """
    return ServiceError(
        "context_length_exceeded",
        f"This model's maximum context length is {context} tokens. However, the field `{field}` has"
        f" {tokens} tokens: shorten it, or serve the model with a larger MODEL_CONTEXT.",
    )


def _check_prompt(prompt: PromptRequest) -> None:
    if not prompt.prompt.strip() and not (prompt.tool_results and not prompt.prompt):
        raise ServiceError(
            "invalid_request", "The field `prompt` is missing or blank. Send a text."
        )
    if not prompt.session_id:
        raise ServiceError("invalid_request", "The field `session_id` is empty: remove it.")
    if responses.is_session(prompt.session_id):
        raise ServiceError(
            "invalid_request",
            f"The session {prompt.session_id!r} belongs to /v1/responses: continue it there.",
        )
    results = "".join(result.content for result in prompt.tool_results or ())
    if (size := len((prompt.prompt + results + prompt.prefix).encode())) > MAX_BYTES:
        raise ServiceError(
            "payload_too_large",
            f"The prompt has {size:,} bytes; the maximum is {MAX_BYTES:,}. Shorten it.",
        )
    if isinstance(prompt, ChatRequest) and prompt.continue_final:
        message = "`continue_final` needs `messages`: send `prefix` instead."
        raise ServiceError("invalid_request", message)


def _check_turn(request: ChatRequest) -> None:
    """Check what names the session of a response, and keeps other requests out of it."""
    if request.turn is None:
        return
    if not request.messages or not responses.is_request_id(request.request_id or ""):
        raise ServiceError(
            "invalid_request",
            "A request with `turn` needs `messages`, and a `request_id` of 64 hexadecimal digits:"
            " send both, or leave out `turn`.",
        )
    check_depth("turn", [*request.turn.input, request.turn.parameters])


def _check_resume(request: ChatRequest) -> None:
    """Check that tool calls of the resumed answer begin in order, as Answer requires."""
    begun = 0
    for event in request.resume.events if request.resume else ():
        if not isinstance(event, ToolCallDelta):
            continue
        if not 0 <= event.index <= begun:
            raise ServiceError(
                "invalid_request",
                f"In `resume`, tool call {event.index} follows {begun} calls: send all events of"
                " the answer, unchanged.",
            )
        begun = max(begun, event.index + 1)


def _check_stateless(request: ChatRequest) -> None:
    for field in ("retry_of", "tool_results", "prefix"):
        if getattr(request, field):
            needed = f"`{field}` needs a session: send `prompt` instead."
            raise ServiceError("invalid_request", needed)
    given = [name for name in ("prompt", "messages", "text") if getattr(request, name)]
    if len(given) != 1:
        sent = " and ".join(given) or "none"
        raise ServiceError(
            "invalid_request",
            f"Send exactly one of `prompt`, `messages` and `text`; you sent {sent}.",
        )
    check_conversation_bytes("conversation", len(encode(replace(request, resume=None))))
    for number, message in enumerate(request.messages or ()):
        if wrong := _fault(message):
            raise ServiceError("invalid_request", f"{wrong} - at `$.messages[{number}]`.")
    if request.continue_final and (not request.messages or not _is_answer(request.messages[-1])):
        raise ServiceError(
            "invalid_request",
            "Only a last message of the assistant without tool calls can be continued: add it, or"
            " remove `continue_final_message`.",
        )


def _is_answer(message: ChatMessage) -> bool:
    return message.role == "assistant" and not message.tool_calls


def _fault(message: ChatMessage) -> str | None:
    """Return what is wrong with a message. Text of a model or tool is not validated."""
    if message.content is None and message.role not in ("assistant", "tool"):
        return f"A message of {message.role!r} needs `content`"
    if message.tool_calls and message.role != "assistant":
        return f"A message of {message.role!r} has no `tool_calls`"
    return None


def _check_tools(request: PromptRequest) -> None:
    for tool in request.tools or ():
        check_depth("tools", tool.function.parameters)
    names = [tool.function.name for tool in request.tools or ()]
    if len(set(names)) < len(names):
        raise ServiceError("invalid_request", "Two tools have the same name - at `$.tools`.")
    choice = request.tool_choice
    if choice == "required" and not names:
        raise ServiceError(
            "invalid_request",
            "The field `tool_choice` is `required`, but there are no `tools`: send some.",
        )
    if not isinstance(choice, str) and choice.function.name not in names:
        raise ServiceError(
            "invalid_request", "The field `tool_choice` names a tool that `tools` lacks."
        )
    if names and choice != "none" and request.grammar:
        raise ServiceError(
            "invalid_request",
            "The field `grammar` can't be combined with tools: remove one of them, set tool_choice"
            " to none, or use response_format, which can be combined with tools.",
        )


def _texts(message: ChatMessage) -> list[str]:
    calls = [call.function.arguments for call in message.tool_calls or ()]
    return [message.text, message.reasoning or "", *calls]

"""What a request may be beyond its type: checked alike by the edge and by the worker."""

import hashlib
from typing import Any

import msgspec
from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import encode
from services.contract.conversation import ChatMessage
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, JsonSchemaFormat, PromptRequest, TextFormat

MAX_BYTES = 64 * 1024
"""So that ten exchanges and a prompt fit NATS's message limit of 1 MiB."""
MAX_CONVERSATION_BYTES = 512 * 1024
"""As JSON."""
MAX_DEPTH = 64
"""Levels of a schema, and of tool call arguments that a template gets as JSON."""
ROUTING_CHARACTERS = 1000
"""Characters of a plain text that a worker is chosen by."""


def is_stateless(request: ChatRequest) -> bool:
    """Whether it brings all that the model is shown."""
    return request.messages is not None or request.text is not None


def routing_key(tenant: str, request: ChatRequest) -> str:
    """
    What its worker is chosen by: the session; where that is nobody's, the beginning of what it
    brings, which a conversation's next turns repeat.
    """
    if request.session_id:
        return subjects.session_key(tenant, request.session_id)
    return f"{tenant}.{_digest(_beginning(request))}"


def conversation_key(tenant: str, request: ChatRequest) -> str:
    """
    Whose tokens are kept for a next turn. Where a caller keeps a conversation, its beginning tells
    it, beside the session: a request for the chat's title is another one. Empty: nobody's, as
    nothing says that it is more than a single question.
    """
    if not is_stateless(request):
        return subjects.session_key(tenant, request.session_id)
    goes_on = any(message.role == "assistant" for message in request.messages or ())
    if not goes_on and not request.session_id:
        return ""
    return f"{tenant}.={_digest(request.session_id, _beginning(request))}"  # no session has a `=`


def _beginning(request: ChatRequest) -> str:
    if not request.messages:
        return str(request.text)[:ROUTING_CHARACTERS]
    asked = next((i for i, m in enumerate(request.messages) if m.role == "user"), 0)
    return "".join(message.text for message in request.messages[: asked + 1])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def size_bytes(request: ChatRequest) -> int:
    """
    Bytes of all that is to be read: never fewer than its tokens, but for what a template adds.
    """
    if request.text is not None:
        return len(request.text.encode()) if isinstance(request.text, str) else len(request.text)
    if request.messages is not None:
        tools = len(msgspec.json.encode(request.tools)) if request.tools else 0
        return tools + sum(len(text.encode()) for m in request.messages for text in _texts(m))
    return len(request.prompt.encode())


def check(prompt: PromptRequest) -> None:
    """
    Raises ServiceError: payload_too_large for a long one, invalid_request for a blank one, or for
    fields that contradict each other.
    """
    if isinstance(prompt.response_format, JsonSchemaFormat):
        check_depth("response_format", prompt.response_format.json_schema.schema)
    if isinstance(prompt, ChatRequest) and is_stateless(prompt):
        _check_stateless(prompt)
    else:
        _check_prompt(prompt)
    if prompt.grammar and not isinstance(prompt.response_format, TextFormat | None):
        raise ServiceError(
            "invalid_request",
            "Both grammar and response_format say what the answer must be: leave one of them out.",
        )


def check_depth(field: str, value: Any) -> None:
    """
    Raises ServiceError(invalid_request) for JSON that is nested deeper than those who follow it can
    go.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for parent in level for part in _containers(parent)]
    if level:
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
            f"The {what} has {size:,} bytes, and {MAX_CONVERSATION_BYTES:,} is the most: shorten"
            " it.",
        )


def context_exceeded(field: str, tokens: str, context: int) -> ServiceError:
    """
    Return the error for a prompt that doesn't fit even alone. LiteLLM and others recognise it by
    the start of its message (litellm/litellm_core_utils/exception_mapping_utils.py).
    """
    return ServiceError(
        "context_length_exceeded",
        f"This model's maximum context length is {context} tokens. However, the field `{field}` has"
        f" {tokens} tokens: shorten it, or serve the model with a larger MODEL_CONTEXT.",
    )


def _check_prompt(prompt: PromptRequest) -> None:
    if not prompt.prompt.strip():
        raise ServiceError("invalid_request", "The prompt is blank: it must say something.")
    if not prompt.session_id:
        raise ServiceError("invalid_request", "The field `session_id` is empty: leave it out.")
    if (size := len(prompt.prompt.encode())) > MAX_BYTES:
        raise ServiceError(
            "payload_too_large",
            f"The prompt has {size:,} bytes, and {MAX_BYTES:,} is the most: shorten it.",
        )


def _check_stateless(request: ChatRequest) -> None:
    if request.retry_of:
        raise ServiceError("invalid_request", "`retry_of` is for an exchange of a session.")
    given = [name for name in ("prompt", "messages", "text") if getattr(request, name)]
    if len(given) != 1:
        raise ServiceError("invalid_request", f"Give one of prompt, messages and text: {given}.")
    for tool in request.tools or ():
        check_depth("tools", tool.function.parameters)
    check_conversation_bytes("conversation", len(encode(replace(request, resume=None))))
    for number, message in enumerate(request.messages or ()):
        if wrong := _fault(message):
            raise ServiceError("invalid_request", f"{wrong} - at `$.messages[{number}]`.")
    _check_tools(request)


def _fault(message: ChatMessage) -> str | None:
    """Check what a caller can mistype. Text of a model or a tool is accepted as it is."""
    if message.content is None and message.role not in ("assistant", "tool"):
        return f"A message of {message.role!r} needs `content`"
    if message.tool_calls and message.role != "assistant":
        return f"A message of {message.role!r} has no `tool_calls`"
    return None


def _check_tools(request: ChatRequest) -> None:
    names = [tool.function.name for tool in request.tools or ()]
    if len(set(names)) < len(names):
        raise ServiceError("invalid_request", "Two functions in `$.tools` have the same name.")
    choice = request.tool_choice
    if isinstance(choice, str):
        wanted = choice == "required" and not names
    else:
        wanted = choice.function.name not in names
    if wanted:
        raise ServiceError(
            "invalid_request", "The field `tool_choice` asks for a function that `tools` lacks."
        )
    if names and choice != "none" and request.grammar:
        raise ServiceError(
            "invalid_request",
            "The field `grammar` can't be combined with tools: remove one of them, set tool_choice"
            " to none, or use response_format, which can be combined with tools.",
        )


def _texts(message: ChatMessage) -> list[str]:
    calls = [call.function.arguments for call in message.tool_calls or ()]
    return [message.text, *calls]

"""
Translates the bodies of Ollama's API to those of a chat completion.
https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from services.contract.conversation import MAX_MESSAGES, ChatMessage
from services.contract.errors import ServiceError
from services.edge.api.fields import NOT_TEXT, Fields, honoured, names
from services.edge.api.openai_requests import ChatCompletionBody
from services.edge.api.translation import Object, Translation, _decode

Json = dict[str, Any]


class OllamaChat(Struct, frozen=True, kw_only=True):
    """The fields of `POST /api/chat` that are honoured, as they are sent."""

    model: str = ""
    messages: tuple[Json, ...] = ()
    tools: tuple[Json, ...] | None = None
    think: bool | str | None = None
    format: str | Json | None = None
    options: Json | None = None
    stream: bool = True


class OllamaGenerate(Struct, frozen=True, kw_only=True):
    """The fields of `POST /api/generate` that are honoured, as they are sent."""

    model: str = ""
    prompt: str = ""
    system: str | None = None
    think: bool | str | None = None
    format: str | Json | None = None
    options: Json | None = None
    stream: bool = True


_IGNORED = names("keep_alive template context logprobs top_logprobs truncate shift")
_REJECTED = {
    "images": NOT_TEXT,
    "suffix": "the model can only continue a text",
    "raw": "send it to /v1/completions",
}
CHAT = Fields(honoured(OllamaChat), _IGNORED, _REJECTED)
GENERATE = Fields(honoured(OllamaGenerate), _IGNORED, _REJECTED)
MESSAGE = Fields(
    names("role content thinking tool_calls tool_name tool_call_id"), names("id"), _REJECTED
)
RENAMED_OPTIONS = {"num_predict": "max_tokens"}
OPTIONS = Fields(
    names("""
        num_predict temperature top_k top_p min_p typical_p repeat_penalty repeat_last_n
        presence_penalty frequency_penalty seed stop mirostat mirostat_tau mirostat_eta
    """),
    names("""
        num_ctx num_keep num_batch num_gpu main_gpu num_thread numa low_vram use_mmap use_mlock
        penalize_newline tfs_z f16_kv vocab_only draft_num_predict
    """),
)
LATEST = ":latest"
"""The tag that Ollama's clients put behind a name without one."""


class OllamaBody(ChatCompletionBody, frozen=True, kw_only=True):
    """A body of `/api/chat` as that of a chat completion; without messages it loads a model."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=MAX_MESSAGES)]


class OllamaGenerateBody(OllamaBody, frozen=True, kw_only=True):
    """The same of `/api/generate`."""


def to_chat(translation: Translation, given: Object) -> dict[str, Any]:
    """Return the fields of OllamaBody for a body of `/api/chat`. Raises ServiceError."""
    body = translation.keep(given, CHAT, "$")
    messages = translation.decode_foreign(
        body.pop("messages", Raw(b"[]")), list[Object], "$.messages"
    )
    fields = _shared(body, translation) | {
        "messages": [
            _message(each, translation, f"$.messages[{n}]") for n, each in enumerate(messages)
        ]
    }
    if "tools" in body:
        fields["tools"] = body["tools"]
    return translation.chat(_encoded(fields))


def prompt_to_chat(translation: Translation, given: Object) -> dict[str, Any]:
    """Return the fields of OllamaBody for a body of `/api/generate`. Raises ServiceError."""
    body = translation.keep(given, GENERATE, "$")
    turns = (("system", body.pop("system", Raw(b'""'))), ("user", body.pop("prompt", Raw(b'""'))))
    fields = _shared(body, translation)
    fields["messages"] = [
        {"role": role, "content": text} for role, text in turns if bytes(text) != b'""'
    ]
    return translation.chat(_encoded(fields))


def without_tag(name: str) -> str:
    return name.removesuffix(LATEST)


def _shared(body: dict[str, Any], translation: Translation) -> dict[str, Any]:
    """Return the fields that both bodies have."""
    fields: dict[str, Any] = {"stream": body.get("stream", True)}
    if "model" in body:
        fields["model"] = without_tag(_decode(body["model"], str, "$.model"))
    if "think" in body:
        fields["think"] = body["think"]
    if "format" in body:
        fields |= _format(translation.decode_foreign(body["format"], str | Json, "$.format"))
    if "options" in body:
        translation.renamed |= {ours: theirs for theirs, ours in RENAMED_OPTIONS.items()}
        options = _decode(body["options"], Object, "$.options")
        for name, value in translation.keep(options, OPTIONS, "$.options").items():
            fields[RENAMED_OPTIONS.get(name, name)] = value
        if bytes(fields.get("max_tokens", b"")) == b"-2":  # fill the context
            del fields["max_tokens"]
    return fields


def _format(given: str | Json) -> dict[str, Any]:
    if given == "":
        return {}
    if given == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(given, str):
        raise ServiceError("invalid_request", "The field `format` must be `json` or a JSON schema.")
    return {"json_schema": given}


def _message(given: Object, translation: Translation, path: str) -> dict[str, Any]:
    message = translation.keep(given, MESSAGE, path)
    if "tool_name" in message:
        message["name"] = message.pop("tool_name")
    return message


def _encoded(fields: dict[str, Any]) -> Object:
    return {name: Raw(msgspec.json.encode(value)) for name, value in fields.items()}

"""
Reads the bodies of /v1: size checks, translation, decoding. The response header X-Ignored-Fields
names the fields without effect.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec
from litestar.types import Message, Scope
from msgspec import Struct
from msgspec.structs import replace

from services.contract import prompts
from services.contract.codec import check_utf8, decode
from services.contract.errors import ServiceError
from services.contract.messages import ModelKind
from services.edge.api import anthropic_body, ollama_body
from services.edge.api.anthropic_body import MessagesBody
from services.edge.api.fields import Fields, honoured
from services.edge.api.ollama_body import OllamaBody, OllamaGenerateBody
from services.edge.api.openai_requests import (
    ChatCompletionBody,
    CompletionBody,
    EmbeddingBody,
    RerankBody,
)
from services.edge.api.openai_responses_body import (
    ConversationBody,
    ResponseBody,
    ResponsesTranslation,
)
from services.edge.api.translation import Object, Translation
from services.edge.errors import AnyRequest
from services.edge.limits import EdgeLimits

IGNORED_FIELDS = "X-Ignored-Fields"
STATE = "ignored_fields"
MAX_NAMES = 20  # in the header
MAX_NAME_LENGTH = 80
MAX_LOGGED_NAMES = 1000
_PATH = re.compile(r"(?<=`\$\.)\w+")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")

KINDS: dict[type[Struct], ModelKind] = {EmbeddingBody: "embedding", RerankBody: "rerank"}
"""Of the models that bodies name, where it is not `chat`."""

log = logging.getLogger(__name__)
B = TypeVar("B", bound=Struct)


class BodyReader:
    """
    Reads bodies; with `is_strict`, an unknown field is an error. `to_served`, if given, returns the
    model of a kind that is meant by a name.
    """

    def __init__(
        self,
        limits: EdgeLimits,
        is_strict: bool = False,
        to_served: Callable[[str, ModelKind], str | None] | None = None,
    ) -> None:
        self._limits = limits
        self._is_strict = is_strict
        self._to_served = to_served
        self._logged: set[str] = set()

    async def read(self, request: AnyRequest, kind: type[B]) -> B:
        """Return the translated body. Raises ServiceError that names the field and its path."""
        translation = ResponsesTranslation(self._limits)
        body = parse(await request.body(), kind, translation)
        unknown = [name for name, is_known in translation.ignored.items() if not is_known]
        if unknown and self._is_strict:
            path, _, name = f"$.{unknown[0]}".rpartition(".")
            raise ServiceError(
                "invalid_request",
                f"Unknown field `{name}` - at `{path}`: remove it, or set EDGE_STRICT=false.",
            )
        if translation.ignored:
            request.scope["state"][STATE] = _header(translation.ignored)
            self._log(translation.ignored)
        return self._with_served_model(body)

    def _with_served_model(self, body: B) -> B:
        name = getattr(body, "model", None)
        if not name or not self._to_served:
            return body
        return replace(body, model=self._to_served(name, KINDS.get(type(body), "chat")))

    def _log(self, names: Iterable[str]) -> None:
        """Log each name once."""
        for name in map(_clean, names):
            if name not in self._logged and len(self._logged) < MAX_LOGGED_NAMES:
                self._logged.add(name)
                log.info("accepted a field without effect name=%s", name)


async def add_ignored_fields(message: Message, scope: Scope) -> None:
    """Add the header to a response. A `before_send` hook of Litestar, so it covers streams too."""
    if message["type"] == "http.response.start" and (names := scope["state"].get(STATE)):
        message["headers"] = [*message["headers"], (IGNORED_FIELDS.lower().encode(), names)]


def parse(data: bytes, kind: type[B], translation: ResponsesTranslation) -> B:
    """Translate and decode a body. Raises ServiceError."""
    check_utf8(data)  # msgspec does not check fields that stay undecoded
    given = decode(data, Object)
    translate = TRANSLATIONS.get(kind)
    plain = Fields(honoured(kind))
    fields = translate(translation, given) if translate else translation.keep(given, plain, "$")
    try:
        return decode(msgspec.json.encode(fields), kind)
    except ServiceError as error:
        raise ServiceError(error.code, _as_sent(error.message, translation.renamed)) from error


def _as_sent(message: str, renamed: Mapping[str, str]) -> str:
    """Return the message with the caller's name of the field."""
    return _PATH.sub(lambda found: renamed.get(found[0], found[0]), message)


def _text(translation: Translation, given: Object) -> dict[str, Any]:
    """Check a list of token ids before it is decoded; it has no escapes that inflate it."""
    prompt = bytes(given.get("prompt", b""))
    if prompt.startswith(b"["):
        prompts.check_conversation_bytes("field `prompt`", len(prompt))
    return translation.text(given)


TRANSLATIONS: Mapping[type[Struct], Callable[[ResponsesTranslation, Object], dict[str, Any]]] = {
    ChatCompletionBody: Translation.chat,
    CompletionBody: _text,
    EmbeddingBody: Translation.embedding,
    RerankBody: Translation.rerank,
    ResponseBody: ResponsesTranslation.response,
    ConversationBody: ResponsesTranslation.conversation,
    MessagesBody: anthropic_body.to_chat,
    OllamaBody: ollama_body.to_chat,
    OllamaGenerateBody: ollama_body.prompt_to_chat,
}
"""How the fields of a body become those of its type; a body of another type is decoded as it is."""


def _header(names: dict[str, Any]) -> bytes:
    shown = [_clean(name) for name in list(names)[:MAX_NAMES]]
    more = [f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*shown, *more]).encode()


def _clean(name: str) -> str:
    """Replace characters that could end a header or a log line: the caller chose the name."""
    return _UNSAFE.sub("?", name[:MAX_NAME_LENGTH])

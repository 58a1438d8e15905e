"""
Reads the bodies of /v1. The response header X-Ignored-Fields names the fields without effect.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from litestar.types import Message, Scope
from msgspec import Raw, Struct

from services.contract import prompts
from services.contract.codec import check_utf8, decode
from services.contract.errors import ServiceError
from services.edge.api.bodies import ChatCompletionBody, CompletionBody
from services.edge.api.fields import Fields, honoured
from services.edge.api.translation import Object, Translation
from services.edge.routes import AnyRequest

HEADER = "X-Ignored-Fields"
STATE = "ignored_fields"
MAX_NAMED = 20  # fields in the header
MAX_NAME = 80  # characters of one
MAX_REMEMBERED = 1000  # names that are not logged again
_ODD = re.compile(r"[^A-Za-z0-9_.\[\]-]")

log = logging.getLogger(__name__)
B = TypeVar("B", bound=Struct)


class BodyReader:
    """Reads bodies; with `is_strict` an unknown field is an error."""

    def __init__(self, is_strict: bool = False) -> None:
        self._is_strict = is_strict
        self._logged: set[str] = set()

    async def read(self, request: AnyRequest, kind: type[B]) -> B:
        """Return the translated body. Raises ServiceError that names the field and its place."""
        translation = Translation()
        body = parse(await request.body(), kind, translation)
        unknown = [name for name, is_known in translation.ignored.items() if not is_known]
        if unknown and self._is_strict:
            path, _, name = f"$.{unknown[0]}".rpartition(".")
            raise ServiceError(
                "invalid_request", f"The field `{name}` is not known here - at `{path}`."
            )
        if translation.ignored:
            request.scope["state"][STATE] = _header(translation.ignored)
            self._log(translation.ignored)
        return body

    def _log(self, names: Iterable[str]) -> None:
        """Log each name once."""
        for name in map(_clean, names):
            if name not in self._logged and len(self._logged) < MAX_REMEMBERED:
                self._logged.add(name)
                log.info("accepted a field without effect name=%s", name)


async def name_ignored(message: Message, scope: Scope) -> None:
    """Add the header to a response. A Litestar hook, so that it covers streams too."""
    if message["type"] == "http.response.start" and (names := scope["state"].get(STATE)):
        message["headers"] = [*message["headers"], (HEADER.lower().encode(), names.encode())]


def parse(data: bytes, kind: type[B], translation: Translation) -> B:
    """Raises ServiceError."""
    check_utf8(data)  # msgspec does not check fields that stay undecoded
    given = decode(data, Object)
    if (prompt := given.get("prompt")) and len(data) > prompts.MAX_CONVERSATION_BYTES:
        _check_list(prompt)
    if kind is ChatCompletionBody:
        fields = translation.chat(given)
    elif kind is CompletionBody:
        fields = translation.text(given)
    else:
        fields = translation.keep(given, Fields(honoured(kind)), "$")
    return decode(msgspec.json.encode(fields), kind)


def _check_list(prompt: Raw) -> None:
    """Check a list of token ids by its length alone, as it has no escapes that inflate it."""
    data = bytes(prompt)
    if data.startswith(b"[") and len(data) > prompts.MAX_CONVERSATION_BYTES:
        raise ServiceError(
            "payload_too_large",
            f"The field `prompt` has {len(data):,} bytes, and {prompts.MAX_CONVERSATION_BYTES:,} is"
            " the most: shorten it.",
        )


def _header(names: dict[str, Any]) -> str:
    told = [_clean(name) for name in list(names)[:MAX_NAMED]]
    more = [f"and {len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    return ", ".join([*told, *more])


def _clean(name: str) -> str:
    """Replace characters that could end a header or a log line: the caller chose the name."""
    return _ODD.sub("?", name[:MAX_NAME])

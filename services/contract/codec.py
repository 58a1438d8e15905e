"""Bytes on the bus to messages and back. The one place that knows the wire is JSON."""

import re
from collections.abc import Hashable
from functools import cache
from itertools import islice
from typing import Any, TypeVar, cast

import msgspec

from services.contract.errors import ServiceError

T = TypeVar("T")

_HALF_A_PAIR = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
MAX_LOOKED_AT = 1000
_encoder = msgspec.json.Encoder()


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """
    Raises ServiceError(invalid_request) that names the field: `Expected int, got str - at $.limit`.

    Unknown fields are ignored, so that a field can be added on one side first.
    """
    try:
        return cast(T, _decoder(cast(Hashable, kind)).decode(data))
    except RecursionError as error:
        message = "The JSON is nested too deeply: send it with fewer levels."
        raise ServiceError("invalid_request", message) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _check_text(data)
        raise ServiceError("invalid_request", f"{error}.") from error


def check_utf8(data: bytes) -> None:
    """Raises ServiceError(invalid_request) that names the byte."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ServiceError(
            "invalid_request",
            f"Byte {error.start} is not UTF-8 ({error.reason}): send the text as UTF-8.",
        ) from error


def _check_text(data: bytes) -> None:
    """
    Raise ServiceError for invalid characters in data that could not be decoded. msgspec reports
    half of a surrogate pair as truncated data, and counts bytes from the start of a string.
    """
    check_utf8(data)
    for half in islice(_HALF_A_PAIR.finditer(data), MAX_LOOKED_AT):
        before = data[max(0, half.start() - 100) : half.start()]
        if (len(before) - len(before.rstrip(b"\\"))) % 2:
            continue  # the backslash itself is escaped, so this is plain text
        raise ServiceError(
            "invalid_request",
            f"{half[0].decode()} at byte {half.start()} is half of a surrogate pair: send"
            " both halves, or remove it.",
        )

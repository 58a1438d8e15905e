"""Encode and decode messages: JSON on the wire."""

import re
from collections.abc import Callable, Hashable
from functools import cache
from itertools import islice
from typing import Any, TypeVar, cast

import msgspec

from services.contract.errors import ServiceError

T = TypeVar("T")

_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
MAX_SURROGATES_CHECKED = 1000
_encoder = msgspec.json.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """
    Decode a message. Unknown fields are ignored, so that either side can add a field first.

    Raises ServiceError(invalid_request) that names the field: `Expected int, got str - at $.limit`.
    """
    return cast(T, decoder(cast(Hashable, kind))(data))


@cache
def decoder(kind: Any) -> Callable[[bytes], Any]:
    """Return `decode` for one kind: to hash a union type takes as long as to decode."""
    decode_json = msgspec.json.Decoder(kind).decode

    def decode(data: bytes) -> Any:
        try:
            return decode_json(data)
        except RecursionError as error:
            message = "The JSON is nested too deeply: send it with fewer levels."
            raise ServiceError("invalid_request", message) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            _check_text(data)
            raise ServiceError("invalid_request", f"{error}.") from error

    return decode


def check_utf8(data: bytes) -> None:
    """Raise ServiceError(invalid_request) that names the first byte that is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ServiceError(
            "invalid_request",
            f"Byte {error.start} is not UTF-8 ({error.reason}): send the text as UTF-8.",
        ) from error


def _check_text(data: bytes) -> None:
    """
    Raise ServiceError that names an invalid character of data that could not be decoded.

    msgspec reports half of a surrogate pair as truncated data, and counts bytes from the start of
    its string.
    """
    check_utf8(data)
    for found in islice(_LONE_SURROGATE.finditer(data), MAX_SURROGATES_CHECKED):
        before = data[max(0, found.start() - 100) : found.start()]
        if (len(before) - len(before.rstrip(b"\\"))) % 2:
            continue  # an escaped backslash, and plain text after it
        raise ServiceError(
            "invalid_request",
            f"{found[0].decode()} at byte {found.start()} is half of a surrogate pair: send"
            " both halves, or remove it.",
        )

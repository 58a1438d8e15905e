"""Bytes on the bus to messages and back. The one place that knows the wire is JSON."""

from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from services.contract.errors import ServiceError

T = TypeVar("T")

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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError("invalid_request", f"{error}.") from error

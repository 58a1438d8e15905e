"""Reads bodies so that nothing that was sent is passed over in silence."""

from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from services.contract.codec import decode
from services.contract.errors import ServiceError

B = TypeVar("B", bound=Struct)


def read(data: bytes, kind: type[B]) -> B:
    """
    Raises ServiceError(invalid_request) also for a field that `kind` does not have, at any depth:
    but null, false and what is empty ask for nothing.
    """
    body = decode(data, kind)
    _check_known(msgspec.json.decode(data), body, "$")
    return body


def _check_known(sent: Any, read: Any, path: str) -> None:
    if isinstance(read, Struct) and isinstance(sent, dict):
        tag = read.__struct_config__.tag_field
        for name, value in sent.items():
            if name in read.__struct_fields__:
                _check_known(value, getattr(read, name), f"{path}.{name}")
            elif name != tag and not _is_nothing(value):
                raise ServiceError(
                    "invalid_request", f"The field `{name}` is not supported here - at `{path}`."
                )
    elif isinstance(read, tuple) and isinstance(sent, list):
        for number, (item, part) in enumerate(zip(sent, read, strict=True)):
            _check_known(item, part, f"{path}[{number}]")


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})

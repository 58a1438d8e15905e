"""
Limits of size and count, checked before decoding, so that one body does not block the event loop:
msgspec takes a third of a microsecond for each list, and a MiB has room for many.
"""

from collections.abc import Mapping

from msgspec import Raw

from services.contract.errors import ServiceError

MAX_PARTS = 10_000  # objects and lists in `tools` or a schema
MAX_FIELDS = 1_000  # of an object
MAX_BYTES = 65_536  # of a field without another limit
MAX_FORM_BYTES = 131_072  # of a field for the format of the answer
FORMS = {"response_format", "json_schema", "guided_json", "structured_outputs"}
NESTED = {"tools", *FORMS}
# Limited by their types, by prompts.check and by the limit of the body.
LARGE = {"messages", "prompt", "tools", "content", "tokens"}


def check_fields(fields: Mapping[str, Raw], place: str = "$") -> None:
    """Raises ServiceError(payload_too_large)."""
    if len(fields) > MAX_FIELDS:
        raise too_many(f"The object at `{place}` has more than {MAX_FIELDS:,} fields")


def check_sizes(fields: Mapping[str, Raw]) -> None:
    """Check the fields of a body that are going to be decoded. Raises as check_fields does."""
    check_fields(fields)
    for name, value in fields.items():
        most = MAX_FORM_BYTES if name in FORMS else MAX_BYTES
        if name not in LARGE and len(memoryview(value)) > most:
            raise too_many(f"The field `{name}` has more than {most:,} bytes")
        if name in NESTED:
            _check_parts(name, bytes(value))


def too_many(what: str) -> ServiceError:
    return ServiceError("payload_too_large", f"{what}: send less.")


def _check_parts(name: str, data: bytes) -> None:
    if data.count(b"{") + data.count(b"[") > MAX_PARTS:
        raise too_many(f"The field `{name}` has more than {MAX_PARTS:,} objects and lists")

import re

import pytest

from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import Cancel


@pytest.mark.parametrize(
    ("text", "half", "at"),
    [
        (rb"hi \ud83d", r"\ud83d", 9),
        (rb"hi \ud83d x", r"\ud83d", 9),
        (rb"\uD83D\u0041", r"\uD83D", 6),
        (rb"\udc00", r"\udc00", 6),
        (rb"\ud83d\ude42\ude42", r"\ude42", 18),
        (rb"\ud83d\ude42\\\ud83d", r"\ud83d", 20),
        (rb"\\ud83d \\\\\ud83d", r"\ud83d", 18),
    ],
)
def test_lone_surrogate_is_named_with_its_position(text: bytes, half: str, at: int) -> None:
    data = b'{"a":"%b"}' % text
    assert data[at:].startswith(half.encode())
    with pytest.raises(ServiceError, match=rf"^{re.escape(half)} at byte {at} is half of a surr"):
        decode(data, Cancel)


def test_surrogate_pairs_and_escaped_backslashes_are_valid() -> None:
    for text in (rb"\ud83d\ude42", rb"\\ud83d", rb"\\\\udc00"):
        decode(b'{"a":"%b"}' % text, Cancel)
        with pytest.raises(ServiceError, match="truncated"):
            decode(b'{"a":"%b"' % text, Cancel)


def test_invalid_utf8_byte_is_named_with_its_position() -> None:
    with pytest.raises(ServiceError, match="^Byte 17 is not UTF-8"):
        decode(b'{"worker_id":"gr\xc3\xfc\xdf"}'.replace(b"\xc3", b"x"), Cancel)
    with pytest.raises(ServiceError, match="^Byte 14 is not UTF-8"):
        decode(b'{"worker_id":"\xed\xa0\xbd"}', Cancel)

"""JSON on one line, whatever a reader takes for a line break."""

import re

_BREAKS = re.compile(b"\xe2\x80[\xa8\xa9]|\xc2\x85")
_ESCAPES = {b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029", b"\xc2\x85": b"\\u0085"}


def one_line(json: bytes) -> bytes:
    """
    Escape U+2028, U+2029 and U+0085. They are valid in an event stream, but clients that split it
    with str.splitlines would cut the event there (florimondmanca/httpx-sse#34).
    """
    return _BREAKS.sub(lambda found: _ESCAPES[found[0]], json)

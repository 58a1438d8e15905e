"""nats-py's parser, with a short way for the messages that are most frequent: text of answers."""

from collections.abc import Callable

from nats.protocol.parser import _CRLF_, CRLF_SIZE, Parser

Take = Callable[[bytes, bytes, bytes], bool]
"""Takes a message (id of the subscription, subject, data), or returns False."""


class DirectParser(Parser):
    """
    Offers messages without a reply subject and headers to `take`, and leaves the rest to nats-py.

    nats-py matches patterns, keeps a state, and awaits a coroutine for each message, which costs
    three times as much.
    """

    def __init__(self, client: object, take: Take) -> None:
        super().__init__(client)
        self._take = take

    async def parse(self, data: bytes = b"") -> None:
        """Process what is complete, one operation at a time, and keep the rest."""
        data = bytes(self.buf) + data
        self.buf, begin, take = bytearray(), 0, self._take
        while (line_end := data.find(_CRLF_, begin)) >= 0:
            end = line_end + CRLF_SIZE
            words = data[begin:line_end].split(b" ")
            if words[0] in (b"MSG", b"HMSG"):
                end += (size := _size(words)) + CRLF_SIZE
                if end > len(data):
                    break
                if len(words) == 4 and words[0] == b"MSG":
                    payload = data[end - CRLF_SIZE - size : end - CRLF_SIZE]
                    if take(words[2], words[1], payload):
                        begin = end
                        continue
            await super().parse(data[begin:end])
            begin = end
        self.buf += data[begin:]


def _size(words: list[bytes]) -> int:
    """Return the bytes after a control line; 0 if it is malformed, which nats-py rejects."""
    return int(words[-1]) if words[-1].isdigit() else 0

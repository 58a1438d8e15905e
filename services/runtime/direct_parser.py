"""nats-py's parser, with a short way for the messages that are most frequent: text of answers."""

from collections.abc import Callable

from nats.protocol.parser import _CRLF_, CRLF_SIZE, Parser

Take = Callable[[bytes, bytes, bytes], bool]
"""Takes a message (id of the subscription, subject, data), or returns False."""
MESSAGES = (b"MSG", b"HMSG")


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
            if words[0] in MESSAGES:
                # a malformed size, which nats-py rejects, counts as 0
                begin_data = end
                end_data = end + (int(words[-1]) if words[-1].isdigit() else 0)
                end = end_data + CRLF_SIZE
                if end > len(data):
                    break
                if len(words) == 4 and words[0] == b"MSG":
                    if take(words[2], words[1], data[begin_data:end_data]):
                        begin = end
                        continue
            await super().parse(data[begin:end])
            begin = end
        self.buf += data[begin:]

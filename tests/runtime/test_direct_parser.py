"""Messages that arrive in any pieces reach their subscription, or nats-py."""

import pytest
from nats.errors import ProtocolError

from services.runtime.direct_parser import DirectParser

INFO = b'INFO {"max_payload":1048576}\r\n'
STREAM = (
    b"MSG a.b 7 5\r\nhello\r\n"
    b"MSG a.b 7 0\r\n\r\n"
    b"+OK\r\n"
    b"MSG a.b 7 reply.to 4\r\nwith\r\n"
    b"HMSG a.b 7 12 14\r\nNATS/1.0\r\n\r\nhi\r\n"
    b"PING\r\n"
    b"MSG other 8 12\r\nMSG x 7 1\r\n1\r\n"
    b"MSG a.b 7 9\r\n\r\nMSG 7 1\r\n" + INFO + b"MSG a.b 7 3\r\nend\r\n"
)
TAKEN = [b"hello", b"", b"\r\nMSG 7 1", b"end"]


class Client:
    """Records what nats-py's parser and the short way pass on."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.left: list[object] = []

    def take(self, sid: bytes, subject: bytes, data: bytes) -> bool:
        if sid == b"7":
            assert subject == b"a.b"
            self.taken.append(data)
        return sid == b"7"

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, *data: object) -> None:
        self.left.append((sid, reply, *data))

    async def _process_ping(self) -> None:
        self.left.append("ping")

    async def _process_info(self, info: dict[str, int]) -> None:
        self.left.append(info)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
async def test_messages_in_pieces_of_any_size(size: int) -> None:
    client = Client()
    parser = DirectParser(client, client.take)
    for begin in range(0, len(STREAM), size):
        await parser.parse(STREAM[begin : begin + size])
    assert client.taken == TAKEN
    assert client.left == [
        (7, b"reply.to", b"with", None),
        (7, b"", b"hi", b"NATS/1.0\r\n\r\n"),
        "ping",
        (8, b"", b"MSG x 7 1\r\n1", None),
        {"max_payload": 1048576},
    ]


@pytest.mark.parametrize(
    "line", [b"MSG a.b 7\r\n1234567\r\n", b"MSG a.b x 1\r\n1\r\n", b"NONSENSE\r\n", b"\r\n"]
)
async def test_malformed_line_is_an_error(line: bytes) -> None:
    client = Client()
    with pytest.raises(ProtocolError):
        await DirectParser(client, client.take).parse(b"+OK\r\n" + line)
    assert client.taken == client.left == []

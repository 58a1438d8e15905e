"""Messages that nats-server accepts but nats-py or a parser of subjects can't handle."""

import asyncio
from collections.abc import Iterable, Iterator


def pub(subject: bytes, data: bytes = b"{}", reply: bytes = b"") -> bytes:
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(data), data)


def hpub(subject: bytes, headers: bytes, data: bytes = b"", reply: bytes = b"") -> bytes:
    sizes = b"%d %d" % (len(headers), len(headers) + len(data))
    return b"HPUB %b %b %b\r\n%b%b\r\n" % (subject, reply, sizes, headers, data)


UNREADABLE_HEADERS = (
    b"NATS/1.0",  # no line end
    b"NATS",
    b"NATS/1.0 \xff\xfe\xfd\r\n\r\n",  # a status that is not UTF-8
    b"NATS/1.0 503 \xff\r\n\r\n",  # its description
    b"NATS/1.0 503 \xff\r\nName: value\r\n\r\n",
)
ODD_HEADERS = (
    b"NATS/1.0 ",
    b"NATS/1.0 503 No Responders\r\n\r\n",
    b"NATS/1.0 404 No Messages\r\n\r\n",
    b"NATS/1.0 100 Idle Heartbeat\r\n\r\n",
    b"NATS/1.0\r\nStatus: 409\r\nDescription: Consumer Deleted\r\n\r\n",
    b"NATS/1.0\r\nStatus: 503\r\n\r\n",
    b"NATS/1.0\r\n\xff: \xff\r\n: \r\nno colon\r\n\r\n",
    b"NATS/1.0\r\nNats-Service-Error-Code: \r\n\r\n",
)


def unreadable(subject: bytes) -> Iterator[bytes]:
    """Yield messages on `subject` that can't be parsed."""
    yield pub(subject, reply=b"_INBOX.\xff")
    yield pub(subject, reply=b"\xc3\x28")
    for headers in UNREADABLE_HEADERS:
        yield hpub(subject, headers)
        yield hpub(subject, headers, b"{}", b"_INBOX.x.y")


def odd(subject: bytes) -> Iterator[bytes]:
    """Yield messages on `subject` that can be parsed and must have no effect."""
    for headers in ODD_HEADERS:
        yield hpub(subject, headers)
        yield hpub(subject, headers, b"\xff", b"_INBOX.x.y")
    yield pub(subject, b"\xff\xfe")
    yield pub(subject, b"", b"$JS.API.STREAM.PURGE.HISTORY")
    yield pub(subject, b"{}", b"$JS.ACK.HISTORY.archive.1.1.1.1.0")
    yield pub(subject, b"{}", b"_INBOX." + b"x" * 3900)
    yield pub(subject, b"{}", b"_INBOX.a\x0b7")  # nats-py splits lines at vertical tabs
    yield pub(subject, b"{}", b"_INBOX.\x00\x1b[31m")


def bad_tokens(before: bytes, after: bytes = b"") -> Iterator[bytes]:
    """Yield messages whose subjects have an odd token between `before` and `after`."""
    for token in (b"\xff\xfe", b"\xc3\x28", b"a\x0bb", b"a\x0b1", b"a\x0c1\x0c2", b"\x00", b"\x7f"):
        yield pub(before + token + after)


async def send(port: int, frames: Iterable[bytes]) -> None:
    """Publish raw messages over their own connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readline()  # INFO
    writer.write(b'CONNECT {"verbose":false,"headers":true,"lang":"raw","version":"0"}\r\n')
    writer.writelines(frames)
    writer.write(b"PING\r\n")
    while (line := await reader.readline()) != b"PONG\r\n":
        assert line, "nats-server closed the connection"
        # since 2.10, nats-server rejects reply subjects of its acknowledgements
        assert not line.startswith(b"-ERR") or b"$JS.ACK" in line, line
    writer.close()
    await writer.wait_closed()

"""Limits of one HTTP connection: endless requests, and clients that do not read."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from itertools import chain, repeat

import httpx
import pytest

from services.contract.messages import StreamEvent, Token, TokenLogprob, TokenProbability
from services.runtime.bus import Bus
from tests.edge.conftest import LIMITS, edge_on, until
from tests.fakes import ACCEPTED, DONE, scripted_worker

QUICK = replace(LIMITS, send_buffer_bytes=16 * 1024, stall_seconds=0.6, linger_seconds=0.3)
CHUNKED = b"POST /chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"


@pytest.fixture
async def edge(nats_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an edge that soon disconnects a client that does not read."""
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, limits=QUICK) as client:
        yield client


async def exchange(http: httpx.AsyncClient, parts: Iterable[bytes]) -> bytes:
    """Send the parts over one connection, and return all data until the edge closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
    answer = asyncio.create_task(reader.read())
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
    except ConnectionError:
        pass  # the edge has rejected the rest
    async with asyncio.timeout(10):
        received = await answer
    writer.close()
    return received


def chunks(data: bytes, size: int) -> bytes:
    parts = (data[start : start + size] for start in range(0, len(data), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


ENDLESS = {
    "headers": chain([b"GET / HTTP/1.1\r\nHost: x\r\n"], repeat(b"X-Name: value\r\n", 100_000)),
    "one header": chain([b"GET / HTTP/1.1\r\nHost: x\r\nX: "], repeat(b"x" * 1000, 1000)),
    "url": chain([b"GET /"], repeat(b"x" * 1000, 1000)),
    "trailers": chain([CHUNKED, b"\r\n0\r\n"], repeat(b"X-Name: value\r\n", 100_000)),
    "chunk extension": chain([CHUNKED, b"\r\n1;"], repeat(b"x" * 1000, 1000)),
    "chunks of a byte": chain([CHUNKED, b"\r\n"], repeat(chunks(b" " * 1000, 1), 400)),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_endless_request_is_rejected_before_its_end(
    what: str, edge: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await exchange(edge, ENDLESS[what])
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"bytes besides its body" in answer
    assert (await edge.get("/healthz")).status_code == 200
    assert "Traceback" not in caplog.text


async def test_too_large_headers_are_a_431_with_a_code(http: httpx.AsyncClient) -> None:
    long = {"X-Long": "x" * 200_000}
    answer = await http.get("/healthz", headers=long)
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "payload_too_large"


async def test_chunks_of_ordinary_sizes_are_accepted(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    body = json.dumps({"prompt": "x" * 50_000}).encode()
    close = b"Connection: close\r\n\r\n"
    async with scripted_worker(nats_url, [Token(0, "yes", (1,)), DONE]):
        for data in (chunks(body, 10), chunks(body, 1000), chunks(b'{"prompt": "x"}', 1)):
            answer = await exchange(http, [CHUNKED, close, data, b"0\r\n\r\n"])
            assert answer.startswith(b"HTTP/1.1 200 ") and b"yes" in answer


@pytest.mark.parametrize(
    "request_",
    [
        CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
        b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        CHUNKED + b"\r\nxyz\r\n",
        b"NONSENSE\r\n\r\n",
    ],
    ids=["chunked with a length", "two lengths", "bad chunk", "not HTTP"],
)
async def test_ambiguous_request_is_a_400_and_closes_the_connection(
    request_: bytes, edge: httpx.AsyncClient
) -> None:
    answer = await exchange(edge, [request_])
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_request"


LIKELY = TokenProbability(1, "x", (120,), -1.0)
LOGPROB = TokenLogprob(1, "x", (120,), -0.5, (LIKELY,) * 20)
NUMBER_OF_TOKENS = 1500


def large_tokens() -> list[StreamEvent | float]:
    tokens = [Token(at, "x", (1,), (LOGPROB,)) for at in range(NUMBER_OF_TOKENS)]
    return [ACCEPTED, *tokens, *repeat(0.2, 10), DONE]  # the answer goes on


PATHS = {
    "/chat": {"prompt": "hi", "logprobs": 20},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
    },
}


async def ask(http: httpx.AsyncClient, path: str) -> socket.socket:
    """Send a request, and return a socket with a small receive buffer."""
    body = json.dumps(PATHS[path]).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", http.base_url.port))
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    await loop.sock_sendall(client, head % (path.encode(), len(body)) + body)
    return client


@pytest.mark.parametrize("path", PATHS)
async def test_client_that_never_reads_is_disconnected_and_logged(
    path: str, edge: httpx.AsyncClient, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted_worker(nats_url, large_tokens()) as worker:
        with await ask(edge, path):
            await until(lambda: "stopped reading" in caplog.text, 20)
        if path == "/chat":  # which can be resumed within its grace
            await asyncio.sleep(2 * QUICK.stall_seconds)
            assert worker.cancelled.empty()
        else:
            await asyncio.wait_for(worker.cancelled.get(), 5)
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 1
    waiting = re.search(r"unread_bytes=(\d+)", messages[0])
    assert waiting and int(waiting[1]) < 200_000, "the edge buffers a bounded part"


async def test_client_that_reads_slowly_is_not_disconnected(
    edge: httpx.AsyncClient, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes three times as long as a client may stall, and receives the whole answer."""
    script = [event for event in large_tokens() if not isinstance(event, float)]
    tokens = [event for event in script if isinstance(event, Token)]
    loop = asyncio.get_running_loop()
    async with scripted_worker(nats_url, [ACCEPTED, *tokens[:400], DONE]):
        with await ask(edge, "/chat") as client:
            data, began = b"", loop.time()
            while b'"done":true' not in data:
                part = await loop.sock_recv(client, 16_384)
                assert part, "the edge closed the connection"
                data += part
                if loop.time() - began < 3 * QUICK.stall_seconds:
                    await asyncio.sleep(QUICK.stall_seconds / 20)
    assert data.count(b'"token"') == 400
    assert "stopped reading" not in caplog.text

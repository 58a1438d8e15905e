"""Limits of one HTTP connection: endless requests, and clients that do not read."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain, repeat

import httpx
import pytest

from services.contract import subjects
from services.contract.history import ImportRequest
from services.contract.messages import Empty, StreamEvent, Token, TokenLogprob, TokenProbability
from services.runtime.bus import Bus
from tests.edge.conftest import LIMITS, edge_on, until
from tests.fakes import ACCEPTED, DONE, scripted_worker

QUICK = replace(LIMITS, send_buffer_bytes=16 * 1024, stall_seconds=0.6, linger_seconds=0.3)
GOOD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
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
    "many short headers": [GOOD[:-2] + b"X: y\r\n" * 300 + b"\r\n"],
    "one header": chain([b"GET / HTTP/1.1\r\nHost: x\r\nX: "], repeat(b"x" * 1000, 1000)),
    "url": chain([b"GET /"], repeat(b"x" * 1000, 1000)),
    "trailers": chain([CHUNKED, b"\r\n0\r\n"], repeat(b"X-Name: value\r\n", 100_000)),
    "chunk extension": chain([CHUNKED, b"\r\n1;"], repeat(b"x" * 1000, 1000)),
    "chunks of a byte": chain([CHUNKED, b"\r\n"], repeat(chunks(b" " * 1000, 1), 400)),
    "some thousand chunks of a byte": [CHUNKED, b"\r\n", chunks(b" " * 3000, 1)],
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_endless_request_is_rejected_before_its_end(
    what: str, edge: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await exchange(edge, ENDLESS[what])
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"over 200 headers, over 65,536 bytes before its body, or too small" in answer
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
            await asyncio.wait_for(worker.cancelled.get(), 30)
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
    ids = [int(found) for found in re.findall(rb"\nid: (\d+)\n", data)]
    assert ids == [*range(1, 401)]
    assert "stopped reading" not in caplog.text


SLOW = replace(LIMITS, receive_seconds=0.3, receive_bytes=100, linger_seconds=0.3)


@asynccontextmanager
async def impatient_edge(nats_url: str, **more: float) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an edge that does not wait long for a request."""
    async with Bus.connect(nats_url, "edge") as bus:
        async with edge_on(bus, limits=replace(SLOW, **more)) as http:  # type: ignore[arg-type]
            yield http


@pytest.mark.parametrize(
    "begun",
    [
        b"G",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        CHUNKED + b"\r\n5\r\n{",
    ],
)
async def test_request_that_stalls_is_a_408(nats_url: str, begun: bytes) -> None:
    async with impatient_edge(nats_url) as http:
        answer = await exchange(http, [begun])
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"timeout"' in answer
    assert b"too slowly" in answer


async def test_slow_but_steady_request_is_accepted(nats_url: str) -> None:
    body = b'{"prompt": "hi"}' + b" " * 2000
    head = b"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    async with impatient_edge(nats_url) as http, scripted_worker(nats_url, (ACCEPTED, DONE)):
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(head % len(body))
        for start in range(0, len(body), 200):
            writer.write(body[start : start + 200])
            await asyncio.sleep(0.1)
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_silent_connection_is_closed(nats_url: str) -> None:
    async with impatient_edge(nats_url, keep_alive_seconds=0.3) as http:
        assert await exchange(http, []) == b""


async def test_new_connection_takes_the_place_of_an_idle_one(nats_url: str) -> None:
    async with impatient_edge(nats_url, max_connections=3) as http:
        idle = [await asyncio.open_connection("127.0.0.1", http.base_url.port) for _ in range(3)]
        assert (await http.get("/healthz")).status_code == 200
        ended = [asyncio.ensure_future(reader.read()) for reader, _ in idle]
        async with asyncio.timeout(30):
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        assert sum(each.done() for each in ended) == 1
        for _, writer in idle:
            writer.close()
        await asyncio.wait(ended)


async def test_connection_beyond_the_limit_is_a_503(
    nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    begun = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    async with impatient_edge(nats_url, max_connections=2, receive_seconds=30) as http:
        busy = [await asyncio.open_connection("127.0.0.1", http.base_url.port) for _ in range(2)]
        for _, writer in busy:
            writer.write(begun)
        await asyncio.sleep(0.1)
        answer = await exchange(http, [])
        for _, writer in busy:
            writer.close()
    assert answer.startswith(b"HTTP/1.1 503 ") and b'"code":"overloaded"' in answer
    assert "no room for another connection" in caplog.text


BAD = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{"
LAST = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def test_pipelined_requests_are_answered_in_order(http: httpx.AsyncClient) -> None:
    answer = await exchange(http, [(BAD + GOOD) * 10 + LAST])
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"400", b"200"] * 10 + [b"200"]


async def test_pipelined_requests_leave_time_for_other_clients(nats_url: str) -> None:
    limits = replace(LIMITS, pipeline_pause_seconds=0.3)
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, limits=limits) as http:
        slow = asyncio.create_task(exchange(http, [GOOD * 3 + LAST]))
        for _ in range(50):  # this client waits for each response
            await http.get("/healthz")
        assert not slow.done()
        assert (await slow).count(b" 200 ") == 4


async def test_invalid_requests_in_a_row_slow_their_connection_down(nats_url: str) -> None:
    """Each takes a tenth of the connection's time at most; after a valid one all is as before."""
    taken: list[float] = []
    async with Bus.connect(nats_url, "edge") as bus:
        limits = replace(LIMITS, invalid_pause=1e9, max_invalid_pause_seconds=1.0)
        async with edge_on(bus, limits=limits) as http:
            for bodies in ("{{{", "{{{ {{{", "{{{{{"):
                started = time.monotonic()
                for body in bodies:
                    path = "/healthz" if body == " " else "/chat"
                    method = "GET" if body == " " else "POST"
                    await http.request(method, path, content=body.strip())
                await http.get("/healthz")
                taken.append(time.monotonic() - started)
    assert taken[2] > 2 > 1 > max(taken[:2])  # the fourth and the fifth are followed by a pause


async def test_long_body_behind_a_stream_is_not_read(nats_url: str) -> None:
    """It waits in the kernel, and not in memory, until the stream ends."""
    stream = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n" + b'{"prompt": "hi"}'
    large = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    async with impatient_edge(nats_url) as http:
        async with scripted_worker(nats_url, (ACCEPTED, Token(0, "a", (1,)), 10.0, DONE)):
            reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
            writer.write(stream + large)
            await reader.readuntil(b'"token"')
            writer.transport.set_write_buffer_limits(0)
            writer.write(b"x" * 50_000_000)
            sizes = [0]
            while sizes[-1] != writer.transport.get_write_buffer_size():
                sizes.append(writer.transport.get_write_buffer_size())
                await asyncio.sleep(0.1)
            assert sizes[-1] > 30_000_000
            writer.transport.abort()


LINE = b'{"prompt": "p", "response": "%b"}\n' % (b"r" * 1000)


@asynccontextmanager
async def stalled_import(nats_url: str) -> AsyncIterator[None]:
    """Serve imports that end with the block."""
    is_over = asyncio.Event()

    async def wait(subject: str, request: ImportRequest) -> Empty:
        await is_over.wait()
        return Empty()

    async with Bus.connect(nats_url, "history") as bus:
        subject = subjects.history("import", subjects.ANY)
        await bus.serve("history", "", [bus.endpoint("import", subject, ImportRequest, wait)])
        yield
        is_over.set()


async def test_body_is_read_no_faster_than_the_app_takes_it(nats_url: str) -> None:
    head = b"POST /sessions/s/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus) as http:
        async with stalled_import(nats_url):
            _, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
            writer.transport.set_write_buffer_limits(0)
            writer.write(head + LINE * (50_000_000 // len(LINE)))
            sizes = [0]
            while sizes[-1] != writer.transport.get_write_buffer_size():
                sizes.append(writer.transport.get_write_buffer_size())
                await asyncio.sleep(0.1)
            assert sizes[-1] > 30_000_000
            writer.transport.abort()

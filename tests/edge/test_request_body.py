"""Responses that precede the end of a request body, and limits of its fields."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from litestar.types import ASGIApp, Receive, Scope, Send

from services.edge.limits import EdgeLimits
from services.edge.request_body import BodyDrain
from services.edge.server import bind, serving
from services.runtime.bus import Bus
from tests.edge.conftest import LIMITS, edge_on
from tests.fakes import HELLO, scripted_worker

MIB = 2**20


def body(size: int) -> bytes:
    return json.dumps({"prompt": "x" * size}).encode()


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions", "/v1/tokenize"])
async def test_too_large_body_is_a_413_at_any_size(http: httpx.AsyncClient, path: str) -> None:
    for size in (MIB, 2 * MIB, 8 * MIB, 8 * MIB):
        got = await http.post(path, content=body(size))
        assert got.status_code == 413 and got.json()["error"]["code"] == "payload_too_large"


async def test_too_large_chunked_body_is_a_413(http: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(128):
            yield b"x" * 65_536

    got = await http.post("/chat", content=pieces())
    assert got.status_code == 413


async def test_large_body_gets_its_401_and_404(nats_url: str) -> None:
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, "ada:secret") as http:
        assert (await http.post("/chat", content=body(8 * MIB))).status_code == 401
        assert (await http.post("/nowhere", content=body(8 * MIB))).status_code == 404
        key = {"x-api-key": "secret"}
        assert (await http.post("/chat", content=body(8 * MIB), headers=key)).status_code == 413


async def reject(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that does not read the body."""
    await send({"type": "http.response.start", "status": 413, "headers": []})
    await send({"type": "http.response.body", "body": b"no", "more_body": False})


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection to a server of this app."""
    listener = bind("127.0.0.1", 0)
    async with serving(app, listener, asyncio.Event(), pytest.fail, LIMITS):
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        yield reader, writer
        writer.close()


async def head(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)


async def test_expect_100_continue_is_answered_at_once() -> None:
    async with served(BodyDrain(reject, LIMITS)) as (reader, writer):
        writer.write(
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\nexpect: 100-continue\r\n\r\n"
        )
        answer = await head(reader)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()


async def test_rest_of_a_body_is_read_up_to_a_limit() -> None:
    async with served(BodyDrain(reject, EdgeLimits(max_dropped_bytes=100_000))) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
        answer = await head(reader)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()


async def test_stalled_body_is_awaited_up_to_a_limit() -> None:
    async with served(BodyDrain(reject, EdgeLimits(max_drop_seconds=0.1))) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\nhalf")
        answer = await head(reader)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()


async def test_connection_is_reused_after_the_body_is_dropped() -> None:
    async with served(BodyDrain(reject, LIMITS)) as (reader, writer):
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody")
            answer = await head(reader)
            assert answer.startswith(b"HTTP/1.1 413") and b"close" not in answer.lower()
            await reader.readuntil(b"no\r\n0\r\n\r\n")


def many(item: str) -> str:
    return ",".join([item] * 150_000)


def schema(items: str) -> str:
    return '{"type":"json_schema","json_schema":{"name":"x","schema":{"enum":[' + items + "]}}}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", "{" + many('"1":1') + "}"),
        ("stop", "[" + many('"a"') + "]"),
        ("response_format", schema(many("[]"))),
        ("response_format", schema(many("1"))),
        ("response_format", schema(",".join(["[]"] * 20_000))),
        ("mood", "[" + many("[]") + "]"),
    ],
    ids=lambda value: value[:20],
)
async def test_oversized_field_is_rejected_by_name(
    http: httpx.AsyncClient, field: str, value: str
) -> None:
    got = await http.post("/chat", content=f'{{"prompt":"hi","{field}":{value}}}')
    assert got.status_code == 413 and f"`{field}` has more than" in got.json()["error"]["message"]


async def test_object_of_thousands_of_fields_is_rejected(http: httpx.AsyncClient) -> None:
    got = await http.post("/chat", json={f"f{number}": 1 for number in range(2000)})
    assert got.status_code == 413 and "more than 1,000 fields" in got.text


async def test_long_prompt_is_not_subject_to_these_limits(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO):
        escaped = b'{"prompt":"%b"}' % (rb"\u0430" * 32_000)  # 64 KB as UTF-8
        assert (await http.post("/chat", content=escaped)).status_code == 200

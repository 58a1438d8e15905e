"""What a request leaves behind, which the edge's seldom garbage collections would have to free."""

import gc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from services.client.chat_client import AnswerReader
from services.edge.http_protocol import BodyWriter, BoundedProtocol
from services.runtime.deliveries import Inbox
from tests.edge.conftest import until
from tests.edge.test_connection_limits import CHUNKED, GOOD, chunks, exchange
from tests.fakes import HELLO, scripted_worker

OF_A_REQUEST = BoundedProtocol, RequestResponseCycle, BodyWriter, AnswerReader, Inbox
CLOSE = b"Connection: close\r\n"
CHAT = b"POST /chat HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"Content-Length: %d\r\n\r\n%b"
QUESTION, NONSENSE = b'{"prompt": "hi"}', b'{"prompt": 1}'
REQUESTS = {
    "short": GOOD[:-2] + CLOSE + b"\r\n",
    "stream": CHAT % (len(QUESTION), QUESTION),
    "invalid": CHAT % (len(NONSENSE), NONSENSE),
    "rejected": CHUNKED + b"\r\n" + chunks(b" " * 5000, 1),
}


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def objects_of_requests() -> list[Any]:
    return [each for each in gc.get_objects() if isinstance(each, OF_A_REQUEST)]


@pytest.mark.parametrize("request_bytes", REQUESTS.values(), ids=REQUESTS)
async def test_ended_request_is_freed_without_the_garbage_collector(
    http: httpx.AsyncClient, nats_url: str, uncollected: None, request_bytes: bytes
) -> None:
    async with scripted_worker(nats_url, HELLO):
        known = {id(each) for each in objects_of_requests()}
        assert (await exchange(http, [request_bytes])).startswith(b"HTTP/1.1 ")
        await until(lambda: all(id(each) in known for each in objects_of_requests()), 30)

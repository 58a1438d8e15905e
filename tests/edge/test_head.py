import asyncio

import httpx
import pytest

from services.contract import subjects
from services.contract.history import ExportPage, ExportRequest
from tests.client.story_worker import story_worker
from tests.edge.api.test_sessions import answering
from tests.history.samples import exchange


@pytest.mark.parametrize("path", ["/", "/healthz", "/status", "/v1/models", "/schema/openapi.json"])
async def test_head_has_the_headers_of_get_without_a_body(
    http: httpx.AsyncClient, path: str
) -> None:
    head, get = await http.head(path), await http.get(path)
    assert head.status_code == get.status_code == 200 and not head.content
    assert head.headers["content-type"] == get.headers["content-type"]


async def test_head_of_an_error_has_its_status(http: httpx.AsyncClient) -> None:
    assert (await http.head("/nope")).status_code == 404
    assert (await http.head("/chat")).status_code == 405


async def test_connection_is_reused_after_head(http: httpx.AsyncClient) -> None:
    for _ in range(3):
        assert (await http.head("/v1/models")).status_code == 200
        assert (await http.get("/v1/models")).json()["object"] == "list"


async def test_options_lists_the_allowed_methods(http: httpx.AsyncClient) -> None:
    for path, methods in [("/chat", {"POST"}), ("/v1/models", {"GET"}), ("/messages", {"GET"})]:
        answer = await http.options(path)
        assert answer.status_code == 204 and not answer.content
        assert methods <= set(answer.headers["allow"].split(", "))


async def test_connection_is_kept_alive(http: httpx.AsyncClient) -> None:
    ports = set()
    async with httpx.AsyncClient(base_url=http.base_url) as client:
        for _ in range(3):
            answer = await client.get("/healthz")
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(ports) == 1


async def test_head_of_a_running_answer_ends_with_its_headers(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with story_worker(nats_url, stop_at=9):  # it never ends
        async with http.stream("POST", "/chat", json={"prompt": "hi"}) as answer:
            address = answer.headers["content-location"]
        async with asyncio.timeout(30):
            head = await http.head(address)
    assert head.status_code == 200 and not head.content
    assert head.headers["content-type"].startswith("text/event-stream")


async def test_head_of_an_export_reads_one_page(http: httpx.AsyncClient, nats_url: str) -> None:
    endless = ExportPage((exchange("a"),), "1-2")
    async with answering(
        nats_url, subjects.history("export", subjects.ANY), ExportRequest, endless
    ) as asked:
        async with asyncio.timeout(30):
            head = await http.head("/sessions/s/export")
    assert head.headers["content-type"].startswith("application/jsonl")
    assert len(asked) == 1

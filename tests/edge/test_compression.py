import httpx
import pytest

from services.contract import subjects
from services.contract.history import ExportPage, ExportRequest
from services.contract.messages import Token
from tests.edge.api.test_sessions import answering
from tests.fakes import ACCEPTED, DONE, HELLO, scripted_worker
from tests.history.samples import exchange


async def test_json_is_compressed_if_the_client_accepts_gzip(http: httpx.AsyncClient) -> None:
    got = await http.get("/schema/openapi.json", headers={"Accept-Encoding": "br;q=1, gzip"})
    plain = await http.get("/schema/openapi.json", headers={"Accept-Encoding": "identity"})
    assert got.headers["content-encoding"] == "gzip"
    assert "Accept-Encoding" in got.headers["vary"].split(",")
    assert int(got.headers["content-length"]) < len(got.content) / 4
    assert "content-encoding" not in plain.headers and plain.json() == got.json()


async def test_json_is_not_compressed_if_refused_or_small(
    http: httpx.AsyncClient,
) -> None:
    for accepted in ("gzip;q=0", "", "br"):
        got = await http.get("/schema/openapi.json", headers={"Accept-Encoding": accepted})
        assert "content-encoding" not in got.headers
    small = await http.get("/healthz", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in small.headers and small.json() == {"status": "alive"}


async def test_event_stream_is_not_compressed(http: httpx.AsyncClient, nats_url: str) -> None:
    headers = {"Accept-Encoding": "gzip"}
    body = {"prompt": "hi" * 1000}
    asked = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with scripted_worker(nats_url, HELLO):
        for path, content in (("/chat", body), ("/v1/chat/completions", asked)):
            got = await http.post(path, json=content, headers=headers)
            assert "content-encoding" not in got.headers and "data: " in got.text


async def test_export_is_not_compressed(http: httpx.AsyncClient, nats_url: str) -> None:
    page = ExportPage(tuple(exchange(f"r{number}") for number in range(9)))
    subject = subjects.history("export", subjects.ANY)
    async with answering(nats_url, subject, ExportRequest, page):
        got = await http.get("/sessions/s/export", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in got.headers and len(got.content) > 1024


async def test_completion_is_compressed(http: httpx.AsyncClient, nats_url: str) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    async with scripted_worker(nats_url, [ACCEPTED, Token(0, "a" * 2000, (1,)), DONE]):
        got = await http.post(
            "/v1/chat/completions", json=asked, headers={"Accept-Encoding": "gzip"}
        )
    assert got.headers["content-encoding"] == "gzip"
    assert got.json()["choices"][0]["message"]["content"] == "a" * 2000


@pytest.mark.parametrize("path", ["/chat", "/clear-history"])
async def test_error_is_compressed(http: httpx.AsyncClient, path: str) -> None:
    got = await http.post(path, json={"x" * 2000: 1}, headers={"Accept-Encoding": "gzip"})
    assert got.status_code == 400 and got.headers["content-encoding"] == "gzip"
    assert got.json()["error"]["code"] == "invalid_request"

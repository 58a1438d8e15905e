"""Which web pages and which parameters of the URL are accepted."""

import httpx
import pytest

from services.contract.history import ExchangePage
from tests.edge.test_errors import error_of
from tests.fakes import scripted_history


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/clear-history?sesion_id=s", ""),
        ("POST", "/clear-history?limit=3", ""),
        ("POST", "/clear-history", '{"sesion_id":"s"}'),
        ("POST", "/clear-history", "session_id=s"),
        ("POST", "/clear-history", " "),
        ("POST", "/clear-history", '{"session_id":""}'),
        ("POST", "/clear-history?session_id=a", '{"session_id":"b"}'),
        ("POST", "/chat?session_id=s", '{"prompt":"hi"}'),
        ("DELETE", "/chat/r1?session_id=s", ""),
        ("PATCH", "/sessions/s?title=t", '{"title":"t"}'),
        ("DELETE", "/sessions/s?session_id=t", ""),
        ("POST", "/sessions/s/messages?session_id=t", '{"prompt":"p","response":"r"}'),
    ],
)
async def test_change_with_an_unknown_parameter_is_rejected(
    http: httpx.AsyncClient, nats_url: str, method: str, path: str, body: str
) -> None:
    async with scripted_history(nats_url, ExchangePage(())) as history:
        answer = await http.request(method, path, content=body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")
    assert history.asked == []


async def test_get_accepts_any_parameter(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_history(nats_url, ExchangePage(())):
        assert (await http.get("/messages?limt=3")).status_code == 200


async def test_cors_allows_local_pages_only(http: httpx.AsyncClient) -> None:
    for origin, allowed in [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8080", True),
        ("https://example.com", False),
        ("http://localhost.example.com:80", False),
    ]:
        for answer in (
            await http.get("/nope", headers={"Origin": origin}),
            await http.options(
                "/chat", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
            ),
        ):
            given = answer.headers.get("access-control-allow-origin")
            assert given == (origin if allowed else None)


async def test_change_from_a_foreign_origin_is_forbidden(http: httpx.AsyncClient) -> None:
    for method, path in (("POST", "/clear-history"), ("POST", "/chat"), ("DELETE", "/chat/r")):
        for origin in ("http://evil.com", "null", "http://[::1"):
            answer = await http.request(method, path, headers={"Origin": origin})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden"


async def test_change_from_its_own_or_an_allowed_origin_is_accepted(
    http: httpx.AsyncClient,
) -> None:
    for origin in (str(http.base_url).rstrip("/"), "http://localhost:3000"):
        answer = await http.delete("/chat/r", headers={"Origin": origin})
        assert answer.status_code == 202


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/", "GET, HEAD, OPTIONS"),
        ("/chat", "OPTIONS, POST"),
        ("/sessions/s", "DELETE, OPTIONS, PATCH"),
        ("/v1/conversations/c", "DELETE, GET, HEAD, OPTIONS, POST"),
    ],
)
async def test_options_names_all_methods_of_a_path(
    http: httpx.AsyncClient, path: str, methods: str
) -> None:
    answer = await http.options(path)
    assert (answer.status_code, answer.headers["allow"]) == (204, methods)
    assert not answer.content


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions", "/v1/messages"])
async def test_chats_start_no_task_for_a_dependency(
    http: httpx.AsyncClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litestar._kwargs.kwargs_model.create_task_group", None)
    assert (await http.post(path, json={})).status_code == 400

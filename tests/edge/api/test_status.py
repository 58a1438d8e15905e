import asyncio
import json
import signal
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from services.contract.history import ClearRequest, ExchangePage, ExchangeView, MessagesRequest
from services.contract.messages import JsonSchema, JsonSchemaFormat, Usage
from services.contract.version import VERSION
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on, until_disconnected
from tests.edge.test_errors import error_of
from tests.fakes import HELLO, scripted_history, scripted_worker
from tests.servers import nats_server, running

MESSAGE = ExchangeView(
    "m1",
    "s1",
    "hi",
    "hello",
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "stop",
    "demo",
    Usage(1, 2, 0),
)


async def test_everything_that_can_be_asked_for_reaches_the_worker(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    body = {
        "prompt": " hi \u0000 ",
        "session_id": "Ünder *.> ",
        "model": "demo:shout",
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "repeat_penalty": 1.5,
        "max_tokens": 7,
        "seed": 4_294_967_294,
        "stop": ["\n", "User:"],
        "min_p": 0.05,
        "presence_penalty": -1.5,
        "frequency_penalty": 2,
        "logit_bias": {"17": -100, "18": 0.5},
        "logprobs": 3,
        "grammar": 'root ::= "yes" | "no"',
    }
    async with scripted_worker(nats_url, HELLO) as worker:
        answer = await http.post("/chat", json=body)
    assert answer.status_code == 200
    ((subject, request),) = worker.requests
    assert subject == "chat.request"
    assert {name: getattr(request, name) for name in body} == body | {"stop": ("\n", "User:")}
    assert answer.headers["content-location"] == f"/chat/{request.request_id}"


async def test_a_schema_reaches_the_worker_as_it_was_sent(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    schema = {"type": "object", "properties": {"größe": {"enum": [1, None]}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    async with scripted_worker(nats_url, HELLO) as worker:
        answer = await http.post("/chat", json={"prompt": "hi", "response_format": form})
    assert answer.status_code == 200
    assert worker.requests[0][1].response_format == JsonSchemaFormat(JsonSchema(schema, "n", True))


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "multipart/form-data", "a;;/b"]
)
async def test_a_body_is_json_whatever_its_content_type_says(
    http: httpx.AsyncClient, nats_url: str, content_type: str | None
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    async with scripted_worker(nats_url, HELLO):
        answer = await http.post("/chat", content=b'{"prompt":"hi"}', headers=headers)
    assert answer.status_code == 200


async def test_the_longest_prompt_gets_through(http: httpx.AsyncClient, nats_url: str) -> None:
    body = json.dumps({"prompt": "\u0001" * 65_536})  # six bytes each on the wire
    async with scripted_worker(nats_url, HELLO) as worker:
        assert (await http.post("/chat", content=body)).status_code == 200
    assert len(worker.requests[0][1].prompt) == 65_536


async def test_a_request_can_be_cancelled_by_its_address(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        assert (await http.delete("/chat/r-1_x")).status_code == 202
        async with asyncio.timeout(1):
            assert await worker.cancelled.get() == ("_", "r-1_x")


@pytest.mark.parametrize("request_id", ["a.b", "%2A", "%3E", "a%20b", "%0D%0APUB", "x" * 65])
async def test_what_can_not_be_a_request_id_is_not_found(
    http: httpx.AsyncClient, request_id: str
) -> None:
    assert (await http.delete(f"/chat/{request_id}")).status_code == 404


async def test_messages_are_a_plain_list(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_history(nats_url, ExchangePage((MESSAGE,))) as history:
        answer = await http.get("/messages")
        await http.get("/messages", params={"limit": 1000, "session_id": "ü %"})
    (message,) = answer.json()
    assert message["id"] == "m1"
    assert message["session_id"] == "s1"
    assert message["user_prompt"] == "hi"
    assert message["model_response"] == "hello"
    assert message["timestamp"] == "2026-01-02T03:04:05Z"
    assert history.asked == [
        ("history.messages._", MessagesRequest(20, None)),
        ("history.messages._", MessagesRequest(1000, "ü %")),
    ]


async def test_a_session_is_cleared(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_history(nats_url, ExchangePage(())) as history:
        answer = await http.post("/clear-history")
        await http.post("/clear-history?session_id=mine")
    assert answer.json()["status"] == "success" and answer.json()["message"]
    (_, default), (_, mine) = history.asked
    assert isinstance(default, ClearRequest) and isinstance(mine, ClearRequest)
    assert (default.session_id, mine.session_id) == ("default", "mine")
    assert default.request_id and mine.request_id and default.request_id != mine.request_id


async def test_the_session_to_clear_may_be_named_in_the_body(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_history(nats_url, ExchangePage(())) as history:
        answer = await http.post("/clear-history", json={"session_id": "mine"})
        for body, path in (
            ("{}", ""),
            ("", "?session_id=b"),
            ('{"session_id":"c"}', "?session_id=c"),
        ):
            cleared = await http.post(f"/clear-history{path}", content=body)
            assert cleared.status_code == 200
    assert answer.json()["message"] == (
        "The context of session 'mine' is cleared; its messages stay readable."
    )
    assert [request.session_id for _, request in history.asked] == ["mine", "default", "b", "c"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/clear-history?sesion_id=s", ""),
        ("POST", "/clear-history?limit=3", ""),
        ("POST", "/clear-history", '{"sesion_id":"s"}'),
        ("POST", "/clear-history", "session_id=s"),
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


async def test_the_status_tells_what_history_tells(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_history(nats_url, ExchangePage(())):
        status = (await http.get("/status")).json()
    assert status["version"] == VERSION
    assert status["nats_connected"] is True and status["database_connected"] is True
    assert status["history"]["log_records"] == 7


async def test_without_history_the_status_says_so_and_the_rest_is_a_503(
    http: httpx.AsyncClient,
) -> None:
    status = await http.get("/status")
    assert status.status_code == 200
    assert status.json()["database_connected"] is False and status.json()["history"] is None
    for answer in (await http.get("/messages"), await http.post("/clear-history")):
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "history_unavailable"


async def test_without_nats_everything_says_so_at_once(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            async with edge_on(bus) as http:
                server.stop(signal.SIGKILL)
                await until_disconnected(bus)
                async with asyncio.timeout(1):
                    refused = [
                        await http.post("/chat", json={"prompt": "hi"}),
                        await http.delete("/chat/r1"),
                        await http.get("/messages"),
                        await http.post("/clear-history"),
                        await http.get("/readyz"),
                    ]
                    status = await http.get("/status")
                    alive = await http.get("/healthz")
    assert {answer.status_code for answer in refused} == {503}
    assert {answer.json()["error"]["code"] for answer in refused} == {"bus_unavailable"}
    assert status.status_code == 200 and status.json()["nats_connected"] is False
    assert alive.status_code == 200


async def test_a_local_page_may_ask_and_others_may_not(http: httpx.AsyncClient) -> None:
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


async def test_the_routes_are_described(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/schema/openapi.json")).json()
    assert (schema["info"]["title"], schema["info"]["version"]) == ("FineTuneLLM", VERSION)
    assert "/chat" in schema["paths"]


async def test_a_page_of_a_strange_origin_can_not_even_ask(http: httpx.AsyncClient) -> None:
    for method, path in (("POST", "/clear-history"), ("POST", "/chat"), ("DELETE", "/chat/r")):
        for origin in ("http://evil.com", "null", "http://[::1"):
            answer = await http.request(method, path, headers={"Origin": origin})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden"


async def test_a_page_of_its_own_or_of_an_allowed_origin_can_ask(http: httpx.AsyncClient) -> None:
    for origin in (str(http.base_url).rstrip("/"), "http://localhost:3000"):
        answer = await http.delete("/chat/r", headers={"Origin": origin})
        assert answer.status_code == 202

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace as replace_limits
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from msgspec import UNSET, Struct
from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    DeleteRequest,
    DescribeRequest,
    Description,
    Exchange,
    ExchangePage,
    ExchangeView,
    ExportPage,
    ExportRequest,
    ImportRequest,
    MessagesRequest,
    Session,
    SessionPage,
    SessionsRequest,
)
from services.contract.messages import Empty, Usage
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Endpoint
from tests.edge.conftest import LIMITS, edge_on
from tests.edge.test_errors import error_of
from tests.fakes import scripted_history
from tests.history.samples import exchange, with_channels

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
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SESSION = Session("s 1", "Holidays", None, 2, NOW)
LINE = b'{"prompt":"p","response":"r"}'
CALL = {"id": "c", "function": {"name": "go", "arguments": "{}"}}
STRANGE = "ä/b ?%2F#"
STRANGE_PATH = "%C3%A4%2Fb%20%3F%252F%23"


@asynccontextmanager
async def answering(
    nats_url: str, subject: str, kind: type[Struct], *answers: Struct | Exception
) -> AsyncIterator[list[Any]]:
    """Serve a history that sends these replies, the last one forever. Yield its requests."""
    asked: list[Any] = []

    async def handle(at: str, request: Struct) -> Struct:
        asked.append(request)
        answer = answers[min(len(asked), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with Bus.connect(nats_url, "scripted history") as bus:
        await bus.serve("history", "scripted", [bus.endpoint("it", subject, kind, handle)])
        yield asked


async def test_sessions_are_listed_in_pages(http: httpx.AsyncClient, nats_url: str) -> None:
    page = SessionPage((SESSION,), "17-4")
    async with answering(
        nats_url, subjects.history("sessions", subjects.ANY), SessionsRequest, page
    ) as asked:
        answer = await http.get("/sessions")
        await http.get("/sessions", params={"limit": 3, "before": "17-4"})
    assert answer.json() == {
        "sessions": [
            {
                "id": "s 1",
                "title": "Holidays",
                "system_prompt": None,
                "exchanges": 2,
                "last_activity": "2026-01-02T03:04:05Z",
                "metadata": {},
            }
        ],
        "next": "17-4",
    }
    assert asked == [SessionsRequest(20, None), SessionsRequest(3, "17-4")]


async def test_messages_of_a_session_are_newest_first(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    page = ExchangePage((MESSAGE, replace(MESSAGE, id="m2")), "9-1")
    async with answering(
        nats_url, subjects.history("messages", subjects.ANY), MessagesRequest, page
    ) as asked:
        answer = await http.get(f"/sessions/{STRANGE_PATH}/messages?limit=2&before=5-5")
    assert [message["id"] for message in answer.json()["messages"]] == ["m2", "m1"]
    assert answer.json()["next"] == "9-1"
    assert asked == [MessagesRequest(2, STRANGE, "5-5")]


async def test_patch_sets_title_and_system_prompt(http: httpx.AsyncClient, nats_url: str) -> None:
    async with answering(
        nats_url, subjects.history("describe", subjects.ANY), DescribeRequest, SESSION
    ) as asked:
        answer = await http.patch("/sessions/s%201", json={"title": "Holidays"})
        await http.patch("/sessions/s", json={"title": None, "system_prompt": ""})
        await http.patch("/sessions/s", json={"metadata": {"a": "b"}})
    assert (answer.status_code, answer.json()["title"]) == (200, "Holidays")
    assert [replace(request, request_id=None) for request in asked] == [
        DescribeRequest("s 1", Description("Holidays", UNSET)),
        DescribeRequest("s", Description(None, "")),
        DescribeRequest("s", Description(metadata={"a": "b"})),
    ]
    assert all(request.request_id for request in asked)


async def test_delete_erases_a_session(http: httpx.AsyncClient, nats_url: str) -> None:
    async with answering(
        nats_url, subjects.history("delete", subjects.ANY), DeleteRequest, Empty()
    ) as asked:
        answer = await http.delete(f"/sessions/{STRANGE_PATH}")
    assert (answer.status_code, answer.json()["status"]) == (200, "success")
    (request,) = asked
    assert request.session_id == STRANGE and request.request_id


async def test_export_is_json_lines_of_all_pages(http: httpx.AsyncClient, nats_url: str) -> None:
    pages = ExportPage((exchange("a"), exchange("b")), "1-2"), ExportPage((exchange("c"),))
    async with answering(
        nats_url, subjects.history("export", subjects.ANY), ExportRequest, *pages
    ) as asked:
        answer = await http.get("/sessions/s/export")
    assert answer.headers["content-type"].startswith("application/jsonl")
    lines = [decode(line, Exchange) for line in answer.content.splitlines()]
    assert [line.request_id for line in lines] == ["a", "b", "c"]
    assert asked == [ExportRequest("s"), ExportRequest("s", "1-2")]


async def test_export_of_an_empty_session_is_empty(http: httpx.AsyncClient, nats_url: str) -> None:
    async with answering(
        nats_url, subjects.history("export", subjects.ANY), ExportRequest, ExportPage(())
    ):
        answer = await http.get("/sessions/s/export")
    assert (answer.status_code, answer.content) == (200, b"")
    assert "x-history-complete" not in answer.headers


async def test_incomplete_history_is_reported(http: httpx.AsyncClient, nats_url: str) -> None:
    page = ExportPage((exchange("c"),), is_complete=False)
    async with answering(nats_url, subjects.history("export", subjects.ANY), ExportRequest, page):
        assert (await http.get("/sessions/s/export")).headers["x-history-complete"] == "false"
    messages = ExchangePage((MESSAGE,), is_complete=False)
    subject = subjects.history("messages", subjects.ANY)
    async with answering(nats_url, subject, MessagesRequest, messages):
        shown = await http.get("/messages?session_id=s")
        assert shown.headers["x-history-complete"] == "false" and len(shown.json()) == 1
        assert (await http.get("/sessions/s/messages")).json()["is_complete"] is False


async def test_export_that_fails_midway_breaks_the_connection(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    lost = ServiceError("history_unavailable", "Gone.")
    pages = ExportPage((exchange("a"),), "1-2"), lost
    async with answering(nats_url, subjects.history("export", subjects.ANY), ExportRequest, *pages):
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get("/sessions/s/export")


async def test_import_accepts_the_lines_of_an_export(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    body = json.dumps({"prompt": "p", "response": "r", "request_id": "r1", "type": "exchange"})
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty()
    ) as asked:
        answer = await http.post("/sessions/s%201/messages", content=f"\n{body}\n{body}\n\n")
    assert answer.json() == {"status": "success", "imported": 2}
    (request,) = asked
    assert request.session_id == "s 1"
    assert [exchange_.request_id for exchange_ in request.exchanges] == ["r1", "r1"]


async def test_exported_channels_are_imported(http: httpx.AsyncClient, nats_url: str) -> None:
    record = with_channels("a")
    page = ExportPage((record,))
    async with answering(nats_url, subjects.history("export", subjects.ANY), ExportRequest, page):
        exported = await http.get("/sessions/s/export")
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty()
    ) as asked:
        answer = await http.post("/sessions/s/messages", content=exported.content)
    assert answer.status_code == 200, answer.text
    ((imported,),) = (request.exchanges for request in asked)
    for name in ("request_id", "response", "reasoning", "tool_calls", "tool_results"):
        assert getattr(imported, name) == getattr(record, name), name


async def test_line_with_results_needs_no_prompt(http: httpx.AsyncClient, nats_url: str) -> None:
    call = {"id": "c1", "function": {"name": "go", "arguments": "{}"}}
    result = {"tool_call_id": "c1", "content": "ok"}
    lines = (
        {"prompt": "p", "response": "", "tool_calls": [call]},
        {"prompt": "", "response": "r", "tool_results": [result]},
    )
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty()
    ) as asked:
        answer = await http.post(
            "/sessions/s/messages", content="\n".join(json.dumps(line) for line in lines)
        )
    assert answer.json() == {"status": "success", "imported": 2}
    first, second = asked[0].exchanges
    assert first.tool_calls[0].function.name == "go" and second.tool_results[0].content == "ok"


async def test_messages_have_reasoning_and_calls(http: httpx.AsyncClient, nats_url: str) -> None:
    record = with_channels("a")
    view = replace(
        MESSAGE,
        reasoning=record.reasoning,
        tool_calls=record.tool_calls,
        tool_results=record.tool_results,
    )
    async with scripted_history(nats_url, ExchangePage((view,))):
        (message,) = (await http.get("/messages?session_id=s")).json()
    assert message["reasoning"] == "Hm. And?"
    assert message["tool_calls"][0]["function"] == {"name": "go", "arguments": '{"to": "🙂"}'}
    assert message["tool_results"] == [{"tool_call_id": "c0", "content": "done"}]


async def test_line_without_an_id_gets_the_same_id_each_time(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty()
    ) as asked:
        for _ in range(2):
            await http.post("/sessions/s/messages", content=LINE + b"\n" + LINE)
    assert asked[0] == asked[1]
    first, second = asked[0].exchanges
    assert first.request_id != second.request_id and subjects.is_id(first.request_id)


async def test_long_import_is_sent_in_batches_in_order(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    lines = [json.dumps({"prompt": f"{n}", "response": "x" * 100_000}) for n in range(10)]
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty()
    ) as asked:
        answer = await http.post("/sessions/s/messages", content="\n".join(lines))
    assert answer.json()["imported"] == 10 and len(asked) > 1
    prompts = [exchange_.prompt for request in asked for exchange_ in request.exchanges]
    assert prompts == [str(n) for n in range(10)]


async def parts(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_import_of_many_mib_is_complete(http: httpx.AsyncClient, nats_url: str) -> None:
    line = json.dumps({"prompt": "p", "response": "ü" * 100_000}).encode() + b"\n"
    whole = line * 20
    cuts = [whole[at : at + 777_777] for at in range(0, len(whole), 777_777)]
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty()
    ) as asked:
        answer = await http.post("/sessions/s/messages", content=parts(*cuts))
    assert answer.json() == {"status": "success", "imported": 20}
    assert sum(len(request.exchanges) for request in asked) == 20
    assert len({exchange_.request_id for request in asked for exchange_ in request.exchanges}) == 20


async def test_failed_import_reports_the_imported_lines(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    large = json.dumps({"prompt": "p", "response": "x" * 400_000}).encode()
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty()
    ) as asked:
        answer = await http.post(
            "/sessions/s/messages", content=b"\n".join([large, large, large, b'{"prompt":"p"}'])
        )
    assert (answer.status_code, answer.json()["imported"]) == (400, 2)
    message = error_of(answer)["message"] or ""
    assert message.startswith("Line 4: ") and "first 2 lines are imported" in message
    assert len(asked) == 2

    full = ServiceError("history_full", "There is no room.", 5)
    lines = b"\n".join([large] * 3)
    async with answering(
        nats_url, subjects.history("import", subjects.ANY), ImportRequest, Empty(), full
    ) as asked:
        answer = await http.post("/sessions/s/messages", content=lines)
    assert (answer.status_code, answer.json()["imported"]) == (503, 1)
    assert error_of(answer)["code"] == "history_full" and answer.headers["retry-after"] == "5"


async def test_endless_line_is_a_413(http: httpx.AsyncClient) -> None:
    endless = [b'{"prompt":"p","response":"'] + [b"x" * 100_000] * 200
    answer = await http.post("/sessions/s/messages", content=parts(*endless))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("GET", "/sessions?limit=0", b"", "limit"),
        ("GET", "/sessions?limit=x", b"", "limit"),
        ("GET", "/sessions?before=", b"", "before"),
        ("GET", "/sessions?before=1", b"", "before"),
        ("GET", "/sessions?before=1-" + "9" * 19, b"", "before"),
        ("GET", "/sessions/s/messages?before=next", b"", "before"),
        ("GET", "/sessions/s/messages?limit=1001", b"", "limit"),
        ("GET", "/messages?before=x", b"", "before"),
        ("GET", "/messages?before=0-0", b"", "before"),
        ("GET", "/sessions/" + "x" * 129 + "/messages", b"", "session_id"),
        ("GET", "/sessions/" + "x" * 129 + "/export", b"", "session_id"),
        ("GET", "/sessions/s/export?after=%00", b"", "after"),
        ("GET", "/sessions/%FF/messages", b"", None),
        ("DELETE", "/sessions/" + "x" * 129, b"", "session_id"),
        ("DELETE", "/sessions/%FF", b"", None),
        ("PATCH", "/sessions/" + "x" * 129, b'{"title":"t"}', "session_id"),
        ("PATCH", "/sessions/s", b"", None),
        ("PATCH", "/sessions/s", b"{}", None),
        ("PATCH", "/sessions/s", b"[]", None),
        ("PATCH", "/sessions/s", b'{"title":""}', "title"),
        ("PATCH", "/sessions/s", b'{"title":7}', "title"),
        ("PATCH", "/sessions/s", b'{"title":"t","metadata":{"a":5}}', "metadata"),
        ("PATCH", "/sessions/s", b'{"titel":"t"}', "titel"),
        ("PATCH", "/sessions/s", b'{"title":"' + b"x" * 201 + b'"}', "title"),
        (
            "PATCH",
            "/sessions/s",
            b'{"system_prompt":"' + b"x" * 16_385 + b'"}',
            "system_prompt",
        ),
        ("POST", "/sessions/s/messages", b" \n", None),
        ("POST", "/sessions/s/messages", LINE + b"\nhello", None),
        ("POST", "/sessions/s/messages", b'{"prompt":"p"}', "response"),
        ("POST", "/sessions/s/messages", b'{"prompt":"","response":"r"}', "prompt"),
        (
            "POST",
            "/sessions/s/messages",
            b'{"prompt":"p","response":"r","request_id":"a.b"}',
            "request_id",
        ),
        (
            "POST",
            "/sessions/s/messages",
            b'{"prompt":"p","response":"r","answered_at":"yesterday"}',
            "answered_at",
        ),
        ("POST", "/sessions/" + "x" * 129 + "/messages", LINE, "session_id"),
        ("POST", "/sessions/s/messages", b'{"prompt":"p","response":"r","modle":null}', "modle"),
    ],
    ids=lambda value: None if value is None else str(value)[:40],
)
async def test_invalid_input_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, method: str, path: str, body: bytes, param: str | None
) -> None:
    answer = await http.request(method, path, content=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)


@pytest.mark.parametrize(
    ("senseless", "param"),
    [
        ({"asked_at": "0001-01-01T00:00:00+12:00"}, "asked_at"),
        ({"answered_at": "9999-12-31T23:59:59-12:00"}, "answered_at"),
        ({"usage": {"prompt_tokens": 2**63, "completion_tokens": 1, "cached_tokens": 0}}, "usage"),
        ({"usage": {"prompt_tokens": -1, "completion_tokens": 1, "cached_tokens": 0}}, "usage"),
        ({"model": {"name": "m", "digest": "d", "context": 2**63, "bytes": 1}}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None, "tool_results": [{"tool_call_id": "c", "content": "x"}]}, "prompt"),
        ({"feedback": {"given_at": "0001-01-01T00:00:00+12:00"}}, "feedback"),
        ({"feedback": {"rating": "great"}}, "feedback"),
        ({"feedback": {"correction": "c"}, "tool_calls": [CALL]}, "feedback"),
        ({"reasoning": 5}, "reasoning"),
        ({"tool_calls": [{"id": "c", "function": {"name": "go", "arguments": {}}}]}, "tool_calls"),
        ({"tool_results": [{"content": "x"}]}, "tool_call_id"),
        ({"tool_results": [{"tool_call_id": "c", "content": "x"}] * 129}, "tool_results"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_import_of_out_of_range_values_names_the_line(
    http: httpx.AsyncClient, senseless: dict[str, object], param: str
) -> None:
    line = json.dumps({"prompt": "p", "response": "r"} | senseless).encode()
    answer = await http.post("/sessions/s/messages", content=LINE + b"\n" + line)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert (error["message"] or "").startswith("Line 2: ")


@pytest.mark.parametrize("is_frozen", [False, True], ids=["slow", "frozen"])
async def test_request_is_repeated_only_if_history_is_silent(
    bus: Bus, nats_url: str, is_frozen: bool
) -> None:
    """The first process gets the request; the second one only a retry."""
    limits = replace_limits(LIMITS, silence_seconds=0.3)
    received, retried = [], []
    may_finish = asyncio.Event()

    async def work(subject: str, request: ImportRequest) -> Empty:
        received.append(request)
        await may_finish.wait()
        return Empty()

    async def freeze(delivery: Delivery) -> None:
        received.append(decode(delivery.data, ImportRequest))

    async def retry(subject: str, request: ImportRequest) -> Empty:
        retried.append(request)
        return Empty()

    at = subjects.history("import", subjects.ANY)
    async with (
        Bus.connect(nats_url, "first") as first,
        Bus.connect(nats_url, "second") as second,
        edge_on(bus, limits=limits) as http,
    ):
        slow = first.endpoint("it", at, ImportRequest, work)
        await first.serve("history", "first", [Endpoint("it", at, freeze) if is_frozen else slow])
        await second.serve_retries([second.endpoint("it", at, ImportRequest, retry)])
        asking = asyncio.create_task(http.post("/sessions/s/messages", content=LINE))
        if not is_frozen:
            await asyncio.wait({asking}, timeout=3 * limits.silence_seconds)
            assert not asking.done()
            may_finish.set()
        assert (await asking).json()["imported"] == 1
    assert (len(received), len(retried)) == (1, int(is_frozen))


async def test_largest_exchange_follows_the_max_payload_of_nats(bus: Bus) -> None:
    line = json.dumps({"prompt": "p", "response": "x" * 62_000})
    small = replace_limits(LIMITS, max_payload_bytes=64 * 1024)
    async with edge_on(bus, limits=small) as http:
        answer = await http.post("/sessions/s/messages", content=line)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")
    assert "the maximum is 61,440" in (error_of(answer)["message"] or "")
    assert bus.max_payload >= 2**20


async def test_invalid_line_is_named_by_its_number(http: httpx.AsyncClient) -> None:
    answer = await http.post("/sessions/s/messages", content=LINE + b"\n\n{}")
    assert (error_of(answer)["message"] or "").startswith("Line 3: ")


@pytest.mark.parametrize(
    "line",
    [{"prompt": "x" * 65_537, "response": "r"}, {"prompt": "p", "response": "\u0001" * 180_000}],
)
async def test_too_large_exchange_is_a_413(http: httpx.AsyncClient, line: dict[str, str]) -> None:
    answer = await http.post("/sessions/s/messages", content=json.dumps(line))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/sessions", b""),
        ("GET", "/sessions/s/messages", b""),
        ("GET", "/sessions/s/export", b""),
        ("PATCH", "/sessions/s", b'{"title":"t"}'),
        ("DELETE", "/sessions/s", b""),
        ("POST", "/sessions/s/messages", LINE),
    ],
)
async def test_session_routes_need_history_and_a_key(
    http: httpx.AsyncClient, bus: Bus, method: str, path: str, body: bytes
) -> None:
    answer = await http.request(method, path, content=body)
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert error_of(answer)["code"] == "history_unavailable"
    async with edge_on(bus, keys="acme:s3cret") as locked:
        answer = await locked.request(method, path, content=body)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "unauthorized")


async def test_key_lists_its_own_sessions(bus: Bus, nats_url: str) -> None:
    async with edge_on(bus, keys="acme:s3cret") as http:
        subject = subjects.history("sessions", "acme")
        async with answering(nats_url, subject, SessionsRequest, SessionPage(())):
            answer = await http.get("/sessions", headers={"X-API-Key": "s3cret"})
    assert answer.json() == {"sessions": [], "next": None}


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


async def test_clear_history_clears_the_session_in_the_query(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_history(nats_url, ExchangePage(())) as history:
        answer = await http.post("/clear-history")
        await http.post("/clear-history?session_id=mine")
    assert answer.json()["status"] == "success" and answer.json()["message"]
    (_, default), (_, mine) = history.asked
    assert isinstance(default, ClearRequest) and isinstance(mine, ClearRequest)
    assert (default.session_id, mine.session_id) == ("default", "mine")
    assert default.request_id and mine.request_id and default.request_id != mine.request_id


async def test_clear_history_takes_the_session_from_the_body(
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

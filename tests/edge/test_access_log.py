import logging

import httpx
import pytest

from services.runtime import logs


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        (b"trace 1/a", "trace 1/a"),
        (b"x" * 100, "x" * 64),
        (b"a\xffb\tc", "abc"),
    ],
)
async def test_printable_part_of_the_request_id_is_echoed(
    http: httpx.AsyncClient, given: bytes, echoed: str
) -> None:
    answer = await http.get("/nope", headers={b"X-Request-Id": given})
    assert answer.headers["x-request-id"] == echoed


async def test_request_without_an_id_gets_one(http: httpx.AsyncClient) -> None:
    ids = {(await http.get("/healthz")).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


async def test_request_is_one_log_line_without_its_query(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "services.edge.access_log")
    monkeypatch.setattr(caplog.handler, "formatter", logs.TextFormatter("edge"))
    await http.get("/no%0Apath?session_id=private", headers={"X-Request-Id": "mine"})
    await http.get("/healthz")
    await http.get("/page/0/js/main.js")
    (line,) = caplog.text.splitlines()
    assert "[mine] request finished method=GET path=/no%0Apath status=404 ms=" in line


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER = PARENT.replace("4bf9", "ffff")


async def test_trace_of_the_caller_is_in_response_and_log(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "services.edge.access_log")
    monkeypatch.setattr(caplog.handler, "formatter", logs.TextFormatter("edge"))
    answer = await http.get("/nope", headers={"traceparent": PARENT})
    trace_id = PARENT.split("-")[1]
    assert answer.headers.get_list("x-trace-id") == [trace_id]
    (line,) = caplog.text.splitlines()
    assert line.endswith(f" trace_id={trace_id}")


@pytest.mark.parametrize(
    "parents",
    [[], ["nonsense"], [PARENT, OTHER], [PARENT + "\xff"]],
    ids=lambda each: str(len(each)),
)
async def test_request_without_one_valid_trace_begins_one(
    http: httpx.AsyncClient, parents: list[str]
) -> None:
    headers = [(b"traceparent", each.encode("latin-1")) for each in parents]
    ids = {(await http.get("/nope", headers=headers)).headers["x-trace-id"] for _ in range(2)}
    assert len(ids) == 2 and not any(each in parent for each in ids for parent in parents)


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/chat", {"prompt": ""}, "error"),
        ("/v1/chat/completions", {"messages": []}, "error"),
        ("/v1/responses", {"input": 1}, "error"),
        ("/v1/embeddings", {}, "error"),
        ("/v1/messages", {}, ""),
        ("/api/chat", {"messages": 1}, ""),
    ],
)
async def test_error_of_each_api_names_the_trace(
    http: httpx.AsyncClient, path: str, body: dict[str, object], where: str
) -> None:
    answer = await http.post(path, json=body, headers={"traceparent": PARENT})
    content = answer.json()
    assert answer.status_code == 400
    assert (content[where] if where else content)["trace_id"] == PARENT.split("-")[1]

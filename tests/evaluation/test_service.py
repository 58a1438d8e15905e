"""Requests to a scripted HTTP server, and what goes wrong with them."""

import json

import pytest

from evaluation.service import Answer, Service, ServiceUnusable
from tests.evaluation.http_server import Response, completion, failure, http_server
from tests.servers import free_port

BODY = {"model": "m", "messages": []}


async def test_answer_is_streamed_and_measured() -> None:
    async with http_server(completion("Hallo", "length")) as server, Service(server.url, "k") as it:
        answer = await it.complete(BODY)
    assert (answer.text, answer.finish_reason, answer.error) == ("Hallo", "length", "")
    assert answer.completion_tokens == 5 and answer.ttft is not None and answer.tokens_per_second
    ((line, body),) = server.requests
    assert line == "POST /v1/chat/completions" and body["stream_options"] == {"include_usage": True}
    assert server.authorizations == ["bearer k"]


async def test_overloaded_service_is_asked_again() -> None:
    busy = failure(503, "Full.", Retry_After="0")
    async with http_server(busy, busy, completion("ok")) as server, Service(server.url, "") as it:
        assert (await it.complete(BODY)).text == "ok"
        assert len(server.requests) == 3


async def test_service_that_stays_overloaded_can_not_be_used() -> None:
    """Else each line would fail, and a model that no worker has would be no worse than it."""
    busy = [failure(503, "Full.", Retry_After="0")] * 6
    async with http_server(*busy) as server, Service(server.url, "") as it:
        with pytest.raises(ServiceUnusable, match="Full."):
            await it.complete(BODY)


async def test_broken_connection_is_tried_again() -> None:
    cut = 'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
    responses = [(200, {"Content_Length": "999"}, cut), completion("ok")]
    async with http_server(*responses) as server, Service(server.url, "", retry_seconds=0) as it:
        assert (await it.complete(BODY)).text == "ok"


async def test_separators_of_unicode_are_text() -> None:
    chunk = {"choices": [{"delta": {"content": "a\u2028b\x85c"}, "finish_reason": "stop"}]}
    stream = f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\ndata: [DONE]\r\n\r\n"
    async with http_server((200, {}, stream)) as server, Service(server.url, "") as it:
        answer = await it.complete(BODY)
    assert (answer.text, answer.error) == ("a\u2028b\x85c", "")


async def test_rejected_request_is_an_error() -> None:
    async with http_server(failure(400, "Bad.")) as server, Service(server.url, "") as it:
        assert await it.complete(BODY) == Answer(error="400: Bad.")


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        ('data: {"error": {"message": "The worker is lost."}}\n\n', "The worker is lost."),
        ('data: {"choices": [{"delta": {"content": "x"}}]}\n\n', "the stream ended before"),
        ("data: <html>\n\n", "the stream is malformed"),
    ],
)
async def test_cut_stream_is_an_error(stream: str, error: str) -> None:
    async with http_server((200, {}, stream)) as server, Service(server.url, "") as it:
        assert (await it.complete(BODY)).error.startswith(error)


async def test_absent_service_can_not_be_used() -> None:
    async with Service(f"http://127.0.0.1:{free_port()}", "", retry_seconds=0) as it:
        with pytest.raises(ServiceUnusable, match="can't be reached"):
            await it.complete(BODY)
        with pytest.raises(ServiceUnusable, match="can't be reached"):
            await it.check_model("m")


async def test_unknown_model_is_refused_with_the_reason() -> None:
    missing = failure(404, "No model 'm'.")
    responses: list[Response] = [missing, (200, {}, "{}"), missing, (404, {}, "<html>")]
    async with http_server(*responses) as server, Service(server.url, "") as it:
        with pytest.raises(ServiceUnusable, match="No model 'm'"):
            await it.check_model("m")
        await it.check_model("m:a@0.5")
        assert server.requests[1][0] == "GET /v1/models/m:a@0.5"
        with pytest.raises(ServiceUnusable, match="No model 'm'"):
            await it.check_model("a?b#c d")
        assert server.requests[2][0] == "GET /v1/models/a%3Fb%23c%20d"
        with pytest.raises(ServiceUnusable, match="is it the URL of an edge"):
            await it.check_model("m")


@pytest.mark.parametrize(("url", "key"), [("http://x:y", ""), ("http://x", "ä")])
def test_invalid_url_or_key_is_explained(url: str, key: str) -> None:
    with pytest.raises(ServiceUnusable, match="can't be used"):
        Service(url, key)

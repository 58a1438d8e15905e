import json
from collections.abc import Iterator

import httpx
import pytest

from services.contract.errors import ErrorCode
from services.edge.api import chat
from services.edge.errors import TABLE
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on

DEEP = b"[" * 10_000


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    """Check that the error has the shape of every error, and return it."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() - {"imported"} == {"error"}
    error: dict[str, str | None] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code", "trace_id"}
    assert error["trace_id"] == answer.headers["x-trace-id"]
    assert error["message"] and error["message"].endswith(".")
    return error


def test_every_code_has_a_status() -> None:
    assert set(TABLE) == set(ErrorCode.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b" \n", None),
        (b"hello", None),
        (b"[]", None),
        (b"null", None),
        (DEEP, None),
        (b'{"a":' * 10_000, None),
        (b'{"prompt":"a","stop":' + DEEP, None),
        (b"{}", "prompt"),
        (b'{"prompt":""}', "prompt"),
        (b'{"prompt":" \\n\\t\\u00a0"}', "prompt"),
        (b'{"prompt":1}', "prompt"),
        (b'{"prompt":null}', "prompt"),
        (b'{"prompt":["a"]}', "prompt"),
        (b'{"prompt":"\xff"}', None),
        (b'{"prompt":"\\ud800"}', None),
        (b'{"prompt":"\xed\xa0\x80"}', None),
        (b'{"prompt":"a","promt":"b"}', "promt"),
        (b'{"prompt":"a","request_id":"b"}', "request_id"),
        (b'{"prompt":"a","temperature":NaN}', None),
        (b'{"prompt":"a","temperature":1e999}', "temperature"),
        (b'{"prompt":"a","seed":' + b"9" * 10_000 + b"}", "seed"),
        (b'{"prompt":"a","max_tokens":0}', "max_tokens"),
        (b'{"prompt":"a","stop":[""]}', "stop"),
        (b'{"prompt":"a","min_p":-0.1}', "min_p"),
        (b'{"prompt":"a","mirostat":3}', "mirostat"),
        (b'{"prompt":"a","mirostat":true}', "mirostat"),
        (b'{"prompt":"a","dry_base":0}', "dry_base"),
        (b'{"prompt":"a","dry_sequence_breakers":"\\n"}', "dry_sequence_breakers"),
        (b'{"prompt":"a","typ_p":0.5}', "typ_p"),
        (b'{"prompt":"a","ignore_eos":"yes"}', "ignore_eos"),
        (b'{"prompt":"a","min_tokens":9,"max_tokens":8}', "min_tokens"),
        (b'{"prompt":"a","presence_penalty":3}', "presence_penalty"),
        (b'{"prompt":"a","frequency_penalty":"much"}', "frequency_penalty"),
        (b'{"prompt":"a","logit_bias":{"-1":1}}', "logit_bias"),
        (b'{"prompt":"a","logit_bias":{"1":1e999}}', "logit_bias"),
        (b'{"prompt":"a","logprobs":true}', "logprobs"),
        (b'{"prompt":"a","response_format":"json"}', "response_format"),
        (b'{"prompt":"a","response_format":{"type":"xml"}}', "response_format"),
        (b'{"prompt":"a","grammar":["root"]}', "grammar"),
        (b'{"prompt":"a","grammar":"r","response_format":{"type":"json_object"}}', None),
        (b'{"prompt":"a","session_id":""}', "session_id"),
        (b'{"prompt":"a","model":""}', "model"),
        (b'{"prompt":"a","session_id":"' + b"x" * 129 + b'"}', "session_id"),
    ],
    ids=lambda value: None if value is None else str(value)[:30],
)
async def test_invalid_body_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, body: bytes, param: str | None
) -> None:
    answer = await http.post("/chat", content=body)
    error = error_of(answer)
    assert answer.status_code == 400
    assert (error["code"], error["type"]) == ("invalid_request", "invalid_request_error")
    assert error["param"] == param


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/messages?limit=0", "limit"),
        ("/messages?limit=1001", "limit"),
        ("/messages?limit=abc", "limit"),
        ("/messages?limit=", "limit"),
        ("/messages?limit=" + "9" * 5000, "limit"),
        ("/messages?session_id=", "session_id"),
        ("/messages?session_id=" + "x" * 129, "session_id"),
    ],
)
async def test_invalid_query_is_a_400_that_names_the_parameter(
    http: httpx.AsyncClient, path: str, param: str
) -> None:
    answer = await http.get(path)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("method", "path", "body", "start"),
    [
        ("POST", "/chat", b'{"prompt":""}', "The field `prompt` is missing or blank."),
        ("POST", "/chat", b'{"prompt":"a', "The JSON is incomplete. Send JSON"),
        ("POST", "/chat", b'{"promt":"a"}', "Object contains unknown field `promt`. The fields"),
        ("GET", "/messages?before=x", b"", "The URL parameter `before` must be the `next`"),
        ("POST", "/v1/chat/completions", b'{"messages":[]}', "The field `messages` must not be"),
    ],
)
async def test_message_is_plain_english(
    http: httpx.AsyncClient, method: str, path: str, body: bytes, start: str
) -> None:
    answer = await http.request(method, path, content=body)
    assert (error_of(answer)["message"] or "").startswith(start)


def chunks() -> Iterator[bytes]:
    for _ in range(20):
        yield b"x" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"prompt": "x" * 65_537}).encode(),
        json.dumps({"prompt": "ü" * 32_769}, ensure_ascii=False).encode(),
        b"x" * 2_000_000,
        chunks(),
    ],
    ids=["prompt", "prompt of two-byte characters", "body", "body of unknown length"],
)
async def test_too_large_prompt_or_body_is_a_413(
    http: httpx.AsyncClient, body: bytes | Iterator[bytes]
) -> None:
    content = body if isinstance(body, bytes) else as_async(body)
    answer = await http.post("/chat", content=content)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")


async def as_async(chunks: Iterator[bytes]):  # type: ignore[no-untyped-def]
    for chunk in chunks:
        yield chunk


async def test_errors_of_litestar_have_the_same_shape(http: httpx.AsyncClient) -> None:
    missing = await http.get("/nope")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    assert "No such route: GET /nope. GET /schema" in (error_of(missing)["message"] or "")
    wrong = await http.put("/chat")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["allow"]
    assert "PUT is not allowed on /chat; use POST." in (error_of(wrong)["message"] or "")
    misnamed = await http.get("/", headers={"Host": "a b"})
    assert (misnamed.status_code, error_of(misnamed)["code"]) == (400, "invalid_request")


async def test_unexpected_exception_is_a_500_without_details(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("the secret of the house")

    monkeypatch.setattr(chat, "read_prompt", broken)
    async with edge_on(bus) as http:
        answer = await http.post("/chat", json={"prompt": "hi"})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert "the secret of the house" in caplog.text

"""`/chat`: the request to the worker, resuming and cancelling."""

import asyncio
import json

import httpx
import pytest

from services.contract.messages import JsonSchema, JsonSchemaFormat
from services.runtime.bus import Bus
from tests.client.story_worker import STORY, story_worker
from tests.edge.conftest import edge_on
from tests.fakes import HELLO, history_of, scripted_worker

JSON = {"prompt": "hi"}


async def read_until(answer: httpx.Response, text: str) -> str:
    """Read until the answer starts with `text`; return the id of the last event."""
    answered = ""
    async for line in answer.aiter_lines():
        if line.startswith("id: "):
            last_id = line.removeprefix("id: ")
        if line.startswith("data: "):
            answered += json.loads(line.removeprefix("data: ")).get("token", "")
        if answered.startswith(text):
            return last_id
    raise AssertionError(answered)


def text_of(answer: httpx.Response) -> str:
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data")]
    assert events[-1]["done"], "the last event is the end"
    return "".join(event["token"] for event in events[:-1])


async def test_answer_resumes_at_another_edge_after_its_last_event(nats_url: str) -> None:
    async with (
        Bus.connect(nats_url, "one") as one,
        Bus.connect(nats_url, "two") as two,
        edge_on(one) as first,
        edge_on(two) as second,
        story_worker(nats_url) as worker,
    ):
        async with first.stream("POST", "/chat", json=JSON) as answer:
            last_id = await read_until(answer, STORY[:9])
            address = answer.headers["content-location"]
        for _ in range(2):  # while it runs, and after its end
            rest = await second.get(address, headers={"Last-Event-ID": last_id})
            assert rest.headers["content-type"].startswith("text/event-stream")
            assert rest.headers["content-location"] == address
            assert text_of(rest) == STORY[int(last_id) :]
        assert text_of(await second.get(address)) == STORY
        assert len(worker.requests) == 1 and worker.cancelled == []


async def test_resume_after_the_last_token_sends_only_done(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with story_worker(nats_url):
        address = (await http.post("/chat", json=JSON)).headers["content-location"]
        rest = await http.get(address, headers={"Last-Event-ID": str(len(STORY))})
        assert text_of(rest) == ""


async def test_resume_after_the_end_is_204_which_stops_an_event_source(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with story_worker(nats_url):
        whole = await http.post("/chat", json=JSON)
        *_, end_id = [line[4:] for line in whole.text.splitlines() if line.startswith("id: ")]
        address = whole.headers["content-location"]
        after_the_end = await http.get(address, headers={"Last-Event-ID": end_id})
    assert (after_the_end.status_code, after_the_end.content) == (204, b"")
    assert (await http.get("/chat/a*b", headers={"Last-Event-ID": end_id})).status_code == 404


async def test_post_with_last_event_id_needs_an_idempotency_key(http: httpx.AsyncClient) -> None:
    for last_id in ("5", "end"):
        answer = await http.post("/chat", json=JSON, headers={"Last-Event-ID": last_id})
        assert answer.status_code == 400
        assert "Idempotency-Key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("last_id", ["-1", "x", "1.5", "٣", "9" * 10])
async def test_invalid_last_event_id_is_rejected(http: httpx.AsyncClient, last_id: str) -> None:
    answer = await http.get("/chat/r", headers=[(b"last-event-id", last_id.encode())])
    assert answer.status_code == 400
    assert "Last-Event-ID" in answer.json()["error"]["message"]


async def test_resume_of_an_unknown_request_is_404(
    http: httpx.AsyncClient, bus: Bus, nats_url: str
) -> None:
    async with story_worker(nats_url), history_of(bus, None):
        assert (await http.get("/chat/unknown")).status_code == 404
        assert (await http.get("/chat/a*b")).status_code == 404


async def test_resume_of_another_tenants_answer_is_404(bus: Bus, nats_url: str) -> None:
    async with edge_on(bus, "acme:s3cret") as http, story_worker(nats_url):
        async with Bus.connect(nats_url, "open") as other, edge_on(other) as open_edge:
            address = (await open_edge.post("/chat", json=JSON)).headers["content-location"]
            assert text_of(await open_edge.get(address)) == STORY
        async with history_of(bus, None):
            answer = await http.get(address, headers={"X-API-Key": "s3cret"})
        assert answer.status_code == 404
        assert (await http.get(address)).status_code == 401


async def test_every_field_reaches_the_worker(http: httpx.AsyncClient, nats_url: str) -> None:
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
        "repeat_last_n": -1,
        "dry_multiplier": 0.8,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": 0,
        "dry_sequence_breakers": ["\n", "*"],
        "top_n_sigma": -1,
        "typical_p": 0.9,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.1,
        "dynatemp_range": 0.4,
        "dynatemp_exponent": 1.5,
        "mirostat": 2,
        "mirostat_tau": 4,
        "mirostat_eta": 0.2,
        "min_keep": 1,
        "min_tokens": 3,
        "ignore_eos": True,
    }
    async with scripted_worker(nats_url, HELLO) as worker:
        answer = await http.post("/chat", json=body)
    assert answer.status_code == 200
    ((subject, request),) = worker.requests
    assert subject == "chat.request"
    assert {name: getattr(request, name) for name in body} == body | {
        "stop": ("\n", "User:"),
        "dry_sequence_breakers": ("\n", "*"),
    }
    assert answer.headers["content-location"] == f"/chat/{request.request_id}"


async def test_schema_reaches_the_worker_unchanged(http: httpx.AsyncClient, nats_url: str) -> None:
    schema = {"type": "object", "properties": {"größe": {"enum": [1, None]}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    async with scripted_worker(nats_url, HELLO) as worker:
        answer = await http.post("/chat", json={"prompt": "hi", "response_format": form})
    assert answer.status_code == 200
    assert worker.requests[0][1].response_format == JsonSchemaFormat(JsonSchema(schema, "n", True))


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "multipart/form-data", "a;;/b"]
)
async def test_body_is_json_whatever_its_content_type(
    http: httpx.AsyncClient, nats_url: str, content_type: str | None
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    async with scripted_worker(nats_url, HELLO):
        answer = await http.post("/chat", content=b'{"prompt":"hi"}', headers=headers)
    assert answer.status_code == 200


async def test_longest_prompt_is_accepted(http: httpx.AsyncClient, nats_url: str) -> None:
    body = json.dumps({"prompt": "\u0001" * 65_536})  # six bytes each on the wire
    async with scripted_worker(nats_url, HELLO) as worker:
        assert (await http.post("/chat", content=body)).status_code == 200
    assert len(worker.requests[0][1].prompt) == 65_536


async def test_delete_cancels_an_answer(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        assert (await http.delete("/chat/r-1_x")).status_code == 202
        async with asyncio.timeout(1):
            assert await worker.cancelled.get() == ("_", "r-1_x")


@pytest.mark.parametrize("request_id", ["a.b", "%2A", "%3E", "a%20b", "%0D%0APUB", "x" * 65])
async def test_invalid_request_id_is_not_found(http: httpx.AsyncClient, request_id: str) -> None:
    assert (await http.delete(f"/chat/{request_id}")).status_code == 404

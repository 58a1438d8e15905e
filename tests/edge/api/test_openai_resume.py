"""Chat completions whose stream is lost, and that are resumed or retrieved by their id."""

import json

import httpx
import openai
import pytest

from services.contract.answer import Answer
from services.runtime.bus import Bus
from tests.client.story_worker import STORY, story_worker
from tests.edge.conftest import edge_on, until
from tests.fakes import answer_events

BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
URL = "/v1/chat/completions"
RESUMABLE = {"X-Resumable": "true"}
PARTS = (
    ("reasoning", "I look it up."),
    ("content", "One moment: "),
    ("call", "go"),
    ("arguments", '{"to":'),
    ("arguments", '"Rome"}'),
)


def read(stream: str) -> tuple[str, str]:
    """Return the text of all channels, and the last id."""
    text, last_id = "", ""
    for line in stream.splitlines():
        if line.startswith("id: "):
            last_id = line.removeprefix("id: ")
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text += text_of(choice["delta"])
    return text, last_id


def text_of(delta: dict[str, object]) -> str:
    calls = delta.get("tool_calls") or []
    assert isinstance(calls, list)
    functions = [call["function"] for call in calls]
    called = "".join(each.get("name", "") + each["arguments"] for each in functions)
    return f"{delta.get('reasoning_content', '')}{delta.get('content') or ''}{called}"


async def test_stream_resumes_at_another_edge_after_its_last_event(nats_url: str) -> None:
    async with (
        Bus.connect(nats_url, "one") as one,
        Bus.connect(nats_url, "two") as two,
        edge_on(one) as first,
        edge_on(two) as second,
        story_worker(nats_url) as worker,
    ):
        received = ""
        async with first.stream("POST", URL, json=BODY, headers=RESUMABLE) as answer:
            address, request_id = answer.headers["content-location"], answer.headers["x-request-id"]
            async for line in answer.aiter_lines():
                received += f"{line}\n"
                if len(read(received)[0]) > 9:
                    break
        assert address == f"{URL}/{request_id}"
        begin, last_id = read(received)
        for _ in range(2):  # while it runs, and after its end
            rest = await second.get(address, headers={"Last-Event-ID": last_id})
            assert rest.headers["content-type"].startswith("text/event-stream")
            assert (begin[: int(last_id)] + read(rest.text)[0], read(rest.text)[1]) == (
                STORY,
                "end",
            )
            assert rest.text.endswith("data: [DONE]\n\n")
        assert len(worker.requests) == 1 and worker.cancelled == []


async def test_every_offset_of_every_channel_is_resumed_exactly(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    events = answer_events(*PARTS)
    whole = "".join(text for _, text in PARTS)
    async with story_worker(nats_url, story=events):
        answer = await http.post(URL, json=BODY, headers=RESUMABLE)
        for offset in [0, *(event.end for event in events)]:
            headers = {"Last-Event-ID": str(offset)}
            rest = await http.get(answer.headers["content-location"], headers=headers)
            assert read(rest.text)[0] == whole[offset:]


async def test_nothing_to_resume_is_204(http: httpx.AsyncClient, nats_url: str) -> None:
    async with story_worker(nats_url):
        answer = await http.post(URL, json=BODY, headers=RESUMABLE)
        address, last_id = answer.headers["content-location"], read(answer.text)[1]
        assert (await http.get(address, headers={"Last-Event-ID": last_id})).status_code == 204
    unknown = "chatcmpl-01a221e6-e800-7f54-a17e-ca3df9ee3113"
    assert (await http.get(f"{URL}/{unknown}")).status_code == 204
    assert (await http.get(f"{URL}/a*b")).status_code == 404


async def test_openai_client_retrieves_a_finished_completion(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    events = answer_events(*PARTS)
    async with story_worker(nats_url, story=events):
        asked = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hi"}]
        )
        got = await client.chat.completions.retrieve(asked.id)
    answer = Answer.of(events)
    assert (got.id, got.choices) == (asked.id, asked.choices) and got.usage == asked.usage
    assert got.choices[0].message.content == answer.content
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.retrieve("chatcmpl-01a221e6-e800-7f54-a17e-ca3df9ee3113")


async def test_stream_is_cancelled_by_its_id_only(http: httpx.AsyncClient, nats_url: str) -> None:
    async with story_worker(nats_url) as worker:
        async with http.stream("POST", URL, json=BODY, headers=RESUMABLE) as answer:
            address = answer.headers["content-location"]
        assert worker.cancelled == []
        assert (await http.delete(address)).status_code == 200
        await until(lambda: worker.cancelled != [])


async def test_stream_without_the_header_ends_with_its_connection(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with story_worker(nats_url) as worker:
        async with http.stream("POST", URL, json=BODY) as answer:
            async for line in answer.aiter_lines():
                assert not line.startswith("id: ")
                break
        await until(lambda: worker.cancelled != [])


async def test_resumable_request_has_one_answer(http: httpx.AsyncClient) -> None:
    answer = await http.post(URL, json=BODY | {"n": 2}, headers=RESUMABLE)
    assert answer.status_code == 400 and "n: 1" in answer.json()["error"]["message"]


async def test_id_of_the_caller_stays_in_the_response(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with story_worker(nats_url):
        answer = await http.post(URL, json=BODY, headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.headers["content-location"].startswith(f"{URL}/")

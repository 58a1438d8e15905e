"""`/chat`: the request to the worker, resuming and cancelling."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest

from services.contract.answer import Answer, after_offset
from services.contract.codec import encode
from services.contract.history import Exchange
from services.contract.messages import (
    AnswerEvent,
    JsonSchema,
    JsonSchemaFormat,
    Progress,
    Sampling,
    Started,
    Timings,
    Token,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from services.runtime.bus import Bus
from tests.client.story_worker import FAST, STORY, story_worker
from tests.edge.conftest import LIMITS, edge_on
from tests.fakes import (
    ACCEPTED,
    DONE,
    HELLO,
    answer_events,
    answer_script,
    history_of,
    scripted_worker,
)

JSON = {"prompt": "hi"}
PARTS = [
    *(("reasoning", character) for character in "Hm, 🙂"),
    *(("content", character) for character in "Grüß"),
    *(("reasoning", character) for character in "so."),
    ("call", "go 🙂"),
    *(("arguments", character) for character in '{"to": "Öl"}'),
    *(("content", character) for character in " dich"),
    ("call", "stop"),
    *(("arguments", character) for character in "{}"),
    *(("reasoning", character) for character in "End"),
]
"""An answer with its channels interleaved, one character per event, but for names."""


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


def read_parts(answer: httpx.Response, begin: int = 0) -> tuple[list[AnswerEvent], list[int]]:
    """Return the events as on the bus, whose offsets the client knows by the ids, and the ids."""
    assert answer.status_code == 200, answer.text
    events: list[AnswerEvent] = []
    ids = [begin]
    for block in answer.text.strip().split("\n\n"):
        id_line, data = block.split("\n")
        sent = json.loads(data.removeprefix("data: "))
        if "done" in sent:
            assert id_line == "id: end"
            return events, ids[1:]
        match sent:
            case {"token": text}:
                events.append(Token(ids[-1], text, ()))
            case {"reasoning": text}:
                events.append(Token(ids[-1], text, (), channel="reasoning"))
            case {"tool_call": call}:
                events.append(ToolCallDelta(offset=ids[-1], token_ids=(), **call))
        ids.append(int(id_line.removeprefix("id: ")))
        assert events[-1].end == ids[-1]
    raise AssertionError(answer.text)


def check_resumed(answer: httpx.Response, offset: int) -> None:
    """Check that the parts after the offset, and only these, are in the answer."""
    begin = [each for each in answer_events(*PARTS) if not after_offset(each, offset)]
    rest, _ = read_parts(answer, offset)
    whole, expected = Answer.of([*begin, *rest]), Answer.of(answer_events(*PARTS))
    assert whole == expected
    assert all(event.end > offset for event in rest)


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
        async with asyncio.timeout(30):
            assert await worker.cancelled.get() == ("_", "r-1_x")


@pytest.mark.parametrize("request_id", ["a.b", "%2A", "%3E", "a%20b", "%0D%0APUB", "x" * 65])
async def test_invalid_request_id_is_not_found(http: httpx.AsyncClient, request_id: str) -> None:
    assert (await http.delete(f"/chat/{request_id}")).status_code == 404


# --- channels -------------------------------------------------------------------------------------


async def test_channels_are_events_of_their_own(http: httpx.AsyncClient, nats_url: str) -> None:
    script = answer_script(
        ("reasoning", "Hm 🙂"),
        ("content", "Grüß"),
        ("call", "go"),
        ("arguments", '{"to":'),
        ("arguments", "1}"),
        ("call", "stop"),
        finish_reason="tool_calls",
    )
    async with scripted_worker(nats_url, script):
        answer = await http.post("/chat", json=JSON)
    *parts, last = answer.text.strip().split("\n\n")
    assert parts == [
        'id: 4\ndata: {"reasoning":"Hm 🙂"}',
        'id: 8\ndata: {"token":"Grüß"}',
        'id: 10\ndata: {"tool_call":{"index":0,"id":"callid001","name":"go","arguments":""}}',
        'id: 16\ndata: {"tool_call":{"index":0,"arguments":"{\\"to\\":"}}',
        'id: 18\ndata: {"tool_call":{"index":0,"arguments":"1}"}}',
        'id: 22\ndata: {"tool_call":{"index":1,"id":"callid002","name":"stop","arguments":""}}',
    ]
    done = json.loads(last.partition("data: ")[2])
    assert (done["finish_reason"], done["usage"]["reasoning_tokens"]) == ("tool_calls", 1)


async def test_logprobs_are_in_the_events_of_each_channel(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    logprobs = (TokenLogprob(1, "x", (120,), -0.5, ()),)
    script = (
        ACCEPTED,
        Token(0, "x", (1,), logprobs, "reasoning"),
        ToolCallDelta(1, 0, (1,), "c", "go", logprobs=logprobs),
        DONE,
    )
    async with scripted_worker(nats_url, script):
        answer = await http.post("/chat", json=JSON | {"logprobs": 0})
    lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data")]
    assert [len(line["logprobs"]) for line in lines[:-1]] == [1, 1]


async def test_every_offset_of_a_running_answer_is_resumed_exactly(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    """The worker merges its events, so that their borders are others in a replay."""
    async with story_worker(nats_url, story=answer_events(*PARTS)):
        whole = await http.post("/chat", json=JSON)
        _, ids = read_parts(whole)
        assert len(ids) == len(PARTS)
        for offset in [0, *ids]:
            headers = {"Last-Event-ID": str(offset)}
            rest = await http.get(whole.headers["content-location"], headers=headers)
            check_resumed(rest, offset)


async def test_every_offset_of_a_logged_answer_is_resumed_exactly(
    http: httpx.AsyncClient, bus: Bus, nats_url: str
) -> None:
    events = answer_events(*PARTS)
    answer = Answer.of(events)
    exchange = logged(answer, "Begin: ")
    async with history_of(bus, exchange):
        for offset in [0, *(event.end for event in events)]:
            rest = await http.get(
                f"/chat/{exchange.request_id}", headers={"Last-Event-ID": str(offset)}
            )
            check_resumed(rest, offset)
        beyond = await http.get(f"/chat/{exchange.request_id}", headers={"Last-Event-ID": "9999"})
        assert read_parts(beyond) == ([], [])


@pytest.mark.parametrize("stop_at", [2, 7, 20, 40])
async def test_failover_is_exact_in_every_channel(bus: Bus, nats_url: str, stop_at: int) -> None:
    story = answer_events(*PARTS)
    limits = replace(LIMITS, failover=FAST)
    async with (
        edge_on(bus, limits=limits) as http,
        story_worker(nats_url, "w1", stop_at, story=story) as lost,
    ):
        answering = asyncio.create_task(http.post("/chat", json=JSON))
        await lost.stopped.wait()
        async with story_worker(nats_url, "w2", story=story) as other:
            await lost.kill()
            check_resumed(await answering, 0)
    (request,) = other.requests
    assert request.resume is not None
    assert Answer.of(request.resume.events).length >= stop_at


async def test_key_resumes_in_the_middle_of_a_call(
    http: httpx.AsyncClient, bus: Bus, nats_url: str
) -> None:
    events = answer_events(*PARTS)
    in_call = next(e.end for e in events if isinstance(e, ToolCallDelta) and e.arguments == "t")
    async with story_worker(nats_url, story=events) as worker, history_of(bus, None):
        key = {"Idempotency-Key": f"key {in_call} {id(worker)}"}
        await http.post("/chat", json=JSON, headers=key)
        rest = await http.post("/chat", json=JSON, headers=key | {"Last-Event-ID": str(in_call)})
        check_resumed(rest, in_call)
        assert len(worker.requests) == 1


def logged(answer: Answer, prefix: str = "") -> Exchange:
    """Return the exchange of a request with this prefix as the log has it."""
    now = datetime.now(UTC)
    return Exchange(
        request_id=f"logged-{uuid4()}",
        prompt="hi",
        response=prefix + answer.content,
        prefix_length=len(prefix),
        reasoning=answer.reasoning,
        tool_calls=tuple(answer.tool_calls),
        order=answer.order,
        previous=0,
        epoch=0,
        asked_at=now,
        answered_at=now,
        finish_reason="stop",
        usage=Usage(1, 1, 0),
        timings=Timings(0, 0, 0),
        sampling=Sampling(),
        model=None,
    )


# --- fields for tools, reasoning and prefill ------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}
RESULT = {"tool_call_id": "c1", "content": "sunny"}


async def test_fields_for_tools_and_reasoning_reach_the_worker(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    body = {
        "prompt": "and now?",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "go"}},
        "parallel_tool_calls": True,
        "tool_results": [RESULT],
        "prefix": "Well, ",
        "enable_thinking": True,
        "reasoning_effort": "low",
        "reasoning_budget_tokens": 0,
        "max_completion_tokens": 9,
        "chat_template_kwargs": {"a": {"b": [1, None]}},
    }
    async with scripted_worker(nats_url, HELLO) as worker:
        assert (await http.post("/chat", json=body)).status_code == 200
    ((_, request),) = worker.requests
    sent = json.loads(encode(request))
    assert {name: sent[name] for name in body} == body


async def test_results_need_no_prompt(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        for body in ({"tool_results": [RESULT]}, {"tool_results": [RESULT], "prompt": ""}):
            assert (await http.post("/chat", json=body)).status_code == 200
    assert [request.prompt for _, request in worker.requests] == ["", ""]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": "go"}, "tools"),
        ({"tools": []}, "tools"),
        ({"tools": [{}]}, "function"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "web_search", "function": {"name": "go"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "no"}}}, "tool_choice"),
        ({"tools": [TOOL], "grammar": 'root ::= "x"'}, "grammar"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"tool_results": RESULT}, "tool_results"),
        ({"tool_results": [{"content": "x"}]}, None),
        ({"tool_results": [RESULT | {"content": 5}]}, "tool_results"),
        ({"tool_results": [RESULT] * 129}, "tool_results"),
        ({"prompt": "", "tool_results": []}, "prompt"),
        ({"prompt": " ", "tool_results": [RESULT]}, "prompt"),
        ({"prefix": 5}, "prefix"),
        ({"prefix": None}, "prefix"),
        ({"enable_thinking": "false"}, "enable_thinking"),
        ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking"),
        ({"reasoning_effort": ""}, "reasoning_effort"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"reasoning_budget_tokens": -2}, "reasoning_budget_tokens"),
        ({"reasoning_budget_tokens": 1.5}, "reasoning_budget_tokens"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking": "no"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"continue_final": "content"}, "continue_final"),
    ],
    ids=str,
)
async def test_bad_value_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, nats_url: str, more: dict[str, Any], param: str | None
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        answer = await http.post("/chat", json=JSON | more)
    assert (answer.status_code, worker.requests) == (400, []), answer.text
    if param:
        assert answer.json()["error"]["param"] == param
    assert next(iter(more)) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"prefix": "x" * 70_000},
        {"tool_results": [RESULT | {"content": "x" * 70_000}]},
        {"chat_template_kwargs": {"a": "x" * 70_000}},
        {"chat_template_kwargs": {"a": [[]] * 30_000}},
    ],
    ids=lambda more: str(more)[:30],
)
async def test_large_field_is_a_413(http: httpx.AsyncClient, more: dict[str, Any]) -> None:
    answer = await http.post("/chat", json=JSON | more)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


async def test_longest_results_and_prefix_are_accepted(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    text = "\u0001" * 30_000  # six bytes each on the wire
    body = {"tool_results": [RESULT | {"content": text}], "prefix": text}
    async with scripted_worker(nats_url, HELLO):
        assert (await http.post("/chat", json=body)).status_code == 200


async def test_progress_is_sent_only_if_asked_for(http: httpx.AsyncClient, nats_url: str) -> None:
    waiting = (Progress(2, 0, 0), Started(7, 3, 1, 4))
    async with scripted_worker(nats_url, (ACCEPTED, *waiting, *HELLO[1:])):
        plain = await http.post("/chat", json=JSON)
        shown = await http.post("/chat?progress=true", json=JSON)
    events = [json.loads(line[6:]) for line in shown.text.splitlines() if line[:6] == "data: "]
    assert events[:2] == [
        {"progress": {"queue_position": 2, "prompt_tokens": 0, "prefilled_tokens": 0}},
        {
            "started": {
                "prompt_tokens": 7,
                "cached_tokens": 3,
                "exchanges_kept": 1,
                "exchanges_dropped": 4,
            }
        },
    ]
    assert "progress" not in plain.text and "started" not in plain.text
    wrong = await http.post("/chat?progress=perhaps", json=JSON)
    assert wrong.status_code == 400 and "progress" in wrong.json()["error"]["message"]

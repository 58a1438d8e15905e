"""`/v1/responses` and `/v1/conversations` with OpenAI's client, a real history and two edges."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from openai.types.responses import Response

from services.contract import subjects
from services.contract.codec import decode
from services.contract.conversation import ChatMessage, FunctionCall, ToolCall
from services.contract.messages import ChatRequest
from services.runtime.bus import Bus
from tests.edge.conftest import LIMITS, edge_on
from tests.inference.conftest import nats_with_history
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, LONG, Worker, started

HI: Any = {"role": "user", "content": "hi"}
LIMIT = replace(LIMITS, failover=replace(LIMITS.failover, join_seconds=0.1))
TOOL: Any = {
    "type": "function",
    "name": "go",
    "parameters": {"type": "object", "properties": {}},
    "strict": None,
}


class Setting(NamedTuple):
    worker: Worker
    clients: tuple[openai.AsyncOpenAI, openai.AsyncOpenAI]
    http: httpx.AsyncClient
    requests: list[ChatRequest]
    """All that the worker got."""


@pytest.fixture(scope="module")
async def setting(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setting]:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        folder: Path = tmp_path_factory.mktemp("responses")
        url = await enter(nats_with_history(folder))
        backend = FakeBackend(ANSWERS, 4000, 0.0005)
        worker = await enter(started(url, backend=backend, context=4000))
        buses = [await enter(Bus.connect(url, f"edge {number}")) for number in range(2)]
        https = [await enter(edge_on(bus, limits=LIMIT)) for bus in buses]
        clients = [
            await enter(
                openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="x", max_retries=0)
            )
            for http in https
        ]
        requests: list[ChatRequest] = []
        await buses[0].subscribe(
            subjects.request(subjects.OPEN_TENANT),
            lambda delivery: requests.append(decode(delivery.data, ChatRequest)),
        )
        yield Setting(worker, (clients[0], clients[1]), https[0], requests)


async def create(setting: Setting, question: Any, edge: int = 0, **fields: Any) -> Response:
    got = await setting.clients[edge].responses.create(model="fake", input=question, **fields)
    assert isinstance(got, Response)
    return got


def text_of(item: Any) -> str:
    text: str = item.content[0].text
    return text


def long(character: str, length: int = 2500) -> Any:
    return [{"role": "user", "content": character * length}, HI]


async def until_ended(setting: Setting, response: Response, edge: int = 1) -> Response:
    async with asyncio.timeout(10):
        while response.status in ("queued", "in_progress"):
            await asyncio.sleep(0.02)
            response = await setting.clients[edge].responses.retrieve(response.id)
    return response


async def error_of(request: Any) -> dict[str, Any]:
    with pytest.raises(openai.APIStatusError) as raised:
        await request
    assert isinstance(raised.value.body, dict)
    return {**raised.value.body, "status": raised.value.status_code}


async def messages_of(setting: Setting, request: Any) -> tuple[ChatMessage, ...]:
    """Return the messages that the worker gets with a request."""
    await request
    return setting.requests[-1].messages or ()


async def test_stored_response_is_the_same_at_another_edge(setting: Setting) -> None:
    got = await create(setting, "hi", metadata={"a": "b"}, instructions="be kind")
    assert (got.status, got.output_text, got.store) == ("completed", "hello", True)  # type: ignore[attr-defined]
    assert (got.metadata, got.instructions) == ({"a": "b"}, "be kind")
    found = await setting.clients[1].responses.retrieve(got.id)
    assert found.completed_at is not None and got.completed_at is not None
    assert 0 <= got.completed_at - found.completed_at < 30  # sent and stored a moment apart
    assert found.model_copy(update={"completed_at": got.completed_at}) == got


async def test_next_response_continues_without_instructions(setting: Setting) -> None:
    first = await create(setting, "hi", instructions="be kind")
    sent = await messages_of(
        setting, create(setting, "emoji", edge=1, previous_response_id=first.id)
    )
    assert sent == (
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "hello"),
        ChatMessage("user", "emoji"),
    )


async def test_two_answers_to_one_parent_are_branches(setting: Setting) -> None:
    root = await create(setting, "hi")
    left, right = await asyncio.gather(
        create(setting, "emoji", 0, previous_response_id=root.id),
        create(setting, "stop", 1, previous_response_id=root.id),
    )
    for branch, question in ((left, "emoji"), (right, "stop")):
        sent = await messages_of(setting, create(setting, "hi", previous_response_id=branch.id))
        assert [each.text for each in sent if each.role == "user"] == ["hi", question, "hi"]


@pytest.mark.parametrize("after", [None, 0, 5, 200])
async def test_stream_is_repeated_from_any_edge(setting: Setting, after: int | None) -> None:
    stream = await setting.clients[0].responses.create(model="fake", input="long", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.completed"
    asked: Any = {} if after is None else {"starting_after": after}
    again = await setting.clients[1].responses.retrieve(
        events[-1].response.id, stream=True, **asked
    )
    rest = [event async for event in again]
    expected = LONG.decode()[max((-1 if after is None else after) - 3, 0) :]
    assert "".join(getattr(event, "delta", "") for event in rest) == expected
    assert rest[-1].type == "response.completed"
    assert rest[-1].sequence_number == events[-1].sequence_number


async def test_stream_helper_and_parser_of_the_package_work(setting: Setting) -> None:
    async with setting.clients[0].responses.stream(model="fake", input="emoji") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == "é🙂" and kinds[-1] == "response.completed"


async def test_tool_output_continues_the_call(setting: Setting) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "go", "arguments": "{}"}
    first = await create(setting, [HI, call, HI], tools=[TOOL])
    assert [tool.to_dict() for tool in first.tools] == [TOOL]
    listed = await setting.clients[1].responses.input_items.list(first.id)
    reference = {"type": "item_reference", "id": listed.data[1].id}
    output = {"type": "function_call_output", "call_id": "c1", "output": "done"}
    sent = await messages_of(setting, create(setting, [{"content": "hi"}, reference, output, HI]))
    assert sent[1].tool_calls == (ToolCall("c1", FunctionCall("go", "{}")),)
    assert sent[2] == ChatMessage("tool", "done", tool_call_id="c1")


async def test_input_items_are_listed_in_pages(setting: Setting) -> None:
    first = await create(setting, "hi")
    given: Any = [{"role": "user", "content": f"part {n}"} for n in range(3)] + [{"content": "hi"}]
    got = await create(setting, given, previous_response_id=first.id)
    listed = setting.clients[1].responses.input_items.list(got.id, limit=3, order="asc")
    texts = [text_of(item) async for item in listed]
    assert texts == ["part 0", "part 1", "part 2", "hi"]
    page = await setting.clients[0].responses.input_items.list(got.id, limit=1)
    assert text_of(page.data[0]) == "hi" and page.has_more


async def test_background_response_is_read_without_a_client(setting: Setting) -> None:
    queued = await create(setting, "long", background=True)
    assert (queued.status, queued.background) == ("queued", True)
    ended = await until_ended(setting, queued)
    assert (ended.status, ended.output_text) == ("completed", LONG.decode())


async def test_background_stream_can_be_left_and_continued(setting: Setting) -> None:
    stream = await setting.clients[0].responses.create(
        model="fake", input="long", stream=True, background=True
    )
    text, event = "", None
    async for event in stream:
        text += getattr(event, "delta", "")
        if len(text) > 50:
            break
    assert event is not None
    await stream.close()
    response_id = (await create(setting, "hi")).id
    created = await setting.clients[1].responses.retrieve(response_id)
    assert created.status == "completed", "the worker serves others meanwhile"
    item_id = getattr(event, "item_id", "")
    rest = await setting.clients[1].responses.retrieve(
        "resp_" + item_id.split("_")[1], stream=True, starting_after=event.sequence_number
    )
    text += "".join([getattr(event, "delta", "") async for event in rest])
    assert text == LONG.decode()


async def test_cancelled_response_keeps_its_text(setting: Setting) -> None:
    queued = await create(setting, "long", background=True)
    async with asyncio.timeout(30):
        while not (await setting.clients[1].responses.retrieve(queued.id)).output_text:
            await asyncio.sleep(0.01)
    cancelled = await setting.clients[1].responses.cancel(queued.id)
    assert cancelled.status == "cancelled" and LONG.decode().startswith(cancelled.output_text)
    assert await setting.clients[0].responses.retrieve(queued.id) == cancelled
    again = await setting.clients[0].responses.cancel(queued.id)
    assert again == cancelled


async def test_failed_background_response_says_why(setting: Setting) -> None:
    queued = await create(setting, long("x", 5000), background=True)
    ended = await until_ended(setting, queued)
    assert ended.status == "failed" and ended.error and ended.error.code == "invalid_prompt"
    assert "maximum context length" in ended.error.message
    stream = await setting.clients[1].responses.retrieve(queued.id, stream=True)
    assert [event.type async for event in stream][-1] == "response.failed"


@pytest.mark.parametrize("background", [False, True])
async def test_deleted_response_is_unknown_to_all_edges(setting: Setting, background: bool) -> None:
    got = await until_ended(setting, await create(setting, "hi", background=background))
    await setting.clients[0].responses.delete(got.id)
    for client in setting.clients:
        error = await error_of(client.responses.retrieve(got.id))
        assert (error["status"], error["code"]) == (404, "not_found")
    error = await error_of(create(setting, "hi", previous_response_id=got.id))
    assert (error["status"], error["code"]) == (400, "previous_response_not_found")
    assert error["param"] == "previous_response_id"
    assert (await error_of(setting.clients[0].responses.delete(got.id)))["status"] == 404


async def test_deleted_running_response_does_not_come_back(setting: Setting) -> None:
    queued = await create(setting, "long", background=True)
    async with asyncio.timeout(30):
        while not (await setting.clients[0].responses.retrieve(queued.id)).output_text:
            await asyncio.sleep(0.01)
    await setting.clients[1].responses.delete(queued.id)
    await setting.worker.until(lambda: not setting.worker.running)
    for client in setting.clients:
        assert (await error_of(client.responses.retrieve(queued.id)))["status"] == 404


async def test_response_that_is_not_stored_leaves_nothing(setting: Setting) -> None:
    root = await create(setting, "hi")
    sent = await messages_of(
        setting, create(setting, "stop", previous_response_id=root.id, store=False)
    )
    assert len(sent) == 3
    tree = root.id.removeprefix("resp_")[:32]
    assert setting.requests[-1].session_id == f"responses_{tree}", "it goes to the same worker"
    got = await create(setting, "hi", store=False)
    assert got.output_text == "hello" and got.to_dict()["store"] is False
    for request in (
        setting.clients[0].responses.retrieve(got.id),
        create(setting, "hi", previous_response_id=got.id),
    ):
        assert (await error_of(request))["status"] in (400, 404)
    listed = (await setting.http.get("/messages", params={"limit": 1000})).json()
    assert got.id.removeprefix("resp_") not in [each["id"] for each in listed]


async def test_long_branch_is_a_400_unless_truncated(setting: Setting) -> None:
    first = await create(setting, long("x"))
    second: Any = {"previous_response_id": first.id}
    error = await error_of(create(setting, long("y"), **second))
    assert (error["status"], error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "input"
    got = await create(setting, "hi", truncation="auto", **second)
    assert got.truncation == "auto"
    got = await create(setting, long("y"), truncation="auto", **second)
    assert got.usage and got.usage.input_tokens < 3000


async def test_input_tokens_count_what_is_continued(setting: Setting) -> None:
    got = await create(setting, "hi")
    error = await error_of(setting.clients[0].responses.input_tokens.count(input="hi"))
    assert error["code"] == "no_worker", "no worker reports to this edge"
    assert got.usage and got.usage.input_tokens > 0


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"input": "x", "previous_response_id": "resp_1", "conversation": "conv_1"}, 400,
         "invalid_request", "previous_response_id"),
        ({"input": "x", "previous_response_id": "resp_1"}, 400, "previous_response_not_found",
         "previous_response_id"),
        ({"input": "x", "previous_response_id": "resp_" + "0" * 64}, 400,
         "previous_response_not_found", "previous_response_id"),
        ({"input": "x", "conversation": "conv_1"}, 404, "not_found", None),
        ({"input": "x", "conversation": "conv_" + "0" * 32}, 404, "not_found", None),
        ({"input": "x", "background": True, "store": False}, 400, "invalid_request", "background"),
        ({}, 400, "invalid_request", "input"),
        ({"input": []}, 400, "invalid_request", "input"),
        ({"input": [{"type": "web_search_call"}]}, 400, "invalid_request", "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 404, "not_found", None),
        ({"input": "x", "tool_choice": "required"}, 400, "invalid_request", "tool_choice"),
        ({"input": "x", "temperature": 9}, 400, "invalid_request", "temperature"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "stream"])
async def test_invalid_request_is_a_4xx(
    setting: Setting,
    fields: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
    more: dict[str, Any],
) -> None:
    got = await setting.http.post("/v1/responses", json=fields | more)
    error = got.json()["error"]
    assert (got.status_code, error["code"], error["param"]) == (status, code, param), error


@pytest.mark.parametrize("path", ["resp_1", "x", "resp_" + "0" * 64, "%20", "resp_" + "0" * 999])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_unknown_response_is_a_404(setting: Setting, path: str, method: str) -> None:
    got = await setting.http.request(method, f"/v1/responses/{path}")
    assert (got.status_code, got.json()["error"]["code"]) == (404, "not_found")


async def test_invalid_query_is_a_400(setting: Setting) -> None:
    got = await create(setting, "hi")
    for query in ("starting_after=x", "starting_after=-1", "stream=maybe"):
        answer = await setting.http.get(f"/v1/responses/{got.id}?{query}")
        assert answer.status_code == 400, query
    for query in ("limit=0", "limit=101", "order=up", "after=msg_1"):
        answer = await setting.http.get(f"/v1/responses/{got.id}/input_items?{query}")
        assert answer.status_code == 400, query


async def test_history_sent_whole_reuses_the_cached_prefix(setting: Setting) -> None:
    """As Codex does: nothing stored, and all items with each turn."""
    items: list[Any] = [{"role": "user", "content": "hi"}]
    fields: Any = {"store": False, "prompt_cache_key": "thread", "instructions": "be kind",
                   "include": ["reasoning.encrypted_content"]}  # fmt: skip
    first = await create(setting, items, **fields)
    items += [item.to_dict() for item in first.output] + [{"role": "user", "content": "emoji"}]
    second = await create(setting, items, edge=1, **fields)
    assert first.usage and second.usage
    held = first.usage.input_tokens + first.usage.output_tokens - 1
    assert second.usage.input_tokens_details.cached_tokens == held


# --- conversations ---


async def test_conversation_collects_items_of_all_its_responses(setting: Setting) -> None:
    one, two = setting.clients
    made = await one.conversations.create(
        metadata={"topic": "demo"}, items=[{"role": "user", "content": "begin"}]
    )
    assert made.metadata == {"topic": "demo"}
    await create(setting, "hi", edge=1, conversation=made.id)
    added: Any = [{"role": "user", "content": "between"}]
    page = await two.conversations.items.create(made.id, items=added)
    assert [text_of(item) for item in page.data] == ["between"]
    asked = create(setting, "hi", conversation={"id": made.id})
    sent = await messages_of(setting, asked)
    expected = ["begin", "hi", "hello", "between", "hi"]
    assert [each.text for each in sent] == expected
    listed = two.conversations.items.list(made.id, order="asc", limit=2)
    texts = [text_of(item) async for item in listed]
    assert texts == [*expected, "hello"]


async def test_metadata_of_a_conversation_is_replaced(setting: Setting) -> None:
    one, two = setting.clients
    made = await one.conversations.create(metadata={"a": "b"})
    changed = await two.conversations.update(made.id, metadata={"c": "d"})
    assert changed == await one.conversations.retrieve(made.id)
    assert (changed.metadata, changed.created_at) == ({"c": "d"}, made.created_at)


async def test_deleted_conversation_takes_its_responses_along(setting: Setting) -> None:
    one, two = setting.clients
    made = await one.conversations.create()
    got = await create(setting, "hi", conversation=made.id)
    assert got.conversation and got.conversation.id == made.id
    assert (await one.conversations.delete(made.id)).deleted
    for request in (
        two.conversations.retrieve(made.id),
        two.conversations.delete(made.id),
        two.responses.retrieve(got.id),
        two.conversations.items.create(made.id, items=[]),
    ):
        assert (await error_of(request))["status"] in (400, 404)


async def test_response_is_no_conversation(setting: Setting) -> None:
    got = await create(setting, "hi")
    conversation_id = "conv_" + got.id.removeprefix("resp_")[:32]
    error = await error_of(setting.clients[0].conversations.retrieve(conversation_id))
    assert error["status"] == 404

"""Feedback over the bus, on a real nats-server and a real mongod."""

import asyncio
import dataclasses
from contextlib import AsyncExitStack
from datetime import datetime
from uuid import uuid4

import msgspec
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from msgspec import Struct
from msgspec.structs import asdict, replace
from nats.js.errors import NoKeysError

from services.contract import responses, subjects
from services.contract.codec import decode, encode
from services.contract.conversation import Function, Tool
from services.contract.errors import ServiceError
from services.contract.history import Exchange, ExchangeRequest, Feedback, Imported
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.history.samples import (
    FAST,
    append,
    append_many,
    archived,
    clear,
    connected,
    context,
    erase,
    exchange,
    export,
    give_feedback,
    history,
    import_exchanges,
    message_page,
    messages,
    status,
    until,
    url_of,
    with_channels,
)
from tests.servers import Server

DOWN = Feedback("down", "too short", "The longer answer.")
UP = Feedback("up")


async def settled(bus: Bus, is_archived: bool) -> None:
    if is_archived:
        await archived(bus)


def said(feedback: Feedback | None) -> Feedback | None:
    """Return the feedback without its time."""
    return feedback and replace(feedback, given_at=None)


async def shown(bus: Bus, session_id: str) -> dict[str, Feedback | None]:
    """Return the feedback in pages of two messages, by message."""
    found: dict[str, Feedback | None] = {}
    page = await message_page(bus, session_id, 2)
    while True:
        found |= {each.id: said(each.feedback) for each in page.messages}
        if page.next is None:
            return found
        page = await message_page(bus, session_id, 2, page.next)


async def records(bus: Bus, session_id: str, tenant: str = "alice") -> int:
    subject = subjects.log(subjects.session_key(tenant, session_id))
    return await Stream(bus, subjects.HISTORY_STREAM).count(subject)


async def test_feedback_is_shown_in_pages_and_exports(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append_many(bus, session_id, 6)
    stored = await give_feedback(bus, session_id, "r000", DOWN)
    assert stored.is_new and stored.model == "demo"
    assert stored.feedback and isinstance(stored.feedback.given_at, datetime)
    await give_feedback(bus, session_id, "r003", UP)
    expected = dict.fromkeys((f"r{n:03}" for n in range(6)), None) | {"r000": DOWN, "r003": UP}
    assert await shown(bus, session_id) == expected
    await settled(bus, is_archived)
    assert await shown(bus, session_id) == expected
    exported = (await export(bus, session_id)).exchanges
    assert {each.request_id: said(each.feedback) for each in exported} == expected
    of_all = [each for each in await messages(bus, None) if each.session_id == session_id]
    assert {each.id: said(each.feedback) for each in of_all} == expected


async def test_new_feedback_replaces_the_whole(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append_many(bus, session_id, 1)
    await give_feedback(bus, session_id, "r000", DOWN)
    await settled(bus, is_archived)
    await give_feedback(bus, session_id, "r000", UP)
    await settled(bus, is_archived)
    assert await shown(bus, session_id) == {"r000": UP}
    await give_feedback(bus, session_id, "r000", None)
    await settled(bus, is_archived)
    assert await shown(bus, session_id) == {"r000": None}


async def test_same_feedback_again_writes_no_record(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append_many(bus, session_id, 1)
    first = await give_feedback(bus, session_id, "r000", UP)
    again = await give_feedback(bus, session_id, "r000", UP)
    assert again == replace(first, is_new=False)
    assert not (await give_feedback(bus, session_id, "r000", UP)).is_new
    assert await records(bus, session_id) == 2
    await give_feedback(bus, session_id, "r000", None)
    assert not (await give_feedback(bus, session_id, "r000", None)).is_new
    assert await records(bus, session_id) == 3


async def test_feedback_without_content_is_none(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append_many(bus, session_id, 1)
    await give_feedback(bus, session_id, "r000", UP)
    stored = await give_feedback(bus, session_id, "r000", Feedback(preferred_session="s"))
    assert stored.is_new and stored.feedback is None
    assert await shown(bus, session_id) == {"r000": None}


async def test_next_prompt_has_the_correction_until_it_is_removed(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append(bus, session_id, replace(exchange("r1"), reasoning="Hm."))
    await append(bus, session_id, exchange("r2"))
    await give_feedback(bus, session_id, "r1", DOWN)
    first, second = (await context(bus, session_id)).turns
    assert (first.response, first.reasoning) == (DOWN.correction, "")
    assert second.response == "response of r2"
    await give_feedback(bus, session_id, "r1", None)
    first, second = (await context(bus, session_id)).turns
    assert (first.response, first.reasoning) == ("response of r1", "Hm.")


async def test_correction_of_an_empty_answer_is_in_exports_only(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append(bus, session_id, replace(exchange("r1", response=""), reasoning="Hm."))
    await give_feedback(bus, session_id, "r1", DOWN)
    assert (await context(bus, session_id)).turns == ()
    assert (await export(bus, session_id)).exchanges[0].feedback is not None


async def test_feedback_after_a_clear_leaves_the_context_empty(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append_many(bus, session_id, 1)
    await clear(bus, session_id)
    await give_feedback(bus, session_id, "r000", DOWN)
    assert (await context(bus, session_id)).turns == ()
    assert await shown(bus, session_id) == {"r000": DOWN}


async def test_feedback_on_a_replaced_answer_is_kept(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append(bus, session_id, exchange("r1"))
    await append(bus, session_id, replace(exchange("r2"), prompt="prompt of r1", retry_of="r1"))
    await give_feedback(bus, session_id, "r1", DOWN)
    await give_feedback(bus, session_id, "r2", Feedback(preferred_to="r1"))
    assert await shown(bus, session_id) == {"r1": DOWN, "r2": Feedback(preferred_to="r1")}
    (turn,) = (await context(bus, session_id)).turns
    assert turn.response == "response of r2"


async def test_preferred_answer_may_be_in_another_session(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    other, prompt = f"{session_id} b", "which?"
    ours, theirs = uuid4().hex, uuid4().hex
    await append(bus, session_id, replace(exchange(ours), prompt=prompt))
    await append(bus, other, replace(exchange(theirs), prompt=prompt))
    await settled(bus, is_archived)
    stored = await give_feedback(bus, session_id, ours, Feedback(preferred_to=theirs))
    expected = Feedback(preferred_to=theirs, preferred_session=other)
    assert said(stored.feedback) == expected
    assert await shown(bus, session_id) == {ours: expected}


@pytest.mark.parametrize(
    ("preferred_to", "code"),
    [("r000", "invalid_request"), ("r001", "invalid_request"), ("nothing", "not_found")],
)
async def test_preference_needs_another_answer_to_the_prompt(
    bus: Bus, is_archived: bool, session_id: str, preferred_to: str, code: str
) -> None:
    await append_many(bus, session_id, 2)
    with pytest.raises(ServiceError) as raised:
        await give_feedback(bus, session_id, "r000", Feedback(preferred_to=preferred_to))
    assert raised.value.code == code


async def test_unknown_message_is_not_found(bus: Bus, is_archived: bool, session_id: str) -> None:
    id_, other = uuid4().hex, f"{session_id} b"
    await append(bus, session_id, exchange(id_))
    await append(bus, other, exchange("r2"))
    await settled(bus, is_archived)
    for session, message, tenant in (
        (session_id, "nothing", "alice"),
        (other, id_, "alice"),
        (session_id, id_, "bob"),
    ):
        with pytest.raises(ServiceError) as raised:
            await give_feedback(bus, session, message, UP, tenant)
        assert raised.value.code == "not_found"
        assert await records(bus, session, tenant) == (1 if tenant == "alice" else 0)
    assert (await give_feedback(bus, session_id, id_, UP)).is_new


async def test_erasing_a_session_erases_its_feedback(
    bus: Bus, is_archived: bool, session_id: str, mongodb_uri: str
) -> None:
    await append_many(bus, session_id, 1)
    await give_feedback(bus, session_id, "r000", DOWN)
    await settled(bus, is_archived)
    key = subjects.session_key("alice", session_id)
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(mongodb_uri)
    documents = client["finetunellm_test"]["feedback"]
    assert await documents.count_documents({"key": key}) == is_archived
    await erase(bus, session_id)
    await settled(bus, is_archived)
    assert await documents.count_documents({"key": key}) == 0
    client.close()
    assert await records(bus, session_id) == 1
    with pytest.raises(ServiceError, match="No answer of this session"):
        await give_feedback(bus, session_id, "r000", UP)
    again = Imported(request_id="r000", prompt="p", response="r")
    await import_exchanges(bus, session_id, [again])
    assert await shown(bus, session_id) == {"r000": None}


async def test_export_imports_with_feedback_and_tools(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    tools = (Tool(Function("go", parameters={"type": "object"})),)
    await append(bus, session_id, replace(exchange("r1"), tools=tools))
    await give_feedback(bus, session_id, "r1", DOWN)
    (exported,) = (await export(bus, session_id)).exchanges
    copy = f"{session_id} copy"
    await import_exchanges(bus, copy, [decode(encode(exported), Imported)])
    await settled(bus, is_archived)
    assert (await export(bus, copy)).exchanges[0].tools == tools
    assert await shown(bus, copy) == {"r1": DOWN}
    assert (await context(bus, copy)).turns[0].response == DOWN.correction
    await give_feedback(bus, copy, "r1", None)
    await settled(bus, is_archived)
    assert await shown(bus, copy) == {"r1": None}
    assert (await context(bus, copy)).turns[0].response == "response of r1"


async def test_answer_with_tool_calls_is_rated_but_not_corrected(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append(bus, session_id, with_channels("r1"))
    with pytest.raises(ServiceError, match="calls tools") as raised:
        await give_feedback(bus, session_id, "r1", DOWN)
    assert raised.value.code == "invalid_request"
    assert (await give_feedback(bus, session_id, "r1", UP)).is_new


async def test_response_of_a_tree_takes_no_feedback(bus: Bus, is_archived: bool) -> None:
    session = responses.session_of_tree("0" * 32)
    with pytest.raises(ServiceError, match="/v1/responses") as raised:
        await give_feedback(bus, session, "0" * 64, UP)
    assert raised.value.code == "not_found"


async def test_feedback_that_fits_in_no_page_is_too_large(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append(bus, session_id, exchange("r1", response="x" * 1_000_000))
    with pytest.raises(ServiceError, match="shorten the correction") as raised:
        await give_feedback(bus, session_id, "r1", Feedback(correction="y" * 60_000))
    assert raised.value.code == "payload_too_large"
    await give_feedback(bus, session_id, "r1", Feedback(correction="y" * 20_000))
    assert len((await messages(bus, session_id))[0].model_response) == 1_000_000


async def test_corrections_keep_the_context_within_a_message(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    ids = await append_many(bus, session_id, 10)
    for request_id in ids:
        await give_feedback(bus, session_id, request_id, Feedback(correction="é" * 65_536))
    turns = (await context(bus, session_id)).turns
    assert 4 <= len(turns) < 10
    assert {turn.response for turn in turns} == {"é" * 65_536}


async def test_retried_request_writes_one_record(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append_many(bus, session_id, 1)
    for given in (UP, DOWN, UP):
        await give_feedback(bus, session_id, "r000", given, request_id=uuid4().hex)
    await give_feedback(bus, session_id, "r000", None, request_id="d" * 32)
    count = await records(bus, session_id)
    await give_feedback(bus, session_id, "r000", None, request_id="d" * 32)
    assert await records(bus, session_id) == count == 5


async def test_exchange_of_a_named_session_has_its_feedback(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    await append_many(bus, session_id, 2)
    await give_feedback(bus, session_id, "r000", UP)
    await settled(bus, is_archived)
    subject = subjects.history("exchange", "alice")
    request = ExchangeRequest("r000", session_id)
    found = await bus.request(subject, request, Exchange, timeout=5)
    assert (found.prompt, said(found.feedback)) == ("prompt of r000", UP)


async def test_archived_feedback_outlives_the_log(
    empty_nats: Server, empty_mongo: Server, empty_bus: Bus, session_id: str
) -> None:
    bus, uri = empty_bus, f"mongodb://127.0.0.1:{empty_mongo.port}/"
    async with history(url_of(empty_nats), uri):
        await connected(bus)
        await append_many(bus, session_id, 4)
        await give_feedback(bus, session_id, "r000", DOWN)
        await give_feedback(bus, session_id, "r001", UP)
        await archived(bus)
        for seq in range(1, 6):  # as if they were trimmed
            await bus.jetstream.delete_msg(subjects.HISTORY_STREAM, seq)
        expected = {"r000": DOWN, "r001": UP, "r002": None, "r003": None}
        assert await shown(bus, session_id) == expected
        await give_feedback(bus, session_id, "r000", UP)  # of an exchange that only MongoDB has
        assert await shown(bus, session_id) == expected | {"r000": UP}
        await archived(bus)
        await bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert await shown(bus, session_id) == expected | {"r000": UP}


async def test_feedback_is_found_without_the_request_index(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, session_id, 3)
        bucket = await empty_bus.jetstream.key_value(subjects.REQUESTS_BUCKET)

        async def is_indexed() -> bool:
            try:
                return len(await bucket.keys()) == 3
            except NoKeysError:
                return False

        await until(is_indexed)
        await empty_bus.jetstream.purge_stream("KV_requests")  # as after a day
        assert (await give_feedback(empty_bus, session_id, "r000", UP)).is_new
        assert await shown(empty_bus, session_id) == {"r000": UP, "r001": None, "r002": None}


async def test_index_continues_where_the_snapshot_was_rewound(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    """An older copy of the log ends before the last feedback."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(history(url_of(empty_nats)))
        await append_many(empty_bus, session_id, 2)
        await give_feedback(empty_bus, session_id, "r000", UP)
        await append(empty_bus, session_id, exchange("r9"))
        await give_feedback(empty_bus, session_id, "r001", DOWN)
        assert (await shown(empty_bus, session_id))["r001"] == DOWN
    await empty_bus.jetstream.delete_msg(subjects.HISTORY_STREAM, 5)
    # nats-server 2.11.0 finds no last record of a subject after this, until it is restarted
    await asyncio.to_thread(empty_nats.stop)
    await asyncio.to_thread(empty_nats.start)
    await until(lambda: empty_bus.connected)
    bucket = await empty_bus.jetstream.key_value(subjects.SESSIONS_BUCKET)
    (key,) = await bucket.keys()
    stored = decode((await bucket.get(key)).value or b"", dict)
    rewound = stored | {"applied_seq": 4, "feedback_seq": 4}
    await bucket.put(key, msgspec.json.encode(rewound))
    async with history(url_of(empty_nats)):
        assert await shown(empty_bus, session_id) == {"r000": UP, "r001": None, "r9": None}


async def test_two_processes_see_each_others_feedback(
    nats_url: str, bus: Bus, session_id: str
) -> None:
    async with history(nats_url), history(nats_url):
        await append_many(bus, session_id, 5)
        for n in range(20):
            given = Feedback("up", f"reason {n}")
            await give_feedback(bus, session_id, f"r{n % 5:03}", given)
            found = await shown(bus, session_id)
            assert found[f"r{n % 5:03}"] == given
        assert all(found.values())


async def test_full_index_forgets_the_least_used_session(nats_url: str, bus: Bus) -> None:
    small = dataclasses.replace(FAST, max_indexed=1)
    names = [uuid4().hex for _ in range(3)]
    async with history(nats_url, limits=small):
        for name in names:
            await append_many(bus, name, 2)
            for request_id in ("r000", "r001"):
                await give_feedback(bus, name, request_id, UP)
        for name in names:
            assert await shown(bus, name) == {"r000": UP, "r001": UP}


async def test_record_of_feedback_is_none_of_an_earlier_version(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    """An earlier version reads it as a description without a change."""

    class DescribedBefore(Struct, tag_field="type", tag="described", kw_only=True):
        v: int = 1
        previous: int
        described_at: datetime
        title: str | None = "untouched"

    await append_many(bus, session_id, 1)
    await give_feedback(bus, session_id, "r000", DOWN)
    stream = Stream(bus, subjects.HISTORY_STREAM)
    last = await stream.last(subjects.log(subjects.session_key("alice", session_id)))
    assert last is not None
    before = decode(last.data, DescribedBefore)
    assert asdict(before)["title"] == "untouched"
    await settled(bus, is_archived)
    assert (await status(bus)).unreadable == 0


async def test_page_of_long_corrections_is_cut_not_wrong(
    bus: Bus, is_archived: bool, session_id: str
) -> None:
    ids = await append_many(bus, session_id, 60)
    long = Feedback(correction="x" * 60_000)
    for request_id in ids:
        await give_feedback(bus, session_id, request_id, long)
    await settled(bus, is_archived)
    shown_ids: list[str] = []
    before: str | None = None
    while True:
        page = await message_page(bus, session_id, 60, before)
        assert all(said(each.feedback) == long for each in page.messages)
        shown_ids = [each.id for each in page.messages] + shown_ids
        if (before := page.next) is None:
            break
    assert shown_ids == ids

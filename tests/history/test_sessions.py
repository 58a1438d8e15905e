"""Sessions over the bus, on a real nats-server and a real mongod."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
from msgspec.structs import replace

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, Imported
from services.contract.messages import Usage
from services.history.entry import in_milliseconds
from services.history.log import SessionLog
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
    describe,
    erase,
    exchange,
    export,
    history,
    ids,
    import_exchanges,
    message_page,
    messages,
    sessions,
    until,
    uri_of,
    url_of,
    with_channels,
)
from tests.servers import Server

NOT_SET = {"title": None, "system_prompt": None}


@pytest.fixture
def tenant() -> str:
    return uuid4().hex


async def settled(bus: Bus, is_archived: bool) -> None:
    if is_archived:
        await archived(bus)


async def listed(bus: Bus, tenant: str, limit: int = 20) -> list[str]:
    """Return the session ids of all pages."""
    page = await sessions(bus, tenant, limit)
    found = [session.id for session in page.sessions]
    while page.next:
        page = await sessions(bus, tenant, limit, page.next)
        assert len(page.sessions) <= limit
        found += [session.id for session in page.sessions]
    return found


async def test_message_pages_walk_back_to_the_first(
    is_archived: bool, bus: Bus, session_id: str
) -> None:
    appended = await append_many(bus, session_id, 25)
    await append_many(bus, f"{session_id} other", 5)
    await settled(bus, is_archived)
    appended += [f"new{n}" for n in range(3)]  # maybe not archived yet
    for request_id in appended[-3:]:
        await append(bus, session_id, exchange(request_id))
    page = await message_page(bus, session_id, 10)
    found = ids(page.messages)
    while page.next:
        page = await message_page(bus, session_id, 10, page.next)
        found = ids(page.messages) + found
    assert found == appended


async def test_cursor_before_an_erasure_returns_nothing(
    is_archived: bool, bus: Bus, session_id: str
) -> None:
    await append_many(bus, session_id, 6)
    await settled(bus, is_archived)
    page = await message_page(bus, session_id, 3)
    await erase(bus, session_id)
    await append(bus, session_id, exchange("new"))
    assert (await message_page(bus, session_id, 3, page.next)).messages == ()
    assert ids((await message_page(bus, session_id, 3)).messages) == ["new"]


async def test_retried_exchange_stays_and_is_marked(
    is_archived: bool, bus: Bus, session_id: str
) -> None:
    await append(bus, session_id, exchange("a"))
    await append(bus, session_id, exchange("b"))
    await settled(bus, is_archived)
    await append(bus, session_id, replace(exchange("c"), retry_of="b"))
    await settled(bus, is_archived)
    assert ids(await context(bus, session_id)) == ["a", "c"]
    marks = {message.id: message.retried for message in await messages(bus, session_id)}
    assert marks == {"a": False, "b": True, "c": False}
    page = await message_page(bus, session_id, 1)
    (retried,) = (await message_page(bus, session_id, 1, page.next)).messages
    assert (retried.id, retried.retried) == ("b", True)


async def test_sessions_are_listed_last_active_first(
    is_archived: bool, bus: Bus, tenant: str
) -> None:
    for n in range(25):
        await append(bus, f"s{n}", exchange(f"r{n}"), tenant)
        await append(bus, f"s{n}", exchange(f"r{n}"), f"{tenant}x")
    await append(bus, "s3", exchange("again"), tenant)
    expected = ["s3", *(f"s{n}" for n in reversed(range(25)) if n != 3)]
    for limit in (7, 25, 1000):
        assert await listed(bus, tenant, limit) == expected


async def test_session_list_includes_every_appended_exchange(
    nats_url: str, bus: Bus, tenant: str
) -> None:
    async with history(nats_url), history(nats_url):
        for n in range(60):
            await append(bus, f"s{n % 7}", exchange(f"r{n}"), tenant)
            (first, *_) = (await sessions(bus, tenant, 3)).sessions
            assert (first.id, first.exchanges) == (f"s{n % 7}", n // 7 + 1)


async def test_session_list_has_title_count_and_last_activity(
    is_archived: bool, bus: Bus, tenant: str
) -> None:
    first = replace(exchange("a"), prompt="What is \n  the " + "x" * 80)
    await append(bus, "s", first, tenant)
    await append(bus, "s", exchange("b"), tenant)
    (session,) = (await sessions(bus, tenant)).sessions
    assert (session.id, session.title, session.exchanges) == ("s", "What is the " + "x" * 48, 2)
    assert session.system_prompt is None
    record = await Stream(bus, subjects.HISTORY_STREAM).last(
        subjects.log(subjects.session_key(tenant, "s"))
    )
    assert record is not None and abs((record.time - session.last_activity).total_seconds()) < 0.01


async def test_describe_sets_and_removes_title_and_system_prompt(
    is_archived: bool, bus: Bus, tenant: str
) -> None:
    await append(bus, "s", exchange("a"), tenant)
    await describe(bus, "s", tenant, title="Holidays")
    session = await describe(bus, "s", tenant, system_prompt="Be brief.")
    assert (session.title, session.system_prompt) == ("Holidays", "Be brief.")
    assert (await context(bus, "s", tenant)).system_prompt == "Be brief."
    await clear(bus, "s", tenant)
    session = await describe(bus, "s", tenant, title=None)
    assert (session.title, session.system_prompt) == ("prompt of a", "Be brief.")
    assert (await sessions(bus, tenant)).sessions == (session,)
    await describe(bus, "s", tenant, **NOT_SET)
    assert (await context(bus, "s", tenant)).system_prompt is None


async def test_describe_creates_a_session(is_archived: bool, bus: Bus, tenant: str) -> None:
    await describe(bus, "s", tenant, system_prompt="")
    assert (await context(bus, "s", tenant)).system_prompt == ""
    (session,) = (await sessions(bus, tenant)).sessions
    assert (session.title, session.exchanges) == ("", 0)


async def test_erased_session_is_listed_once_it_begins_again(
    is_archived: bool, bus: Bus, tenant: str
) -> None:
    await append(bus, "s", exchange("a"), tenant)
    await describe(bus, "s", tenant, title="t", system_prompt="p")
    await append(bus, "other", exchange("a"), tenant)
    await erase(bus, "s", tenant)
    assert await listed(bus, tenant) == ["other"]
    await append(bus, "s", exchange("new", epoch=(await context(bus, "s", tenant)).epoch), tenant)
    (session, _) = (await sessions(bus, tenant)).sessions
    assert (session.id, session.title, session.exchanges) == ("s", "prompt of new", 1)
    assert session.system_prompt is None


async def test_export_has_whole_exchanges_oldest_first(
    is_archived: bool, bus: Bus, session_id: str
) -> None:
    appended = await append_many(bus, session_id, 210)
    await settled(bus, is_archived)
    await append(bus, session_id, exchange("new"))
    page = await export(bus, session_id)
    found = list(page.exchanges)
    while page.next:
        page = await export(bus, session_id, page.next)
        found += page.exchanges
    assert [each.request_id for each in found] == [*appended, "new"]
    assert all(isinstance(each, Exchange) and each.model and each.model.digest for each in found)
    assert (await export(bus, f"{session_id} that does not exist")).exchanges == ()


async def test_export_excludes_erased_exchanges(
    is_archived: bool, bus: Bus, session_id: str
) -> None:
    await append_many(bus, session_id, 3)
    await settled(bus, is_archived)
    await erase(bus, session_id)
    await append(bus, session_id, exchange("new"))
    exported = (await export(bus, session_id)).exchanges
    assert [each.request_id for each in exported] == ["new"]


async def test_export_can_be_imported(is_archived: bool, bus: Bus, session_id: str) -> None:
    await append_many(bus, session_id, 2)
    await append(bus, session_id, with_channels("x"))
    exported = (await export(bus, session_id)).exchanges
    taken = [Imported(request_id=e.request_id, prompt=e.prompt, response=e.response,
                      asked_at=e.asked_at, answered_at=e.answered_at, model=e.model,
                      sampling=e.sampling, usage=e.usage, timings=e.timings,
                      stop_string=e.stop_string, reasoning=e.reasoning,
                      tool_calls=e.tool_calls, tool_results=e.tool_results)
             for e in exported]  # fmt: skip
    copy = f"{session_id} copy"
    for _ in range(2):  # a repeat changes nothing
        await import_exchanges(bus, copy, taken)
    await settled(bus, is_archived)
    assert ids(await context(bus, copy)) == [e.request_id for e in exported]
    again = (await export(bus, copy)).exchanges
    assert [(e.prompt, e.response, e.usage, e.sampling, e.model, e.stop_string) for e in again] == [
        (e.prompt, e.response, e.usage, e.sampling, e.model, "User:") for e in exported
    ]
    assert [in_milliseconds(e.answered_at) for e in again] == [
        in_milliseconds(e.answered_at) for e in exported
    ]
    assert (await messages(bus, copy))[-1].tool_calls == with_channels("x").tool_calls
    channels = [(e.reasoning, e.tool_calls, e.tool_results) for e in again]
    assert channels == [(e.reasoning, e.tool_calls, e.tool_results) for e in exported]
    turns, original = (await context(bus, copy)).turns, (await context(bus, session_id)).turns
    assert turns == original and turns[-1].reasoning == "Hm. And?"
    await erase(bus, copy)
    await import_exchanges(bus, copy, taken)
    assert ids(await context(bus, copy)) == [e.request_id for e in exported]


async def test_import_in_batches_reads_no_record_twice(
    nats_url: str, bus: Bus, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_above: list[int] = []
    request_ids = SessionLog.request_ids

    async def watched(log: SessionLog, key: str, above: int) -> tuple[set[str], int]:
        read_above.append(above)
        return await request_ids(log, key, above)

    async def import_all() -> None:
        for start in range(0, 6, 2):
            await import_exchanges(bus, session_id, lines(6)[start : start + 2])

    monkeypatch.setattr(SessionLog, "request_ids", watched)
    async with history(nats_url):
        await import_all()
        await import_all()
        assert read_above == []
        await append(bus, session_id, exchange("by a worker"))
        await import_exchanges(bus, session_id, [*lines(6), imported("last")])
        assert len(read_above) == 1, "only what came after its own last record"
        exported = (await export(bus, session_id)).exchanges
        assert [e.request_id for e in exported] == [
            *(line.request_id for line in lines(6)),
            "by a worker",
            "last",
        ]
        await erase(bus, session_id)
        await import_exchanges(bus, session_id, lines(6))
        assert len((await export(bus, session_id)).exchanges) == 6


async def test_import_after_the_log_was_lost_appends_again(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        await import_exchanges(empty_bus, session_id, lines(3))
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        await empty_bus.jetstream.purge_stream("KV_sessions")
        await expire_message_ids(empty_bus)
        await append(empty_bus, session_id, exchange("other"))
        await import_exchanges(empty_bus, session_id, lines(4))
        exported = (await export(empty_bus, session_id)).exchanges
        assert [e.request_id for e in exported] == ["other", "r0", "r1", "r2", "r3"]


async def test_import_needs_only_id_prompt_and_response(
    is_archived: bool, bus: Bus, session_id: str
) -> None:
    await import_exchanges(bus, session_id, [Imported(request_id="a", prompt="p", response="r")])
    await settled(bus, is_archived)
    (message,) = await messages(bus, session_id)
    assert (message.id, message.user_prompt, message.model_response) == ("a", "p", "r")
    assert message.model == ""


async def test_invalid_cursor_is_an_invalid_request(is_archived: bool, bus: Bus) -> None:
    for call in (
        sessions(bus, "t", before="x"),
        message_page(bus, "s", before="1-"),
        export(bus, "s", after="-1-1"),
    ):
        with pytest.raises(ServiceError, match=r"\$\.(before|after)") as raised:
            await call
        assert raised.value.code == "invalid_request"


async def test_erasing_a_long_session_continues_in_background(
    nats_url: str, bus: Bus, session_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    subject = subjects.log(subjects.session_key("alice", session_id))
    stream = Stream(bus, subjects.HISTORY_STREAM)
    limits = dataclasses.replace(FAST, max_erase_seconds=0.02)
    async with history(nats_url, limits=limits):
        await append_many(bus, session_id, 300)
        await erase(bus, session_id)
        erased = (await context(bus, session_id)).erased
        first = await stream.next(subject, 1)
        assert first is not None and first.seq < erased
        assert "erasure continues in the background" in caplog.text
        assert await messages(bus, session_id) == ()

        async def is_gone() -> bool:
            first = await stream.next(subject, 1)
            return first is not None and first.seq == erased

        await until(is_gone)


async def test_erasure_of_a_dead_process_is_completed(
    nats_url: str, bus: Bus, session_id: str
) -> None:
    key = subjects.session_key("alice", session_id)
    async with history(nats_url):
        await append_many(bus, session_id, 3)
        await context(bus, session_id)
    erased, _ = await Stream(bus, subjects.HISTORY_STREAM).append(
        subjects.log(key),
        b'{"type":"erased","v":1,"previous":0,"erased_at":"2026-01-01T00:00:00Z"}',
        uuid4().hex,
        (await Stream(bus, subjects.HISTORY_STREAM).last(subjects.log(key))).seq,  # type: ignore[union-attr]
    )
    async with history(nats_url):

        async def is_gone() -> bool:
            first = await Stream(bus, subjects.HISTORY_STREAM).next(subjects.log(key), 1)
            value = await Stream(bus, "KV_sessions").last(f"$KV.{subjects.SESSIONS_BUCKET}.{key}")
            assert first is not None and value is not None
            return first.seq == erased and b"prompt of" not in value.data

        await until(is_gone)


async def logged(bus: Bus) -> int:
    """Return the number of records in the log."""
    count: int = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).state.messages
    return count


def imported(request_id: str) -> Imported:
    return Imported(request_id=request_id, prompt="p", response=f"response of {request_id}")


def lines(count: int) -> list[Imported]:
    return [imported(f"r{n}") for n in range(count)]


async def test_repeated_import_appends_nothing(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)), history(url_of(empty_nats)):
        await asyncio.gather(
            *(import_exchanges(empty_bus, session_id, lines(15)) for _ in range(3))
        )
        assert await logged(empty_bus) == 15
        await import_exchanges(empty_bus, session_id, lines(20))
        assert await logged(empty_bus) == 20
        await clear(empty_bus, session_id)
        await import_exchanges(empty_bus, session_id, lines(2))
        assert ids(await context(empty_bus, session_id)) == ["r0", "r1"]


async def expire_message_ids(bus: Bus) -> None:
    """Wait until the log itself accepts a repeat of any record that it has."""
    config = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
    config.duplicate_window = 0.1
    await bus.jetstream.update_stream(config)
    await append(bus, "another session", exchange("a"))
    before = await logged(bus)

    async def accepts_a_repeat() -> bool:
        await append(bus, "another session", exchange("a"))
        return await logged(bus) > before

    await until(accepts_a_repeat)


async def test_import_is_deduplicated_after_the_duplicate_window(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        await import_exchanges(empty_bus, session_id, lines(3))
    async with history(url_of(empty_nats)):  # it knows no ids yet
        await expire_message_ids(empty_bus)
        before = await logged(empty_bus)
        for _ in range(2):
            await import_exchanges(empty_bus, session_id, lines(3))
        assert await logged(empty_bus) == before


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_batches_of_an_import_are_deduplicated_by_the_archive(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, session_id: str, is_restarted: bool
) -> None:
    async with AsyncExitStack() as first:
        await first.enter_async_context(history(url_of(empty_nats), mongodb_uri))
        await connected(empty_bus)
        await import_exchanges(empty_bus, session_id, lines(6))
        await archived(empty_bus)
        for seq in range(1, 6):  # as if they were trimmed
            await Stream(empty_bus, subjects.HISTORY_STREAM).delete(seq)
        async with AsyncExitStack() as second:
            if is_restarted:  # then it knows no ids yet
                await first.aclose()
                await second.enter_async_context(history(url_of(empty_nats), mongodb_uri))
                await connected(empty_bus)
            await expire_message_ids(empty_bus)
            before = await logged(empty_bus)
            for start in range(0, 6, 2):
                await import_exchanges(empty_bus, session_id, lines(6)[start : start + 2])
            assert await logged(empty_bus) == before
            await import_exchanges(empty_bus, session_id, [imported("new"), *lines(6)])
            assert await logged(empty_bus) == before + 1


@pytest.mark.parametrize("later", [[], ["later"]])
async def test_import_into_a_trimmed_session_is_deduplicated_by_the_archive(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, session_id: str, later: list[str]
) -> None:
    async with history(url_of(empty_nats), mongodb_uri):
        await connected(empty_bus)
        await import_exchanges(empty_bus, session_id, lines(3))
        await archived(empty_bus)
        assert ids(await context(empty_bus, session_id)) == ["r0", "r1", "r2"]
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        for request_id in later:
            await append(empty_bus, session_id, exchange(request_id))
        await expire_message_ids(empty_bus)
        before = await logged(empty_bus)
        await import_exchanges(empty_bus, session_id, lines(3))
        assert await logged(empty_bus) == before


async def test_import_is_deduplicated_while_its_session_is_trimmed(
    empty_nats: Server,
    empty_bus: Bus,
    mongodb_uri: str,
    session_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request_ids, stream = SessionLog.request_ids, Stream(empty_bus, subjects.HISTORY_STREAM)

    async def trim_and_read(log: SessionLog, key: str, above: int) -> tuple[set[str], int]:
        for seq in (1, 2):
            await stream.delete(seq)
        return await request_ids(log, key, above)

    async with history(url_of(empty_nats), mongodb_uri):
        await connected(empty_bus)
        await import_exchanges(empty_bus, session_id, lines(3))
        await archived(empty_bus)
    async with history(url_of(empty_nats), mongodb_uri):  # it knows no ids yet
        await connected(empty_bus)
        await expire_message_ids(empty_bus)
        before = await logged(empty_bus)
        monkeypatch.setattr(SessionLog, "request_ids", trim_and_read)
        await import_exchanges(empty_bus, session_id, lines(3))
        assert await logged(empty_bus) == before - 2


async def test_repeated_import_without_its_archive_is_refused(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, session_id: str
) -> None:
    async with history(url_of(empty_nats), mongodb_uri):
        await connected(empty_bus)
        await import_exchanges(empty_bus, session_id, lines(3))
        await archived(empty_bus)
    for seq in (1, 2):
        await Stream(empty_bus, subjects.HISTORY_STREAM).delete(seq)
    async with history(url_of(empty_nats)):
        with pytest.raises(ServiceError) as refused:
            await import_exchanges(empty_bus, session_id, lines(3))
        assert refused.value.code == "history_unavailable"
        await import_exchanges(empty_bus, f"{session_id} new", lines(3))
        await clear(empty_bus, session_id)
        await import_exchanges(empty_bus, session_id, lines(3))
        assert ids(await context(empty_bus, session_id)) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("empty_session", [clear, erase])
async def test_import_into_an_empty_session_needs_no_archive(
    empty_nats: Server,
    empty_bus: Bus,
    mongodb_uri: str,
    session_id: str,
    empty_session: Callable[[Bus, str], Awaitable[None]],
) -> None:
    """Also after its last record was trimmed from the log."""
    async with history(url_of(empty_nats), mongodb_uri):
        await connected(empty_bus)
        await empty_session(empty_bus, session_id)
        await archived(empty_bus)
        assert ids(await context(empty_bus, session_id)) == []
    await Stream(empty_bus, subjects.HISTORY_STREAM).delete(1)
    async with history(url_of(empty_nats)):
        await import_exchanges(empty_bus, session_id, lines(3))
        assert ids(await context(empty_bus, session_id)) == ["r0", "r1", "r2"]


async def test_import_with_one_invalid_exchange_is_refused_whole(
    bus: Bus, session_id: str, is_archived: bool
) -> None:
    good = Imported(request_id="a", prompt="p", response="r")
    bad = replace(good, request_id="b", usage=Usage(2**63, 0, 0))
    with pytest.raises(ServiceError) as error:
        await import_exchanges(bus, session_id, [good, bad])
    assert error.value.code == "invalid_request"
    assert await messages(bus, session_id) == ()


async def test_descriptions_of_sessions_without_exchanges_are_limited(
    nats_url: str, bus: Bus, tenant: str, session_id: str
) -> None:
    limits = dataclasses.replace(FAST, empty_session_bytes=4096, empty_session_bytes_per_second=1)
    async with history(nats_url, limits=limits):
        await describe(bus, "new", tenant, system_prompt="x" * 3000)
        with pytest.raises(ServiceError, match="sessions without exchanges") as rejected:
            await describe(bus, "newer", tenant, system_prompt="x" * 3000)
        assert rejected.value.code == "rate_limit_exceeded" and rejected.value.retry_after
        assert await listed(bus, tenant) == ["new"]
        await describe(bus, "other", f"{tenant}2", system_prompt="x" * 3000)
        await append(bus, "new", exchange("a"), tenant)
        for _ in range(3):
            await describe(bus, "new", tenant, system_prompt="x" * 3000)


async def test_erasures_of_unknown_sessions_are_limited(
    nats_url: str, bus: Bus, tenant: str
) -> None:
    limits = dataclasses.replace(FAST, empty_session_bytes=2048, empty_session_bytes_per_second=1)
    async with history(nats_url, limits=limits):
        await append(bus, "known", exchange("a"), tenant)
        await erase(bus, "unknown1", tenant)
        await clear(bus, "unknown2", tenant)
        with pytest.raises(ServiceError, match="sessions without exchanges"):
            await erase(bus, "unknown3", tenant)
        with pytest.raises(ServiceError, match="sessions without exchanges"):
            await clear(bus, "unknown3", tenant)
        await clear(bus, "known", tenant)
        await erase(bus, "known", tenant)
        assert await listed(bus, tenant) == []


@pytest.mark.parametrize("is_archived", [False, True], ids=["log", "archive"])
async def test_pages_of_large_exchanges_are_read_in_parts(
    empty_nats: Server, empty_mongo: Server, empty_bus: Bus, is_archived: bool
) -> None:
    """All are returned in turn, although no read takes more memory than a few pages."""
    limits = dataclasses.replace(FAST, max_read_bytes=1000)
    wanted = [f"r{n:03}" for n in range(100)]
    uri = uri_of(empty_mongo) if is_archived else ""
    async with history(url_of(empty_nats), uri, limits):
        await append_many(empty_bus, "s", 100)
        if is_archived:
            await archived(empty_bus)
        found: list[str] = []
        page = await message_page(empty_bus, "s", 1000)
        assert 0 < len(page.messages) < 50, "it was read in parts"
        found = ids(page.messages)
        while page.next:
            page = await message_page(empty_bus, "s", 1000, page.next)
            found = ids(page.messages) + found
        assert found == wanted and page.is_complete
        lines = await export(empty_bus, "s")
        assert 0 < len(lines.exchanges) < 50
        exported = [each.request_id for each in lines.exchanges]
        while lines.next:
            lines = await export(empty_bus, "s", lines.next)
            exported += [each.request_id for each in lines.exchanges]
        assert exported == wanted

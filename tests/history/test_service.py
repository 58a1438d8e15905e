import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from nats.js.errors import NotFoundError

from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    DeleteRequest,
    DescribeRequest,
    Description,
    Exchange,
    ExchangeRequest,
    ExchangeView,
    Session,
    Window,
)
from services.contract.messages import Empty, SessionErased
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from services.runtime.streams import Stream
from tests.history.samples import (
    FAST,
    TENANT,
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
    messages,
    sessions,
    status,
    until,
    url_of,
    window,
)
from tests.servers import Server, nats_server, running


@pytest.fixture
async def served(nats_url: str) -> AsyncIterator[None]:
    """Runs a service without MongoDB."""
    async with history(nats_url):
        yield


async def test_new_session_has_an_empty_context(served: None, bus: Bus, session_id: str) -> None:
    found = await context(bus, session_id)
    assert (found.turns, found.epoch, found.applied_seq) == ((), 0, 0)


async def test_exchange_is_in_the_next_context(served: None, bus: Bus, session_id: str) -> None:
    seq = await append(bus, session_id, exchange("a"))
    found = await context(bus, session_id)
    assert (ids(found), found.applied_seq) == (["a"], seq)
    seq = await append(bus, session_id, exchange("b"))
    found = await context(bus, session_id)
    assert (ids(found), found.applied_seq) == (["a", "b"], seq)


async def test_cleared_session_has_an_empty_context(
    served: None, bus: Bus, session_id: str
) -> None:
    await append_many(bus, session_id, 3)
    assert len((await context(bus, session_id)).turns) == 3
    await clear(bus, session_id)
    found = await context(bus, session_id)
    assert found.turns == () and found.epoch == found.applied_seq > 0
    await append(bus, session_id, exchange("new", epoch=found.epoch))
    assert ids(await context(bus, session_id)) == ["new"]


async def test_exchange_requested_before_a_clear_is_only_listed(
    served: None, bus: Bus, session_id: str
) -> None:
    old_epoch = (await context(bus, session_id)).epoch
    await clear(bus, session_id)
    await append(bus, session_id, exchange("late", epoch=old_epoch))
    assert ids(await context(bus, session_id)) == []
    assert ids(await messages(bus, session_id)) == ["late"]


async def test_clear_of_a_clear_session_excludes_running_requests(
    served: None, bus: Bus, session_id: str
) -> None:
    await clear(bus, session_id)
    old_epoch = (await context(bus, session_id)).epoch
    await clear(bus, session_id)
    await append(bus, session_id, exchange("late", epoch=old_epoch))
    assert ids(await context(bus, session_id)) == []


async def test_erased_session_is_deleted_everywhere(
    nats_url: str, mongodb_uri: str, bus: Bus, session_id: str
) -> None:
    key = subjects.session_key(TENANT, session_id)
    async with history(nats_url, mongodb_uri):
        await connected(bus)
        await append_many(bus, session_id, 5)
        await append(bus, f"{session_id} other", exchange("other"))
        await context(bus, session_id)
        await archived(bus)
        await append(bus, session_id, exchange("not archived"))
        await erase(bus, session_id)
        found = await context(bus, session_id)
        assert found.turns == () and found.erased == found.epoch == found.applied_seq > 0
        assert await messages(bus, session_id) == ()
        assert ids(await messages(bus, f"{session_id} other")) == ["other"]
        snapshot = await Stream(bus, "KV_sessions").last(f"$KV.{subjects.SESSIONS_BUCKET}.{key}")
        assert snapshot is not None and b"prompt of" not in snapshot.data
        first = await Stream(bus, subjects.HISTORY_STREAM).next(subjects.log(key), 1)
        assert first is not None and first.seq == found.erased
        documents = AsyncIOMotorClient[dict[str, Any]](mongodb_uri)["finetunellm_test"]
        assert await documents["exchanges"].count_documents({"key": key}) == 0
        documents.client.close()


async def test_erasure_is_published_with_its_epoch(served: None, bus: Bus, session_id: str) -> None:
    await append(bus, session_id, exchange("a"))
    async with bus.inbox(subjects.erased(TENANT)) as inbox:
        await erase(bus, session_id)
        erased = decode((await inbox.next(5)).data, SessionErased)
    assert erased == SessionErased(session_id, (await context(bus, session_id)).epoch)


async def test_erased_session_can_begin_again(served: None, bus: Bus, session_id: str) -> None:
    await append(bus, session_id, exchange("old"))
    await erase(bus, session_id)
    epoch = (await context(bus, session_id)).epoch
    await append(bus, session_id, exchange("new", epoch=epoch))
    await erase(bus, f"{session_id} that never was")
    assert ids(await context(bus, session_id)) == ["new"]
    assert ids(await messages(bus, session_id)) == ["new"]


async def test_repeated_change_with_the_same_request_id_is_ignored(
    served: None, bus: Bus, session_id: str
) -> None:
    erasing = subjects.history("delete", TENANT), DeleteRequest(session_id, "r"), Empty
    clearing = subjects.history("clear", TENANT), ClearRequest(session_id, "r"), Empty
    title = Description(title="first")
    describing = (
        subjects.history("describe", TENANT),
        DescribeRequest(session_id, title, "r"),
        Session,
    )
    for change in (erasing, clearing, describing):
        await bus.request(*change)
    await describe(bus, session_id, title="second")
    epoch = (await context(bus, session_id)).epoch
    await append(bus, session_id, exchange("new", epoch=epoch))
    for change in (erasing, clearing, describing):
        await bus.request(*change)
    assert ids(await context(bus, session_id)) == ["new"]
    assert ids(await messages(bus, session_id)) == ["new"]
    assert (await sessions(bus, TENANT, 1)).sessions[0].title == "second"


async def test_window_is_truncated_in_steps(nats_url: str, bus: Bus, session_id: str) -> None:
    async with history(nats_url, history_exchanges=3):
        sizes = []
        for n in range(10):
            await append(bus, session_id, exchange(f"r{n}"))
            sizes.append(len((await context(bus, session_id)).turns))
    assert sizes == [1, 2, 3, 4, 3, 4, 3, 4, 3, 4]


async def test_context_says_how_an_exchange_changes_it(
    nats_url: str, bus: Bus, session_id: str
) -> None:
    async with history(nats_url, history_exchanges=3):
        empty = await window(bus, session_id)
        await append(bus, session_id, exchange("a", response="x" * 1000))
        grown = await window(bus, session_id)
    assert empty == Window(3, FAST.max_page_bytes)
    assert grown and 1000 < empty.room - grown.room < 1300


async def test_workers_ask_for_each_answer_where_turns_expire(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats), history_retention="1h"):
        await append(empty_bus, session_id, exchange("a"))
        assert await window(empty_bus, session_id) is None


async def test_sessions_and_tenants_are_isolated(served: None, bus: Bus, session_id: str) -> None:
    await append(bus, session_id, exchange("mine"))
    await append(bus, session_id, exchange("other"), tenant="bob")
    assert ids(await context(bus, session_id)) == ["mine"]
    assert ids(await context(bus, session_id, tenant="bob")) == ["other"]
    assert ids(await context(bus, f"{session_id}x")) == []


async def test_any_text_can_be_a_session_id(served: None, bus: Bus, session_id: str) -> None:
    for name in (f"{session_id} * > . \n ", f"{session_id} 😀", session_id.ljust(128, "é")):
        await append(bus, name, exchange("a"))
        assert ids(await context(bus, name)) == ["a"]
        assert [message.session_id for message in await messages(bus, name)] == [name]


async def test_concurrent_exchanges_of_a_session_are_all_stored(
    served: None, bus: Bus, session_id: str
) -> None:
    for n in range(100):
        pair = (append(bus, session_id, exchange(f"{side}{n}")) for side in "ab")
        await asyncio.gather(*pair, context(bus, session_id))
    listed = ids(await messages(bus, session_id, limit=1000))
    assert sorted(listed) == sorted(f"{side}{n}" for n in range(100) for side in "ab")
    shown = ids(await context(bus, session_id))
    assert 10 <= len(shown) <= 13 and shown == listed[-len(shown) :]


async def test_many_sessions_are_served_concurrently(
    served: None, bus: Bus, session_id: str
) -> None:
    names = [f"{session_id} {n}" for n in range(50)]
    await asyncio.gather(*(append_many(bus, name, 3) for name in names))
    found = await asyncio.gather(*(context(bus, name) for name in names))
    assert [len(each.turns) for each in found] == [3] * 50


async def test_two_processes_return_the_same_context(
    nats_url: str, bus: Bus, session_id: str
) -> None:
    async with history(nats_url), history(nats_url):
        for n in range(30):
            await append(bus, session_id, exchange(f"r{n}"))
            found = await asyncio.gather(*(context(bus, session_id) for _ in range(4)))
            assert [each == found[0] for each in found] == [True] * 4
            assert ids(found[0])[-1] == f"r{n}"


async def test_context_is_the_same_after_a_restart(
    nats_url: str, bus: Bus, session_id: str
) -> None:
    async with history(nats_url):
        await append_many(bus, session_id, 2)
        before = await context(bus, session_id)
    with pytest.raises(NoResponders):
        await context(bus, session_id)
    async with history(nats_url):
        assert await context(bus, session_id) == before
        assert ids(await messages(bus, session_id)) == ["r000", "r001"]


async def test_context_does_not_need_its_snapshot(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, session_id, 5)
        before = await context(empty_bus, session_id)
        await empty_bus.jetstream.purge_stream("KV_sessions")
        assert await context(empty_bus, session_id) == before


async def test_context_survives_the_loss_of_its_records(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, session_id, 3)
        assert len((await context(empty_bus, session_id)).turns) == 3
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert len((await context(empty_bus, session_id)).turns) == 3
        await append(empty_bus, session_id, exchange("new"))
        assert ids(await context(empty_bus, session_id)) == ["r000", "r001", "r002", "new"]


async def test_expired_exchange_is_not_returned(
    empty_nats: Server, empty_bus: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats), history_retention="1s"):
        await append(empty_bus, session_id, exchange("old"))
        assert ids(await context(empty_bus, session_id)) == ["old"]

        async def is_forgotten() -> bool:
            return not ids(await context(empty_bus, session_id))

        await until(is_forgotten)
        await append(empty_bus, session_id, exchange("new"))
        assert ids(await context(empty_bus, session_id)) == ["new"]

        async def is_gone() -> bool:
            return not await messages(empty_bus, session_id)

        await until(is_gone)


async def test_invalid_request_names_the_field(served: None, bus: Bus) -> None:
    for call in (context(bus, ""), clear(bus, "x" * 129), messages(bus, "a", limit=0)):
        with pytest.raises(ServiceError, match=r"\$\.(session_id|limit)") as raised:
            await call
        assert raised.value.code == "invalid_request"


@pytest.mark.parametrize("ask", [context, messages, clear])
async def test_unavailable_log_is_an_error_not_a_new_session(
    empty_nats: Server,
    empty_bus: Bus,
    session_id: str,
    ask: Callable[[Bus, str], Coroutine[Any, Any, object]],
) -> None:
    async def is_refused() -> bool:
        """Delete the log and ask; the service may create it again in between."""
        for stream in (subjects.HISTORY_STREAM, "KV_sessions"):
            with suppress(NotFoundError):
                await empty_bus.jetstream.delete_stream(stream)
        try:
            await ask(empty_bus, session_id)
        except ServiceError as error:
            is_unavailable = error.code == "history_unavailable" and "JetStream" in error.message
            return is_unavailable and bool(error.retry_after)
        return False

    async with history(url_of(empty_nats)):
        await append(empty_bus, session_id, exchange("a"))
        await until(is_refused)


async def test_change_that_always_conflicts_can_be_retried_later(
    nats_url: str, bus: Bus, session_id: str
) -> None:
    async with history(nats_url, limits=replace(FAST, max_tries=0)):
        with pytest.raises(ServiceError, match="Too many changes") as raised:
            await clear(bus, session_id)
        assert raised.value.code == "history_unavailable" and raised.value.retry_after


def two_servers_on_one_port(tmp_path: Path) -> tuple[Server, Server]:
    """Return servers with stores of their own, of which one can run."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = (nats_server(tmp_path / name) for name in ("first", "second"))
    second.port = first.port
    second.command[second.command.index("-p") + 1] = str(first.port)
    return first, second


async def keeps_old(bus: Bus) -> bool:
    return not (await Stream(bus, subjects.HISTORY_STREAM).state()).drops_old


async def test_streams_are_created_again_on_an_empty_nats(
    tmp_path: Path, mongodb_uri: str, session_id: str
) -> None:
    first, second = two_servers_on_one_port(tmp_path)
    url = url_of(first)
    first.start()
    try:
        async with history(url, mongodb_uri), Bus.connect(url, "test") as bus:
            await connected(bus)
            await append(bus, session_id, exchange("lost"))
            await archived(bus)
            await asyncio.to_thread(first.stop, signal.SIGKILL)
            await asyncio.to_thread(second.start)
            await until(partial(is_log_empty, bus))
            await until(partial(has_no_context, bus, session_id))
            await append(bus, session_id, exchange("new"))
            assert ids(await context(bus, session_id)) == ["new"]
            await until(partial(keeps_old, bus))
            await archived(bus)
            assert ids(await messages(bus, session_id)) == ["lost", "new"]
    finally:
        second.stop()


async def has_no_context(bus: Bus, session_id: str) -> bool:
    try:
        return ids(await context(bus, session_id)) == []
    except ServiceError:  # the new streams are still being written to a slow disk
        return False


async def is_log_empty(bus: Bus) -> bool:
    try:
        return (await status(bus)).log_records == 0
    except (ServiceError, NoResponders, TimeoutError):
        return False


async def test_replies_fit_in_a_smaller_max_payload_of_nats(tmp_path: Path) -> None:
    config = tmp_path / "small.conf"
    config.write_text("max_payload: 65536\njetstream: enabled\n")
    nats = nats_server(tmp_path)
    nats.command[nats.command.index("-c") + 1] = str(config)
    with running(nats):
        async with history(url_of(nats)), Bus.connect(url_of(nats), "test") as bus:
            for n in range(10):
                await append(bus, "s", exchange(f"r{n}", response="x" * 10_000))
            shown = [f"r{n}" for n in range(5, 10)]
            assert ids(await context(bus, "s")) == shown == ids(await messages(bus, "s"))
            page = await export(bus, "s")
            assert [each.request_id for each in page.exchanges] == ["r0", "r1", "r2", "r3", "r4"]
            await bus.publish(subjects.HISTORY_APPEND_FAILED, Empty())
            await until(lambda: is_probed(bus))
            assert ids(await context(bus, "s")) == shown


async def is_probed(bus: Bus) -> bool:
    """Return whether the last sequence of the log is that of a probe, which was deleted."""
    state = await Stream(bus, subjects.HISTORY_STREAM).state()
    return state.last_seq == 11 and state.messages == 10


async def test_messages_are_the_last_ones_oldest_first(
    served: None, bus: Bus, session_id: str
) -> None:
    await append_many(bus, session_id, 30)
    listed = await messages(bus, session_id, limit=2)
    assert ids(listed) == ["r028", "r029"]
    assert len(await messages(bus, session_id)) == 20
    assert (listed[0].user_prompt, listed[0].model_response, listed[0].model) == (
        "prompt of r028",
        "response of r028",
        "demo",
    )


async def test_messages_of_a_cleared_session_stay_readable(
    served: None, bus: Bus, session_id: str
) -> None:
    await append_many(bus, session_id, 2)
    await clear(bus, session_id)
    assert ids(await messages(bus, session_id)) == ["r000", "r001"]


@pytest.mark.parametrize("with_mongodb", [False, True])
async def test_messages_of_a_tenant_exclude_other_tenants(
    nats_url: str, mongodb_uri: str, bus: Bus, session_id: str, with_mongodb: bool
) -> None:
    tenant = uuid4().hex
    async with history(nats_url, mongodb_uri if with_mongodb else ""):
        if with_mongodb:
            await connected(bus)
        for n in range(12):
            await append(bus, f"{session_id} {n % 2}", exchange(f"mine{n}"), tenant)
            await append(bus, f"{session_id} {n % 2}", exchange(f"other{n}"), f"{tenant}x")
        if with_mongodb:
            await archived(bus)
        assert ids(await messages(bus, None, 3, tenant)) == ["mine9", "mine10", "mine11"]
        assert len(await messages(bus, None, 99, tenant)) == 12
        assert ids(await messages(bus, f"{session_id} 0", 2, tenant)) == ["mine8", "mine10"]
        assert await messages(bus, session_id, 99, tenant) == ()


async def test_messages_include_every_appended_exchange(
    nats_url: str, mongodb_uri: str, bus: Bus, session_id: str
) -> None:
    async with history(nats_url, mongodb_uri), history(nats_url, mongodb_uri):
        await connected(bus)
        for n in range(150):
            await append(bus, session_id, exchange(f"r{n}"))
            assert ids(await messages(bus, session_id, limit=5)) == [
                f"r{m}" for m in range(max(0, n - 4), n + 1)
            ]


async def test_messages_are_the_same_from_log_and_archive(
    nats_url: str, mongodb_uri: str, bus: Bus, session_id: str
) -> None:
    listed: list[tuple[ExchangeView, ...]] = []
    async with history(nats_url):
        await append_many(bus, session_id, 25)
        listed.append(await messages(bus, session_id))
    async with history(nats_url, mongodb_uri):
        await connected(bus)
        await archived(bus)
        listed.append(await messages(bus, session_id))
    assert listed[0] == listed[1]


async def test_exchange_is_found_in_log_and_archive(
    nats_url: str, mongodb_uri: str, bus: Bus, session_id: str
) -> None:
    tenant = f"tenant{session_id[-12:]}"
    record = exchange("r1", response="the response")

    async def found(request_id: str = "r1", of: str = tenant) -> str:
        subject = subjects.history("exchange", of)
        return (await bus.request(subject, ExchangeRequest(request_id), Exchange)).response

    async with history(nats_url):
        await append(bus, session_id, record, tenant)
        assert await found() == "the response"
        for request_id, of in (("r2", tenant), ("r1", "another")):
            with pytest.raises(ServiceError, match="No answer") as raised:
                await found(request_id, of)
            assert raised.value.code == "not_found"
    async with history(nats_url, mongodb_uri):
        await connected(bus)
        await archived(bus)
        assert await found() == "the response"
        await erase(bus, session_id, tenant)
        with pytest.raises(ServiceError):
            await found()

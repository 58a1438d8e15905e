import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from msgspec.structs import replace

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import HistoryStatus
from services.contract.messages import JsonSchema, JsonSchemaFormat, Sampling
from services.history.entry import Entry
from services.history.limits import LIMITS
from services.history.log import SessionLog
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.history.samples import (
    TENANT,
    append,
    append_many,
    archived,
    connected,
    connection_log_levels,
    context,
    erase,
    exchange,
    export,
    history,
    ids,
    messages,
    status,
    until,
    until_status,
    uri_of,
    url_of,
)
from tests.servers import Server


@asynccontextmanager
async def frozen(server: Server) -> AsyncIterator[None]:
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


async def test_records_from_before_mongodb_are_archived(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, session_id, 40)
        assert await status(empty_bus) == HistoryStatus(
            database_connected=False,
            log_records=40,
            log_bytes=(await empty_bus.jetstream.stream_info("HISTORY")).state.bytes,
            unarchived=40,
            unreadable=0,
            log_limit=LIMITS.max_log_bytes,
            database_expected=True,
        )
    async with history(url_of(empty_nats), mongodb_uri):
        await connected(empty_bus)
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert len(await messages(empty_bus, session_id, limit=99)) == 40


async def test_exchange_that_bson_cannot_hold_stays_readable(
    empty_nats: Server, empty_bus: Bus, empty_mongo: Server, session_id: str
) -> None:
    schema = {"properties": {"a\0": {"maximum": 2**64 - 1}, "$b": {}}}
    form = JsonSchemaFormat(JsonSchema(schema))
    unfit = replace(exchange("unfit"), sampling=Sampling(response_format=form))
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        for each in (exchange("before"), unfit, exchange("after")):
            await append(empty_bus, session_id, each)
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert ids(await messages(empty_bus, session_id)) == ["before", "unfit", "after"]
        exported = (await export(empty_bus, session_id)).exchanges
        assert exported[1].sampling == unfit.sampling
        assert (await status(empty_bus)).unreadable == 0


async def test_unreadable_record_is_set_aside_once(
    empty_nats: Server,
    empty_bus: Bus,
    empty_mongo: Server,
    session_id: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log_subject = subjects.log(subjects.session_key(TENANT, session_id))
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        await append(empty_bus, session_id, exchange("before"))
        await empty_bus.jetstream.publish(log_subject, b"garbage")
        await append(empty_bus, session_id, exchange("after"))
        await until_status(empty_bus, unreadable=1)
        await archived(empty_bus)
        assert caplog.text.count("set aside") == 1
        assert ids(await context(empty_bus, session_id)) == ["before", "after"]
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert ids(await messages(empty_bus, session_id)) == ["before", "after"]


async def test_mongodb_gets_what_it_missed_after_a_restart(
    empty_nats: Server,
    empty_bus: Bus,
    empty_mongo: Server,
    session_id: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "services.history")
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        await append(empty_bus, session_id, exchange("before"))
        await archived(empty_bus)
        await asyncio.to_thread(empty_mongo.stop, signal.SIGKILL)
        await append(empty_bus, session_id, exchange("during"))
        assert ids(await context(empty_bus, session_id)) == ["before", "during"]
        assert ids(await messages(empty_bus, session_id)) == ["before", "during"]
        await until_status(empty_bus, database_connected=False)
        assert (await status(empty_bus)).unarchived == 1
        await asyncio.to_thread(empty_mongo.start)
        await connected(empty_bus)
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert ids(await messages(empty_bus, session_id)) == ["before", "during"]
    assert connection_log_levels(caplog) == ["INFO", "WARNING", "INFO"]


async def test_session_erased_without_mongodb_is_erased_there_later(
    empty_nats: Server, empty_bus: Bus, empty_mongo: Server, session_id: str
) -> None:
    other = f"{session_id} other"
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        await append(empty_bus, session_id, exchange("before"))
        await append(empty_bus, other, exchange("other before"))
        await archived(empty_bus)
        await asyncio.to_thread(empty_mongo.stop, signal.SIGKILL)
        await append(empty_bus, session_id, exchange("during"))
        await append(empty_bus, other, exchange("other during"))
        await erase(empty_bus, session_id)
        await append(empty_bus, session_id, exchange("after"))
        assert ids(await messages(empty_bus, session_id)) == ["after"]
        await asyncio.to_thread(empty_mongo.start)
        await connected(empty_bus)
        # the archive may still have the erased exchange
        assert ids(await messages(empty_bus, session_id)) == ["after"]
        assert ids(await messages(empty_bus, None)) == ["other before", "other during", "after"]
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert ids(await messages(empty_bus, session_id)) == ["after"]
        assert ids(await messages(empty_bus, other)) == ["other before", "other during"]


async def test_export_without_mongodb_fails_rather_than_omits(
    empty_nats: Server, empty_bus: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        for name in (session_id, "other"):
            await append_many(empty_bus, name, 3)
        await archived(empty_bus)
        await empty_bus.jetstream.delete_msg(subjects.HISTORY_STREAM, 1)  # as if it was trimmed
        await asyncio.to_thread(empty_mongo.stop, signal.SIGKILL)
        with pytest.raises(ServiceError, match="only in MongoDB") as raised:
            await export(empty_bus, session_id)
        assert raised.value.code == "history_unavailable"
        assert len((await export(empty_bus, "other")).exchanges) == 3
        assert (await export(empty_bus, "another")).exchanges == ()
        await asyncio.to_thread(empty_mongo.start)
        await connected(empty_bus)
        assert len((await export(empty_bus, session_id)).exchanges) == 3


async def test_export_of_a_trimmed_session_that_continues_needs_mongodb(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, session_id: str
) -> None:
    async with history(url_of(empty_nats), mongodb_uri):
        await connected(empty_bus)
        await append_many(empty_bus, session_id, 3)
        await archived(empty_bus)
        assert len(ids(await context(empty_bus, session_id))) == 3
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
    async with history(url_of(empty_nats)):
        for name in (session_id, "new"):
            await append(empty_bus, name, exchange("later"))
        with pytest.raises(ServiceError, match="only in MongoDB"):
            await export(empty_bus, session_id)
        assert len((await export(empty_bus, "new")).exchanges) == 1


async def test_export_without_mongodb_fails_while_it_is_trimmed(
    empty_nats: Server,
    empty_bus: Bus,
    mongodb_uri: str,
    session_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exchanges_after, stream = SessionLog.exchanges_after, Stream(empty_bus, "HISTORY")

    async def trim_and_read(log: SessionLog, *args: Any) -> list[Entry]:
        await stream.delete(1)
        return await exchanges_after(log, *args)

    async with history(url_of(empty_nats), mongodb_uri):
        await connected(empty_bus)
        await append_many(empty_bus, session_id, 3)
        await archived(empty_bus)
    async with history(url_of(empty_nats)):
        assert len((await export(empty_bus, session_id)).exchanges) == 3
        monkeypatch.setattr(SessionLog, "exchanges_after", trim_and_read)
        with pytest.raises(ServiceError, match="only in MongoDB"):
            await export(empty_bus, session_id)


async def test_hanging_mongodb_does_not_delay_reads(
    empty_nats: Server, empty_bus: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        await append(empty_bus, session_id, exchange("before"))
        await archived(empty_bus)
        async with frozen(empty_mongo):
            await append(empty_bus, session_id, exchange("during"))
            async with asyncio.timeout(10):
                assert ids(await context(empty_bus, session_id)) == ["before", "during"]
                assert ids(await messages(empty_bus, session_id)) == ["before", "during"]
        await connected(empty_bus)
        await archived(empty_bus)


async def test_hanging_mongodb_does_not_delay_an_erasure(
    empty_nats: Server, empty_bus: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with history(url_of(empty_nats), uri_of(empty_mongo)):
        await connected(empty_bus)
        await append(empty_bus, session_id, exchange("before"))
        await archived(empty_bus)
        async with frozen(empty_mongo), asyncio.timeout(10):
            await erase(empty_bus, session_id)
            assert ids(await messages(empty_bus, session_id)) == []
        await connected(empty_bus)
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert ids(await messages(empty_bus, session_id)) == []


async def test_expired_exchange_is_deleted_everywhere(
    empty_nats: Server, empty_bus: Bus, empty_mongo: Server, session_id: str
) -> None:
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(uri_of(empty_mongo))
    exchanges = client["retention"]["exchanges"]

    async def kept() -> tuple[int, int, int]:
        log = await empty_bus.jetstream.stream_info(subjects.HISTORY_STREAM)
        snapshots = await empty_bus.jetstream.stream_info(f"KV_{subjects.SESSIONS_BUCKET}")
        documents = await exchanges.count_documents({})
        return log.state.messages, snapshots.state.messages, documents

    async def is_forgotten() -> bool:
        return await kept() == (0, 0, 0)

    url, uri = url_of(empty_nats), uri_of(empty_mongo)
    async with history(url, uri, mongodb_database="retention", history_retention="2s"):
        await connected(empty_bus)
        await append(empty_bus, session_id, exchange("a"))
        await archived(empty_bus)
        assert ids(await context(empty_bus, session_id)) == ["a"]
        assert (await kept())[0::2] == (1, 1)
        await until(is_forgotten)
    client.close()


async def test_two_processes_archive_everything_once(
    empty_nats: Server, empty_bus: Bus, empty_mongo: Server, session_id: str
) -> None:
    url, uri = url_of(empty_nats), uri_of(empty_mongo)
    async with history(url, uri), history(url, uri):
        await asyncio.gather(*(append_many(empty_bus, f"{session_id} {n}", 50) for n in range(20)))
        await connected(empty_bus)
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert len(await messages(empty_bus, None, limit=1000)) == 1000


async def test_new_database_gets_all_records_of_the_log(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, session_id: str
) -> None:
    for name in ("first", "second"):
        database = f"{name}{uuid4().hex}"
        async with history(url_of(empty_nats), mongodb_uri, mongodb_database=database):
            await connected(empty_bus)
            await append(empty_bus, session_id, exchange(name))
            await archived(empty_bus)
            found = [m.id for m in await messages(empty_bus, session_id)]
            assert found == ["first", "second"][: len(found)] and found[-1] == name


async def test_lost_archive_consumer_is_created_again(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, session_id: str
) -> None:
    database = f"test_{uuid4().hex[:8]}"
    async with history(url_of(empty_nats), mongodb_uri, mongodb_database=database):
        await connected(empty_bus)
        await append(empty_bus, session_id, exchange("before"))
        await archived(empty_bus)
        await context(empty_bus, session_id)  # the log has been checked
        for info in await empty_bus.jetstream.consumers_info(subjects.HISTORY_STREAM):
            await empty_bus.jetstream.delete_consumer(subjects.HISTORY_STREAM, info.name)
        await append(empty_bus, session_id, exchange("after"))
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        assert ids(await messages(empty_bus, session_id)) == ["before", "after"]

import asyncio
import dataclasses
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from msgspec.structs import replace
from pymongo import ReadPreference

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.history import Cleared, Described, Exchange, ExchangeFeedback, Feedback
from services.contract.messages import JsonSchema, JsonSchemaFormat, Sampling, Usage
from services.history.archive import (
    MAX_FIELD_BYTES,
    NEWEST_FIRST,
    Archive,
    ArchiveUnavailable,
    to_document,
)
from services.history.entry import Entry, Unreadable, archive_id, in_milliseconds
from services.history.limits import HistoryLimits
from services.runtime.settings import InvalidSetting
from tests.history.samples import (
    FAST,
    TENANT,
    connection_log_levels,
    exchange,
    until,
    uri_of,
    with_channels,
)
from tests.servers import Server, free_port

NOW = in_milliseconds(datetime.now(UTC))
DATABASE = "finetunellm_test"
IMPATIENT = dataclasses.replace(FAST, mongodb_select_seconds=0.1)


@pytest.fixture
def key(session_id: str) -> str:
    return subjects.session_key(TENANT, session_id)


@pytest.fixture
async def archive(mongodb_uri: str) -> AsyncIterator[Archive]:
    async with opened(mongodb_uri) as archive:
        yield archive


@asynccontextmanager
async def opened(
    uri: str,
    database: str = DATABASE,
    retention: int = 0,
    wait: bool = True,
    limits: HistoryLimits = FAST,
) -> AsyncIterator[Archive]:
    async with Archive(uri, database, pytest.fail, retention, limits).running() as archive:
        if wait:
            await becomes(archive, connected=True)
        yield archive


async def becomes(archive: Archive, connected: bool) -> None:
    await until(lambda: archive.connected == connected)


def entry(key: str, seq: int, record: Exchange | None = None) -> Entry:
    return Entry(seq, key, NOW + timedelta(seconds=seq), record or exchange(f"r{seq}"))


def seqs(entries: list[Entry]) -> list[int]:
    return [entry.seq for entry in entries]


@pytest.mark.parametrize("record", [exchange("a"), with_channels("a")], ids=["text", "channels"])
async def test_exchange_is_read_back_as_written(
    archive: Archive, key: str, record: Exchange
) -> None:
    record = replace(
        record,
        asked_at=in_milliseconds(record.asked_at),
        answered_at=in_milliseconds(record.answered_at),
    )
    await archive.write([entry(key, 1, record)])
    assert await archive.newest(TENANT, key, 9) == [entry(key, 1, record)]


async def test_writing_a_batch_again_changes_nothing(archive: Archive, key: str) -> None:
    await archive.write([entry(key, 1), entry(key, 2)])
    await archive.write([entry(key, 2, exchange("r2", response="other")), entry(key, 3)])
    found = await archive.newest(TENANT, key, 9)
    assert seqs(found) == [3, 2, 1]
    assert isinstance(found[1].record, Exchange)
    assert found[1].record.response == "response of r2"


async def test_only_exchanges_are_written(archive: Archive, key: str) -> None:
    cleared = Cleared(previous=0, cleared_at=NOW)
    await archive.write([entry(key, 1)._replace(record=cleared)])
    await archive.write([entry(key, 2)._replace(record=Unreadable("why")), entry(key, 3)])
    assert seqs(await archive.newest(TENANT, key, 9)) == [3]


async def test_newest_lists_one_session_or_all_of_a_tenant(archive: Archive) -> None:
    tenant = uuid4().hex
    one, two = subjects.session_key(tenant, "one"), subjects.session_key(tenant, "two")
    other = subjects.session_key(uuid4().hex, "one")
    await archive.write([entry(one, 1), entry(two, 2), entry(one, 3), entry(other, 4)])
    assert seqs(await archive.newest(tenant, one, 9)) == [3, 1]
    assert seqs(await archive.newest(tenant, None, 2)) == [3, 2]


async def test_erase_deletes_only_what_the_session_had_before(
    archive: Archive, key: str, session_id: str
) -> None:
    other = subjects.session_key(TENANT, f"{session_id} other")
    await archive.write([entry(key, 1), entry(key, 2), entry(other, 1)])
    await archive.set_aside(entry(key, 2), "why", b"garbage")
    await archive.erase(entry(key, 3))
    await archive.write([entry(key, 4)])
    assert seqs(await archive.newest(TENANT, key, 9)) == [4]
    assert seqs(await archive.newest(TENANT, other, 9)) == [1]


async def test_write_after_an_erasure_deletes_older_exchanges(archive: Archive, key: str) -> None:
    await archive.erase(entry(key, 3))
    await archive.write([entry(key, 4), entry(key, 1), entry(key, 2)])
    assert seqs(await archive.newest(TENANT, key, 9)) == [4]


async def test_late_write_of_a_frozen_server_is_erased_again(mongodb_uri: str, key: str) -> None:
    async with opened(
        mongodb_uri, limits=dataclasses.replace(FAST, erase_again_seconds=0.5)
    ) as archive:
        await archive.erase(entry(key, 3))
        late = [entry(key, 1), entry(key, 4)]
        await archive._exchanges.insert_many([to_document(each) for each in late])
        assert seqs(await archive.newest(TENANT, key, 9)) == [4, 1]

        async def is_gone() -> bool:
            erased_again = await archive._erased.count_documents({"_id": key, "again_at": None})
            return erased_again == 1 and seqs(await archive.newest(TENANT, key, 9)) == [4]

        await until(is_gone)


@pytest.mark.parametrize("batches", [[[1], [2]], [[2], [1]], [[1, 2]], [[2, 1]]])
async def test_retried_exchange_is_marked_in_any_write_order(
    archive: Archive, key: str, session_id: str, batches: list[list[int]]
) -> None:
    other = subjects.session_key(TENANT, f"{session_id} other")
    await archive.write([entry(other, 1)])
    written = {1: entry(key, 1), 2: entry(key, 2, replace(exchange("r2"), retry_of="r1"))}
    for batch in batches:
        await archive.write([written[seq] for seq in batch])
    found = await archive.newest(TENANT, key, 9)
    assert [(entry.seq, entry.is_retried) for entry in found] == [(2, False), (1, True)]
    assert [entry.is_retried for entry in await archive.newest(TENANT, other, 9)] == [False]


async def test_newest_leaves_out_excluded_sessions(archive: Archive) -> None:
    tenant = uuid4().hex
    one, two = subjects.session_key(tenant, "one"), subjects.session_key(tenant, "two")
    await archive.write([entry(one, 1), entry(two, 2)])
    assert seqs(await archive.newest(tenant, None, 9, excluded={two})) == [1]


async def test_invalid_document_does_not_hide_others(
    archive: Archive, mongodb_uri: str, key: str
) -> None:
    await archive.write([entry(key, 1), entry(key, 2)])
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(mongodb_uri)
    where = {"key": key, "seq": 1}
    await client[DATABASE]["exchanges"].update_one(where, {"$set": {"prompt": 7}})
    client.close()
    found = await archive.newest(TENANT, key, 9)
    assert [isinstance(entry.record, Unreadable) for entry in found] == [False, True]


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def with_schema(**schema: Any) -> Exchange:
    form = JsonSchemaFormat(JsonSchema(schema))
    return replace(exchange("x"), sampling=Sampling(response_format=form))


UNFIT = [
    with_schema(maximum=2**64 - 1),
    with_schema(minimum=-(2**63) - 1, maximum=10**40),
    with_schema(properties={"a\0b": {}}),
    with_schema(properties={"a.b": {}, "$ref": "#"}),
    with_schema(items=nested(500)),
    with_schema(enum=[[[[n]]] for n in range(80_000)]),
    replace(exchange("x"), usage=Usage(2**64, 2**63, 0)),
    replace(exchange("x"), retry_of="r" * (MAX_FIELD_BYTES + 1)),
    replace(exchange("x"), asked_at=datetime.fromisoformat("9999-12-31T23:59:59-12:00")),
    replace(exchange("x"), answered_at=datetime.fromisoformat("0001-01-01T00:00:00+12:00")),
]


@pytest.mark.parametrize("unfit", UNFIT, ids=range(len(UNFIT)))
async def test_exchange_that_bson_cannot_hold_is_archived(
    archive: Archive, key: str, unfit: Exchange
) -> None:
    logged = decode(encode(unfit), Exchange)
    at = in_milliseconds(logged.asked_at)
    if at.year == NOW.year:
        logged = replace(logged, asked_at=at)
    if (at := in_milliseconds(logged.answered_at)).year == NOW.year:
        logged = replace(logged, answered_at=at)
    before, after = entry(key, 1), entry(key, 3)
    written = await archive.write([before, entry(key, 2, logged), after])
    assert not any(isinstance(each.record, Unreadable) for each in written)
    found = await archive.newest(TENANT, key, 9)
    assert [each.seq for each in found] == [3, 2, 1]
    assert found[1].record == logged


async def test_record_set_aside_is_counted_once(mongodb_uri: str, key: str) -> None:
    database = f"test_{uuid4().hex}"
    async with opened(mongodb_uri, database) as archive:
        for seq in (1, 2, 2):
            await archive.set_aside(entry(key, seq), "why", b"garbage")
        await until_counted(archive, 2)
    async with opened(mongodb_uri, database) as reopened:
        await until_counted(reopened, 2)
    await drop(mongodb_uri, database)


async def until_counted(archive: Archive, unreadable: int) -> None:
    async def is_counted() -> bool:
        return archive.unreadable == unreadable

    await until(is_counted)


async def test_record_set_aside_is_stored_unchanged(mongodb_uri: str, key: str) -> None:
    database = f"test_{uuid4().hex}"
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(mongodb_uri)
    async with opened(mongodb_uri, database) as archive:
        await archive.set_aside(entry(key, 1), "why", b"garbage")
        found = await client[database]["unreadable"].find_one({"key": key})
        assert found is not None and (found["why"], found["data"]) == ("why", b"garbage")
    client.close()
    await drop(mongodb_uri, database)


async def test_document_rejected_by_mongodb_does_not_block_others(
    mongodb_uri: str, key: str
) -> None:
    database = f"test_{uuid4().hex}"
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(mongodb_uri)
    validator = {"response": {"$ne": "forbidden"}}
    await client[database].create_collection("exchanges", validator=validator)
    async with opened(mongodb_uri, database) as archive:
        bad = entry(key, 2, exchange("r2", response="forbidden"))
        written = await archive.write([entry(key, 1), bad, entry(key, 3)])
        assert [isinstance(e.record, Unreadable) for e in written] == [False, True, False]
        assert seqs(await archive.newest(TENANT, key, 9)) == [3, 1]
    client.close()
    await drop(mongodb_uri, database)


@pytest.mark.parametrize(
    "options, write, read",
    [
        ("", {"w": "majority", "j": True, "wtimeout": 4000}, "majority"),
        ("?w=1&readConcernLevel=local&readPreference=secondary", {"w": 1}, "local"),
    ],
)
async def test_majority_concerns_apply_unless_the_uri_sets_others(
    options: str, write: dict[str, object], read: str
) -> None:
    async with opened(f"mongodb://127.0.0.1:9/{options}", wait=False) as archive:
        collection = archive._exchanges
        assert collection.write_concern.document == write
        assert collection.read_concern.level == read
        assert collection.read_preference == ReadPreference.PRIMARY


async def test_retention_index_follows_the_setting(mongodb_uri: str) -> None:
    database = f"test_{uuid4().hex}"
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(mongodb_uri)
    for retention in (0, 3600, 7200, 0):
        async with opened(mongodb_uri, database, retention):
            for name in ("exchanges", "unreadable", "erased"):
                indexes = await client[database][name].index_information()
                assert indexes.get("retention", {}).get("expireAfterSeconds", 0) == retention
    client.close()
    await drop(mongodb_uri, database)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host/",
        "mongodb://",
        "mongodb://host:port/",
        "mongodb://me:sec@ret@host/",
        "mongodb://host/?w=0",
    ],
)
async def test_invalid_mongodb_uri_is_an_invalid_setting(uri: str) -> None:
    with pytest.raises(InvalidSetting, match="^MONGODB_URI") as raised:
        async with opened(uri, wait=False):
            pass
    assert "sec" not in str(raised.value)


async def test_invalid_database_name_is_an_invalid_setting() -> None:
    with pytest.raises(InvalidSetting, match="^MONGODB_DATABASE='a b'"):
        async with opened("mongodb://127.0.0.1/", "a b", wait=False):
            pass


async def test_absent_server_is_one_warning_without_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "services.history")
    uri = f"mongodb://me:secret@127.0.0.1:{(port := free_port())}/?serverSelectionTimeoutMS=99999"
    async with opened(uri, wait=False, limits=IMPATIENT) as archive:
        await until(lambda: "MongoDB unavailable" in caplog.text)
        await archive._probe()
        assert not archive.connected
    assert len(caplog.records) == 1
    assert f"127.0.0.1:{port}/{DATABASE}" in caplog.text
    assert "container" in caplog.text and "secret" not in caplog.text


async def test_absent_default_server_is_one_info_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "services.history")
    uri = f"mongodb://127.0.0.1:{(port := free_port())}/"
    archive = Archive(uri, DATABASE, pytest.fail, limits=IMPATIENT, is_optional=True)
    async with archive.running():
        await until(lambda: bool(caplog.records))
        await archive._probe()
    (record,) = caplog.records
    assert record.levelno == logging.INFO and len(record.getMessage()) < 100
    assert f"no MongoDB at 127.0.0.1:{port}" in record.getMessage()


async def test_unknown_host_name_is_an_absent_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with opened("mongodb+srv://nowhere.invalid/", wait=False):
        await until(lambda: "MongoDB unavailable" in caplog.text)


async def test_loss_and_return_of_the_server_are_logged_once_each(
    empty_mongo: Server, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "services.history")
    async with opened(uri_of(empty_mongo)) as archive:
        await archive.write([entry(key, 1)])
        await asyncio.to_thread(empty_mongo.stop, signal.SIGKILL)
        with pytest.raises(ArchiveUnavailable):
            await archive.write([entry(key, 2)])
        assert not archive.connected
        with pytest.raises(ArchiveUnavailable):
            await archive.newest(TENANT, key, 9)
        await asyncio.to_thread(empty_mongo.start)
        await becomes(archive, connected=True)
        await archive.write([entry(key, 2)])
        assert seqs(await archive.newest(TENANT, key, 9)) == [2, 1]
    assert connection_log_levels(caplog) == ["INFO", "WARNING", "INFO"]


async def test_slow_read_does_not_lose_the_connection(
    empty_mongo: Server, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = dataclasses.replace(FAST, mongodb_read_seconds=0.3)
    async with opened(uri_of(empty_mongo), limits=limits) as archive:
        await archive.write([entry(key, 1)])
        slow = {"$where": "sleep(600) || true"}
        with pytest.raises(ArchiveUnavailable):
            await archive._find(slow, NEWEST_FIRST, 9)
        assert archive.connected

        async def is_read() -> bool:  # a busy machine may need more than one try
            with suppress(ArchiveUnavailable):
                return seqs(await archive.newest(TENANT, key, 9)) == [1]
            return False

        await until(is_read)
    assert "MongoDB unavailable" not in caplog.text


async def test_hanging_server_is_lost_within_seconds(empty_mongo: Server, key: str) -> None:
    async with opened(uri_of(empty_mongo)) as archive:
        await archive.write([entry(key, 1)])
        empty_mongo.signal(signal.SIGSTOP)  # a thread may still answer for a moment
        try:
            await until(lambda: is_unavailable(archive, key), seconds=2)
            await becomes(archive, connected=False)
        finally:
            empty_mongo.signal(signal.SIGCONT)
        await becomes(archive, connected=True)
        assert seqs(await archive.newest(TENANT, key, 9)) == [1]


async def is_unavailable(archive: Archive, key: str) -> bool:
    try:
        await archive.newest(TENANT, key, 9)
    except ArchiveUnavailable:
        return True
    return False


async def drop(uri: str, database: str) -> None:
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(uri)
    await client.drop_database(database)
    client.close()


def rated(key: str, seq: int, given: Feedback | None) -> Entry:
    feedback = ExchangeFeedback("r1", given)
    record = Described(previous=0, described_at=NOW, feedback=feedback)
    return Entry(seq, key, NOW + timedelta(milliseconds=seq), record)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
async def test_newest_feedback_wins_in_any_write_order(
    archive: Archive, key: str, order: tuple[int, ...]
) -> None:
    given = {1: Feedback("up"), 2: None, 3: Feedback("down", given_at=NOW)}
    for seq in order:
        await archive.write([rated(key, seq, given[seq])])
    id_ = archive_id(key, "r1")
    assert await archive.feedback([id_, "unknown"]) == {id_: given[3]}


async def test_parallel_archivers_keep_the_newest_feedback(archive: Archive, key: str) -> None:
    ratings = [Feedback("up", f"number {seq}") for seq in range(20)]
    writes = [archive.write([rated(key, seq, each)]) for seq, each in enumerate(ratings)]
    await asyncio.gather(*writes)
    assert await archive.feedback([archive_id(key, "r1")]) == {archive_id(key, "r1"): ratings[-1]}


async def test_late_write_of_feedback_is_erased_with_its_session(
    archive: Archive, key: str
) -> None:
    await archive.erase(entry(key, 9))
    await archive.write([rated(key, 3, Feedback("up"))])
    assert await archive.feedback([archive_id(key, "r1")]) == {}

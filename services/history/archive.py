"""The optional MongoDB archive of exchanges, fed from the log. The only module that uses motor."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import bson
import msgspec
from bson.errors import InvalidDocument
from motor.motor_asyncio import (
    AsyncIOMotorClient,
    AsyncIOMotorCollection,
    AsyncIOMotorDatabase,
)
from pymongo import ASCENDING, DESCENDING, ReadPreference, ReturnDocument, UpdateOne, WriteConcern
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    DuplicateKeyError,
    ExecutionTimeout,
    InvalidName,
    NetworkTimeout,
    PyMongoError,
)
from pymongo.read_concern import ReadConcern

from services.contract import subjects
from services.contract.history import Described, Erased, Exchange, Feedback, Removed
from services.history.entry import (
    Entry,
    Position,
    Reading,
    Unreadable,
    archive_id,
    parse_entry,
)
from services.history.limits import LIMITS, HistoryLimits
from services.history.log import SessionLog
from services.history.log_consumer import LogConsumer
from services.runtime.consumers import PendingMessage
from services.runtime.logs import RateLimitedLog
from services.runtime.settings import InvalidSetting
from services.runtime.streams import StoredMessage, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

NEWEST_FIRST = [("logged_at", DESCENDING), ("seq", DESCENDING)]
OLDEST_FIRST = [("logged_at", ASCENDING), ("seq", ASCENDING)]
RETENTION_INDEX = "retention"
ARE_RETRIES = {"retry_of": {"$gt": ""}}

# MongoDB's error codes for one document of a bulk write
DUPLICATE_KEY = 11000  # another archiver was writing it at the same time
REJECTED = (121, 10334)  # by a validator that somebody set; too large

Document = dict[str, Any]
Order = list[tuple[str, int]]
Update = tuple[Document, Document]
"""Filter and update of one document."""

AS_JSON = "as_json"
"""Name of the sub-document with the JSON text of the fields that BSON can't hold."""
MAX_DEPTH = 50  # levels; MongoDB's limit for a document is 100
MAX_FIELD_BYTES = 2 * 1024**2  # BSON size of a field, which can be many times its JSON size

log = logging.getLogger(__name__)


class ArchiveUnavailable(Exception):
    """MongoDB did not reply, or replied with an error."""


class Archive:
    """One database. Its connection is probed all the time; each change is logged once."""

    def __init__(
        self,
        uri: str,
        database: str,
        fail: Fail,
        retention_seconds: int = 0,
        limits: HistoryLimits = LIMITS,
        is_optional: bool = False,
    ) -> None:
        """
        Raises InvalidSetting. A server that can't be reached is no error; if it `is_optional`, it
        is not worth a warning either.
        """
        self._client = _client(uri, limits)
        self._database = _database(self._client, database, limits)
        self._exchanges = self._database["exchanges"]
        self._feedback = self._database["feedback"]
        self._unreadable = self._database["unreadable"]
        self._erased = self._database["erased"]
        self._address = f"{_without_secrets(uri)}/{database}"
        self._is_optional = is_optional
        self._retention = retention_seconds
        self._limits = limits
        self._is_indexed = False
        self._is_loss_logged = False
        self._loop = SupervisedLoop("MongoDB probe", self._probe, fail)
        self.id = ""
        """Identifies this database: each one has a consumer of the log of its own."""
        self.connected = False
        self.unreadable = 0
        """Records that were set aside, at the last probe."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Archive"]:
        try:
            async with self._loop.running(is_cancelled=True):
                yield self
        finally:
            self.close()

    def close(self) -> None:
        self._client.close()

    async def write(self, entries: Sequence[Entry]) -> list[Entry]:
        """
        Insert the exchanges that MongoDB lacks, and feedback that is newer than MongoDB's. Return
        the entries; one that MongoDB rejects is replaced by an Unreadable. Raises
        ArchiveUnavailable: some may be written.
        """
        exchanges = [entry for entry in entries if isinstance(entry.record, Exchange)]
        feedback = [document for entry in entries if (document := feedback_document(entry))]
        rejected: dict[int, Entry] = {}
        with self._as_unavailable():
            if exchanges:
                documents = [to_document(entry) for entry in exchanges]
                rejected = await self._insert(exchanges, documents)
                await self._mark_retried(documents)
            if feedback:
                await self._write_feedback(feedback)
            if exchanges or feedback:
                await self._delete_erased(entries)
        return [rejected.get(entry.seq, entry) for entry in entries]

    async def _write_feedback(self, documents: list[Document]) -> None:
        """
        Replace older feedback, whatever order batches are written in. An upsert fails as a
        duplicate if MongoDB has newer feedback, or if another process inserts some in the same
        moment; the second try then tells which.
        """
        for document in documents:
            for _ in range(2):
                try:
                    await self._feedback.update_one(*replace_older(document), upsert=True)
                    break
                except DuplicateKeyError:
                    continue

    async def feedback(self, ids: Sequence[str]) -> dict[str, Feedback | None]:
        """
        Return the feedback on exchanges with these ids (archive_id); None: it was removed. Raises
        ArchiveUnavailable.
        """
        self._require_connection()
        with self._as_unavailable():
            async with asyncio.timeout(self._limits.mongodb_read_seconds):
                found = await self._feedback.find({"_id": {"$in": list(ids)}}).to_list(None)
        return {each["_id"]: msgspec.convert(each["given"], Feedback | None) for each in found}

    async def find_in(self, key: str, request_id: str) -> Entry | None:
        """Return the session's exchange of this request. Raises ArchiveUnavailable."""
        found = await self._find({"_id": archive_id(key, request_id)}, OLDEST_FIRST, 1)
        return found[0] if found else None

    async def _insert(self, entries: list[Entry], documents: list[Document]) -> dict[int, Entry]:
        """Return rejected entries by their sequences."""
        writes = [UpdateOne(*insert_if_absent(each), upsert=True) for each in documents]
        try:
            await self._exchanges.bulk_write(writes, ordered=False)
        except BulkWriteError as error:
            problems = [p for p in error.details["writeErrors"] if p["code"] != DUPLICATE_KEY]
            if error.details["writeConcernErrors"] or any(
                problem["code"] not in REJECTED for problem in problems
            ):
                raise
            return dict(_rejected(entries[problem["index"]], problem) for problem in problems)
        return {}

    async def _mark_retried(self, documents: list[Document]) -> None:
        """An exchange and its retry may be written in any order."""
        retries = [each for each in documents if each["retry_of"]]
        ids = [each["request_id"] for each in documents]
        retries += await self._exchanges.find({"retry_of": {"$in": ids}}).to_list(None)
        if retries:
            marks = [UpdateOne(*mark_retried(retry)) for retry in retries]
            await self._exchanges.bulk_write(marks, ordered=False)

    async def erase(self, erased: Entry) -> None:
        """
        Delete what the session had before this record. The tombstone is written first: a process
        that is writing older records looks for one after it has written them.
        """
        with self._as_unavailable():
            again_at = datetime.now(UTC) + timedelta(seconds=self._limits.erase_again_seconds)
            tombstone = {"$max": {"until": erased.logged_at}, "$set": {"again_at": again_at}}
            await self._erased.update_one({"_id": erased.key}, tombstone, upsert=True)
            await self._delete(erased.key, erased.logged_at)

    async def remove(self, entry: Entry, request_id: str) -> None:
        """
        Replace the exchange by a document that only says so. It keeps the id, so that a process
        that is writing the exchange does not insert it again.
        """
        id_ = archive_id(entry.key, request_id)
        tenant, _ = subjects.session_of_key(entry.key)
        fields = {"key": entry.key, "tenant": tenant, "request_id": request_id, "seq": entry.seq}
        removed = {**fields, "logged_at": entry.logged_at, "removed": True}
        with self._as_unavailable():
            await self._exchanges.replace_one({"_id": id_}, removed, upsert=True)

    async def _delete_erased(self, written: Sequence[Entry]) -> None:
        """Delete again what was written after its session was erased."""
        first: dict[str, datetime] = {}
        for entry in written:
            first[entry.key] = min(entry.logged_at, first.get(entry.key, entry.logged_at))
        async for tombstone in self._erased.find({"_id": {"$in": list(first)}}):
            if first[tombstone["_id"]] <= tombstone["until"]:
                await self._delete(tombstone["_id"], tombstone["until"])

    async def _erase_again(self) -> None:
        """A server that was frozen may complete a write after the erasure, when it timed out."""
        async for tombstone in self._erased.find({"again_at": {"$lte": datetime.now(UTC)}}):
            await self._delete(tombstone["_id"], tombstone["until"])
            done = {"_id": tombstone["_id"], "again_at": tombstone["again_at"]}
            await self._erased.update_one(done, {"$unset": {"again_at": ""}})

    async def _delete(self, key: str, until: datetime) -> None:
        """Compare times, not sequences: those start again at 1 if the log was lost."""
        await self._exchanges.delete_many({"key": key, "logged_at": {"$lte": until}})
        await self._feedback.delete_many({"key": key, "logged_at": {"$lte": until}})
        await self._unreadable.delete_many({"key": key, "_id.logged_at": {"$lte": until}})

    async def set_aside(self, entry: Entry, reason: str, data: bytes) -> None:
        """Store an unreadable record as it is in the log, and count it."""
        where = {"seq": entry.seq, "logged_at": entry.logged_at}
        aside = {"_id": where, **where, "key": entry.key, "why": reason, "data": data}
        with self._as_unavailable():
            await self._unreadable.update_one(*insert_if_absent(aside), upsert=True)

    async def newest(
        self,
        tenant: str,
        key: str | None,
        limit: int,
        excluded: Collection[str] = (),
        until: Position | None = None,
    ) -> Reading:
        """
        Return the last exchanges up to a position, newest first, of the session with this key, or
        (None) of all the tenant's except those with `excluded` keys. Raises ArchiveUnavailable.
        """
        query: Document = {"key": key} if key else {"tenant": tenant}
        if excluded:
            query |= {"key": {"$nin": list(excluded)}}
        if until:
            query |= {
                "logged_at": {"$lte": until.logged_at},
                "$nor": [{"logged_at": until.logged_at, "seq": {"$gt": until.seq}}],
            }
        return await self._find(query, NEWEST_FIRST, limit)

    async def oldest(self, key: str, limit: int, after: Position | None) -> Reading:
        """
        Return the session's first exchanges after a position, oldest first. Raises
        ArchiveUnavailable.
        """
        query: Document = {"key": key}
        if after:
            query |= {
                "logged_at": {"$gte": after.logged_at},
                "$nor": [{"logged_at": after.logged_at, "seq": {"$lte": after.seq}}],
            }
        return await self._find(query, OLDEST_FIRST, limit)

    async def find(self, tenant: str, request_id: str) -> Entry | None:
        """Return the exchange of this request; the first one if an import copied it."""
        query = {"tenant": tenant, "request_id": request_id}
        found = await self._find(query, OLDEST_FIRST, 1)
        return found[0] if found else None

    async def request_ids(self, key: str, epoch: int, ids: Sequence[str]) -> set[str]:
        """
        Return those of the ids that belong to exchanges of the session in this epoch. Raises
        ArchiveUnavailable.
        """
        self._require_connection()
        query = {"_id": {"$in": [archive_id(key, each) for each in ids]}, "epoch": epoch}
        with self._as_unavailable():
            async with asyncio.timeout(self._limits.mongodb_read_seconds):
                found = await self._exchanges.find(query, {"request_id": 1}).to_list(None)
        return {each["request_id"] for each in found}

    async def _find(self, query: Document, order: Order, limit: int) -> Reading:
        """Raises ArchiveUnavailable; the next probe then shows whether MongoDB is slow or lost."""
        self._require_connection()
        timeout = self._limits.mongodb_read_seconds
        with self._as_unavailable():
            async with asyncio.timeout(timeout):
                query = query | {"removed": None}  # the field is missing
                cursor = self._exchanges.find(query, max_time_ms=int(timeout * 1000))
                found = Reading(limit, self._limits.max_read_bytes)
                async for document in cursor.sort(order).limit(limit):
                    found.add(from_document(document))
                    if found.is_full:
                        await cursor.close()
                        break
        return found

    def _require_connection(self) -> None:
        if not self.connected:
            raise ArchiveUnavailable("not connected")

    async def _probe(self) -> float:
        try:
            async with asyncio.timeout(self._limits.mongodb_select_seconds + 0.5):
                await self._database.command("ping")
            if not self._is_indexed:
                await self._prepare()
        except (PyMongoError, OSError) as error:
            self._set_lost(error)
        else:
            self._set_connected()
            await self._maintain()
        return self._limits.mongodb_probe_interval_seconds

    async def _maintain(self) -> None:
        try:
            async with asyncio.timeout(self._limits.mongodb_socket_seconds):
                self.unreadable = await self._unreadable.estimated_document_count()
                await self._erase_again()
        except (PyMongoError, TimeoutError) as error:
            log.info("MongoDB maintenance failed, retrying error=%s", _short(error))

    async def _prepare(self) -> None:
        """Create indexes and the database's id."""
        await self._exchanges.create_index([("key", 1), *NEWEST_FIRST])
        await self._exchanges.create_index([("tenant", 1), *NEWEST_FIRST])
        await self._exchanges.create_index([("tenant", 1), ("request_id", 1)])
        await self._exchanges.create_index("retry_of", partialFilterExpression=ARE_RETRIES)
        await self._feedback.create_index("key")
        await self._erased.create_index("again_at", sparse=True)
        await self._set_retention(self._exchanges, "logged_at")
        await self._set_retention(self._feedback, "logged_at")
        await self._set_retention(self._unreadable, "logged_at")
        await self._set_retention(self._erased, "until")  # what it erased has expired by then
        self.id = await self._identify()
        self._is_indexed = True

    async def _set_retention(
        self, collection: AsyncIOMotorCollection[Document], field: str
    ) -> None:
        current = (await collection.index_information()).get(RETENTION_INDEX)
        if current and current.get("expireAfterSeconds") != self._retention:
            await collection.drop_index(RETENTION_INDEX)
        if self._retention:
            await collection.create_index(
                field, name=RETENTION_INDEX, expireAfterSeconds=self._retention
            )

    async def _identify(self) -> str:
        found: Document = await self._database["meta"].find_one_and_update(
            {"_id": "archive"},
            {"$setOnInsert": {"id": uuid4().hex}},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        return str(found["id"])

    @contextmanager
    def _as_unavailable(self) -> Iterator[None]:
        try:
            yield
        except (PyMongoError, TimeoutError) as error:
            # any other error is a reply: the server is connected, and rejects
            if isinstance(error, TimeoutError | ExecutionTimeout | NetworkTimeout):
                self._loop.wake()
            elif isinstance(error, AutoReconnect):
                self._set_lost(error)
            raise ArchiveUnavailable(_short(error)) from error

    def _set_lost(self, error: Exception) -> None:
        if not self._is_loss_logged:
            self._log_loss(error)
        self.connected, self._is_loss_logged = False, True
        self._is_indexed = False  # it may come back as another database, or an empty one

    def _log_loss(self, error: Exception) -> None:
        if not self.is_expected:
            log.info("no MongoDB at %s (optional): NATS alone stores the history", self._address)
            return
        log.warning(
            "MongoDB unavailable address=%s error=%s. Chats continue, and the log keeps exchanges"
            " for it. Is it running? Inside a container, localhost is the container itself.",
            self._address,
            _short(error),
        )

    @property
    def is_expected(self) -> bool:
        """Whether a MongoDB that is not connected is missing: it was set, or has been there."""
        return not self._is_optional or self.id != ""

    def _set_connected(self) -> None:
        if not self.connected:
            log.info("MongoDB connected address=%s", self._address)
        self.connected, self._is_loss_logged = True, False


class Archiver(LogConsumer):
    """Copies the log's records to MongoDB."""

    temporary_errors = (StreamUnavailable, ArchiveUnavailable)

    def __init__(self, session_log: SessionLog, archive: Archive, fail: Fail) -> None:
        limits = session_log.limits
        super().__init__("archiver", fail, limits, limits.archive_batch)
        self._log = session_log
        self._archive = archive
        self._failures = RateLimitedLog(log)

    async def fetch(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        if not self._archive.connected:
            await asyncio.sleep(self._limits.mongodb_probe_interval_seconds)
            return []
        await self._log.open_archive(self._archive.id)
        assert self._log.archive_consumer is not None
        return await self._log.archive_consumer.fetch(batch, timeout)

    async def process(self, records: Sequence[StoredMessage]) -> None:
        entries = await self._archive.write([parse_entry(stored) for stored in records])
        for entry, stored in zip(entries, records, strict=True):
            match entry.record:
                case Erased():
                    await self._archive.erase(entry)
                case Removed(request_id=request_id):
                    await self._archive.remove(entry, request_id)
                case Unreadable(reason):
                    log.warning(
                        "record set aside session=%s seq=%d: %s", entry.key, entry.seq, reason
                    )
                    await self._archive.set_aside(entry, reason, stored.data)

    async def recover(self, error: Exception) -> None:
        if self._archive.connected:  # the loss of the connection is logged already
            self._failures.warning("archiving failed, the log keeps all exchanges error=%s", error)
        if isinstance(error, StreamUnavailable):
            await self._log.try_ensure_consumers()


def _client(uri: str, limits: HistoryLimits) -> AsyncIOMotorClient[Document]:
    select_ms = int(limits.mongodb_select_seconds * 1000)
    try:
        return AsyncIOMotorClient(
            uri,
            tz_aware=True,
            serverSelectionTimeoutMS=select_ms,
            connectTimeoutMS=select_ms,
            socketTimeoutMS=int(limits.mongodb_socket_seconds * 1000),
        )
    except (ConfigurationError, ValueError) as error:
        reason = str(error).partition('"')[0].strip(" .")  # the rest may quote the password
        raise InvalidSetting(f"MONGODB_URI can't be used: {reason}.") from None


def _database(
    client: AsyncIOMotorClient[Document], name: str, limits: HistoryLimits
) -> AsyncIOMotorDatabase[Document]:
    """
    Return the database. Unless the URI says otherwise, writes are on the disks of a majority before
    they are acknowledged to the log, and reads come from where they were written.
    """
    write = client.write_concern
    if not write.acknowledged:
        raise InvalidSetting(
            "MONGODB_URI must not have w=0, with which writes are not acknowledged."
        )
    if write.is_server_default:
        majority_ms = int((limits.mongodb_socket_seconds - 1) * 1000)
        write = WriteConcern("majority", wtimeout=majority_ms, j=True)
    read = client.read_concern if client.read_concern.level else ReadConcern("majority")
    try:
        return client.get_database(
            name, read_preference=ReadPreference.PRIMARY, write_concern=write, read_concern=read
        )
    except InvalidName as error:
        raise InvalidSetting(f"MONGODB_DATABASE={name!r} can't be used: {error}.") from error


def _without_secrets(uri: str) -> str:
    return uri.rpartition("://")[2].rpartition("@")[2].partition("/")[0]


def _short(error: Exception) -> str:
    """Remove the timeouts and the topology description that pymongo appends."""
    text = str(error).partition(" (configured timeouts")[0].partition(", Timeout:")[0]
    return text[:300] or "no reply in time"  # a TimeoutError has no text


def _rejected(entry: Entry, problem: Document) -> tuple[int, Entry]:
    reason = f"MongoDB rejected it: {problem['errmsg']}"
    return entry.seq, entry._replace(record=Unreadable(reason))


def to_document(entry: Entry) -> Document:
    """
    Return the document of an exchange. Fields that BSON can't hold are stored as JSON text, so that
    every exchange of the log can be archived.
    """
    assert isinstance(entry.record, Exchange)
    tenant, session_id = subjects.session_of_key(entry.key)
    exchange: Document = msgspec.to_builtins(entry.record, builtin_types=(datetime,))
    texts = {
        name: msgspec.json.encode(value).decode()
        for name, value in exchange.items()
        if not _fits(value)
    }
    if texts:
        exchange = {k: v for k, v in exchange.items() if k not in texts} | {AS_JSON: texts}
    return exchange | {
        "_id": archive_id(entry.key, entry.record.request_id),
        "key": entry.key,
        "tenant": tenant,
        "session_id": session_id,
        "request_id": entry.record.request_id,
        "retry_of": entry.record.retry_of,
        "seq": entry.seq,
        "logged_at": entry.logged_at,
    }


def from_document(document: Document) -> Entry:
    record: Exchange | Unreadable
    try:
        texts = document.get(AS_JSON, {})
        fields = {name: msgspec.json.decode(text) for name, text in texts.items()}
        record = msgspec.convert(document | fields, Exchange)
    except msgspec.MsgspecError as error:
        record = Unreadable(str(error))
    is_retried = "retried_by" in document
    return Entry(document["seq"], document["key"], document["logged_at"], record, is_retried)


def feedback_document(entry: Entry) -> Document | None:
    """Return the document of feedback; None if the record is something else."""
    if not isinstance(entry.record, Described) or entry.record.feedback is msgspec.UNSET:
        return None
    feedback = entry.record.feedback
    tenant, session_id = subjects.session_of_key(entry.key)
    return {
        "_id": archive_id(entry.key, feedback.request_id),
        "key": entry.key,
        "tenant": tenant,
        "session_id": session_id,
        "request_id": feedback.request_id,
        "seq": entry.seq,
        "logged_at": entry.logged_at,
        "given": msgspec.to_builtins(feedback.given, builtin_types=(datetime,)),
    }


def replace_older(document: Document) -> Update:
    """Return the update that replaces a document which was logged before this one."""
    at, seq = document["logged_at"], document["seq"]
    older = [{"logged_at": {"$lt": at}}, {"logged_at": at, "seq": {"$lt": seq}}]
    return {"_id": document["_id"], "$or": older}, {"$set": document}


def insert_if_absent(document: Document) -> Update:
    return {"_id": document["_id"]}, {"$setOnInsert": document}


def mark_retried(retry: Document) -> Update:
    """Return the update that marks the exchange which this one replaces."""
    retried = archive_id(retry["key"], retry["retry_of"])
    return {"_id": retried}, {"$set": {"retried_by": retry["request_id"]}}


def _fits(value: Any) -> bool:
    """Return whether MongoDB can store the value. Older servers reject keys with `$` or `.`."""
    if not _is_shallow(value, MAX_DEPTH):
        return False
    try:
        return len(bson.encode({"": value}, check_keys=True)) <= MAX_FIELD_BYTES
    except (InvalidDocument, OverflowError):
        return False


def _is_shallow(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return True
    return levels > 0 and all(_is_shallow(child, levels - 1) for child in value)

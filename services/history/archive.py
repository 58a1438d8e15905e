"""MongoDB, which keeps what the log has. The only place that knows motor."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from uuid import uuid4

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
    ExecutionTimeout,
    InvalidName,
    NetworkTimeout,
    PyMongoError,
)
from pymongo.read_concern import ReadConcern

from services.history import document
from services.history.document import Document
from services.history.entry import Entry, Place, Unreadable, archive_id
from services.runtime.settings import InvalidSetting
from services.runtime.supervised import Fail, SupervisedLoop

SELECTION_TIMEOUT_MS = 2000  # in which a server must be found
SOCKET_TIMEOUT_MS = 5000  # in which a batch must be written
REPLICATION_TIMEOUT_MS = 4000  # in which a majority must have it
READ_TIMEOUT = 1.0  # seconds for what somebody waits for; then the log is asked instead
LOOK_TIMEOUT = 2.5  # a little more than it takes to say that there is no server
LOOK_INTERVAL = 0.5
UPKEEP_TIMEOUT = 5.0  # seconds for work in the background
ERASE_AGAIN_AFTER = 60.0  # seconds; the longest that a write may be under way

NEWEST_FIRST = [("logged_at", DESCENDING), ("seq", DESCENDING)]
OLDEST_FIRST = [("logged_at", ASCENDING), ("seq", ASCENDING)]
RETENTION_INDEX = "retention"
ARE_RETRIES = {"retry_of": {"$gt": ""}}

# MongoDB's error codes for one document of many
IS_THERE = 11000  # another archiver was writing it at the same time
REFUSED = (121, 10334)  # by a validator that somebody set; too large

log = logging.getLogger(__name__)
Order = list[tuple[str, int]]


class ArchiveUnavailable(Exception):
    """MongoDB did not answer, or not with success."""


class Archive:
    """
    One database. Whether it can be reached is looked at all the time, and said once each time that
    it changes.
    """

    def __init__(
        self,
        database: AsyncIOMotorDatabase[Document],
        where: str,
        retention: int,
        fail: Fail,
        is_optional: bool,
    ):
        self._database = database
        self._exchanges = database["exchanges"]
        self._meta = database["meta"]
        self._unreadable = database["unreadable"]
        self._erased = database["erased"]
        self._where = where
        self._retention = retention
        self._is_optional = is_optional
        self._indexed = False
        self._complained = False
        self._loop = SupervisedLoop("archive's watch", self._look, fail)
        self.id = ""
        """Tells this database from any other: what the log has given to one, another lacks."""
        self.connected = False
        self.unreadable = 0
        """Records that were set aside, when last looked at."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls, uri: str, database: str, retention: int, fail: Fail, is_optional: bool = False
    ) -> AsyncIterator["Archive"]:
        """
        Open the archive. Raises InvalidSetting. A server that can't be reached is no error; with
        `is_optional` (the default address) it is not worth a warning either.
        """
        client = _client(uri)
        where = f"{_without_secrets(uri)}/{database}"
        archive = cls(_database(client, database), where, retention, fail, is_optional)
        try:
            async with archive._loop.running(is_cancelled=True):
                yield archive
        finally:
            client.close()

    async def write(self, entries: Sequence[Entry]) -> list[Entry]:
        """
        Keeps the exchanges among the entries; one that is there already stays as it is. Returns the
        entries, as unreadable where MongoDB refuses one for what it is. Raises ArchiveUnavailable:
        some may be written.
        """
        kept = [entry for entry in entries if document.is_kept(entry)]
        if not kept:
            return list(entries)
        documents = [document.of(entry) for entry in kept]
        with self._as_unavailable():
            refused = await self._upsert_all(kept, documents)
            await self._mark_retried(documents)
            await self._take_back(entries)
        return [refused.get(entry.seq, entry) for entry in entries]

    async def _upsert_all(self, kept: list[Entry], documents: list[Document]) -> dict[int, Entry]:
        """Those that were refused, by their sequence."""
        writes = [UpdateOne(*document.upsert(each), upsert=True) for each in documents]
        try:
            await self._exchanges.bulk_write(writes, ordered=False)
        except BulkWriteError as error:
            problems = [p for p in error.details["writeErrors"] if p["code"] != IS_THERE]
            if error.details["writeConcernErrors"] or any(
                problem["code"] not in REFUSED for problem in problems
            ):
                raise
            return dict(_refused(kept[problem["index"]], problem) for problem in problems)
        return {}

    async def _mark_retried(self, documents: list[Document]) -> None:
        """Of an exchange and the one that takes its place, either may be written first."""
        retries = [each for each in documents if each["retry_of"]]
        ids = [each["request_id"] for each in documents]
        retries += await self._exchanges.find({"retry_of": {"$in": ids}}).to_list(None)
        if retries:
            marks = [UpdateOne(*document.mark(retry)) for retry in retries]
            await self._exchanges.bulk_write(marks, ordered=False)

    async def erase(self, erased: Entry) -> None:
        """
        What the session had before this record. The tombstone comes first: a process that is
        writing older records looks for one after it has written them.
        """
        with self._as_unavailable():
            again_at = datetime.now(UTC) + timedelta(seconds=ERASE_AGAIN_AFTER)
            tombstone = {"$max": {"until": erased.logged_at}, "$set": {"again_at": again_at}}
            await self._erased.update_one({"_id": erased.key}, tombstone, upsert=True)
            await self._delete(erased.key, erased.logged_at)

    async def _take_back(self, written: Sequence[Entry]) -> None:
        first: dict[str, datetime] = {}
        for entry in written:
            first[entry.key] = min(entry.logged_at, first.get(entry.key, entry.logged_at))
        async for tombstone in self._erased.find({"_id": {"$in": list(first)}}):
            if first[tombstone["_id"]] <= tombstone["until"]:
                await self._delete(tombstone["_id"], tombstone["until"])

    async def _erase_again(self) -> None:
        """A server that was frozen may have done a write that was given up, after the erasure."""
        async for tombstone in self._erased.find({"again_at": {"$lte": datetime.now(UTC)}}):
            await self._delete(tombstone["_id"], tombstone["until"])
            done = {"_id": tombstone["_id"], "again_at": tombstone["again_at"]}
            await self._erased.update_one(done, {"$unset": {"again_at": ""}})

    async def _delete(self, key: str, until: datetime) -> None:
        """By the log's clock: sequences begin again where a log was lost."""
        await self._exchanges.delete_many({"key": key, "logged_at": {"$lte": until}})
        await self._unreadable.delete_many({"key": key, "_id.logged_at": {"$lte": until}})

    async def set_aside(self, entry: Entry, why: str, data: bytes) -> None:
        """Keeps a record that can't be read as it came, and counts it."""
        where = {"seq": entry.seq, "logged_at": entry.logged_at}
        aside = {"_id": where, **where, "key": entry.key, "why": why, "data": data}
        with self._as_unavailable():
            await self._unreadable.update_one(*document.upsert(aside), upsert=True)

    async def last(
        self,
        tenant: str,
        key: str | None,
        limit: int,
        but_of: Collection[str] = (),
        until: Place | None = None,
    ) -> list[Entry]:
        """
        The last exchanges up to a place of the session with this key, or (None) of all of the
        tenant's but those of some.
        """
        query: Document = {"key": key} if key else {"tenant": tenant}
        if but_of:
            query |= {"key": {"$nin": list(but_of)}}
        if until:
            query |= {
                "logged_at": {"$lte": until.logged_at},
                "$nor": [{"logged_at": until.logged_at, "seq": {"$gt": until.seq}}],
            }
        return await self._find(query, NEWEST_FIRST, limit)

    async def next(self, key: str, limit: int, after: Place | None) -> list[Entry]:
        """The session's first exchanges after a place, oldest first."""
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
        """Return those of the ids that belong to exchanges of the session in this epoch."""
        query = {"_id": {"$in": [archive_id(key, each) for each in ids]}, "epoch": epoch}
        with self._as_unavailable():
            async with asyncio.timeout(READ_TIMEOUT):
                found = await self._exchanges.find(query, {"request_id": 1}).to_list(None)
        return {each["request_id"] for each in found}

    async def _find(self, query: Document, order: Order, limit: int) -> list[Entry]:
        """Raises ArchiveUnavailable; `_look` then decides whether MongoDB is slow or lost."""
        with self._as_unavailable():
            async with asyncio.timeout(READ_TIMEOUT):
                found = self._exchanges.find(query, max_time_ms=int(READ_TIMEOUT * 1000))
                documents = await found.sort(order).limit(limit).to_list(limit)
        return [document.read(each) for each in documents]

    async def _look(self) -> float:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT):
                await self._database.command("ping")
            if not self._indexed:
                await self._index()
        except (PyMongoError, OSError) as error:
            self._lost(error)
        else:
            self._found()
            await self._keep_up()
        return LOOK_INTERVAL

    async def _keep_up(self) -> None:
        try:
            async with asyncio.timeout(UPKEEP_TIMEOUT):
                self.unreadable = await self._unreadable.estimated_document_count()
                await self._erase_again()
        except (PyMongoError, TimeoutError) as error:
            log.info("upkeep of MongoDB failed, retrying: %s", _short(error))

    async def _index(self) -> None:
        await self._exchanges.create_index([("key", 1), *NEWEST_FIRST])
        await self._exchanges.create_index([("tenant", 1), *NEWEST_FIRST])
        await self._exchanges.create_index([("tenant", 1), ("request_id", 1)])
        await self._exchanges.create_index("retry_of", partialFilterExpression=ARE_RETRIES)
        await self._erased.create_index("again_at", sparse=True)
        await self._forget_by(self._exchanges, "logged_at")
        await self._forget_by(self._unreadable, "logged_at")
        await self._forget_by(self._erased, "until")  # by then, what it tells of is forgotten
        self.id = await self._identify()
        self._indexed = True

    async def _forget_by(self, collection: AsyncIOMotorCollection[Document], field: str) -> None:
        there = (await collection.index_information()).get(RETENTION_INDEX)
        if there and there.get("expireAfterSeconds") != self._retention:
            await collection.drop_index(RETENTION_INDEX)
        if self._retention:
            await collection.create_index(
                field, name=RETENTION_INDEX, expireAfterSeconds=self._retention
            )

    async def _identify(self) -> str:
        found: Document = await self._meta.find_one_and_update(
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
            # any other error is an answer: the server is there, and refuses
            if isinstance(error, TimeoutError | ExecutionTimeout | NetworkTimeout):
                self._loop.wake()
            elif isinstance(error, AutoReconnect):
                self._lost(error)
            raise ArchiveUnavailable(_short(error)) from error

    def _lost(self, error: Exception) -> None:
        if not self._complained:
            self._complain(error)
        self.connected, self._complained = False, True
        self._indexed = False  # it may come back as another, or empty

    def _complain(self, error: Exception) -> None:
        if self._is_optional and not self.id:  # it was never connected
            log.info("no MongoDB at %s (optional): NATS alone keeps the history", self._where)
            return
        log.warning(
            "MongoDB at %s can't be used (%s): chats continue, and the log keeps what it misses."
            " Is it running? Inside a container, localhost is the container itself.",
            self._where,
            _short(error),
        )

    def _found(self) -> None:
        if not self.connected:
            log.info("connected to MongoDB at %s", self._where)
        self.connected, self._complained = True, False


def check(uri: str, database: str) -> None:
    """Raise InvalidSetting for settings with which `Archive.open` would raise it."""
    client = _client(uri)
    try:
        _database(client, database)
    finally:
        client.close()


def _client(uri: str) -> AsyncIOMotorClient[Document]:
    try:
        return AsyncIOMotorClient(
            uri,
            tz_aware=True,
            serverSelectionTimeoutMS=SELECTION_TIMEOUT_MS,
            connectTimeoutMS=SELECTION_TIMEOUT_MS,
            socketTimeoutMS=SOCKET_TIMEOUT_MS,
        )
    except (ConfigurationError, ValueError) as error:
        why = str(error).partition('"')[0].strip(" .")  # the rest may quote a part of the password
        raise InvalidSetting(f"MONGODB_URI can't be used: {why}.") from None


def _database(client: AsyncIOMotorClient[Document], name: str) -> AsyncIOMotorDatabase[Document]:
    """
    What was written is acknowledged to the log, and read by who has seen that it was. So, unless
    the address says otherwise, it is on the disks of a majority; and it is read where it was
    written.
    """
    write = client.write_concern
    if not write.acknowledged:
        raise InvalidSetting("MONGODB_URI must not have w=0: nobody would know what was written.")
    if write.is_server_default:
        write = WriteConcern("majority", wtimeout=REPLICATION_TIMEOUT_MS, j=True)
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
    """Without the timeouts and the description of the whole topology that pymongo adds."""
    text = str(error).partition(" (configured timeouts")[0].partition(", Timeout:")[0]
    return text[:300] or "no answer in time"  # a TimeoutError has no text


def _refused(entry: Entry, problem: Document) -> tuple[int, Entry]:
    why = f"MongoDB refused it: {problem['errmsg']}"
    return entry.seq, entry._replace(record=Unreadable(why))

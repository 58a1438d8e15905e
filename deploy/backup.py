"""
Back up what JetStream and MongoDB store while the services run, and restore it into empty servers.

    just backup FOLDER
    just restore FOLDER

A backup has the layout of `nats account backup` and of `mongodump`. It is consistent although chats
go on (docs/decisions/0108): snapshots and indexes are older than the log, from which history brings
them up to date, and MongoDB is younger than the log, which fills it idempotently.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import bson
import msgspec
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from msgspec import Struct
from pymongo import MongoClient, WriteConcern
from pymongo.database import Database
from pymongo.errors import PyMongoError, ServerSelectionTimeoutError
from pymongo.read_concern import ReadConcern

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.messages import Empty
from services.contract.version import COMMAND
from services.history.settings import DEFAULT_MONGODB, HistorySettings
from services.runtime import logs
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, InboxLimits, NoResponders
from services.runtime.settings import InvalidSetting, load

STREAMS = (
    f"KV_{subjects.KEYS_BUCKET}",
    f"KV_{subjects.REQUESTS_BUCKET}",
    f"KV_{subjects.SESSIONS_BUCKET}",
    subjects.HISTORY_STREAM,  # the last one, so that nothing else is ahead of it
)
DESCRIPTION, DATA = "backup.json", "stream.tar.s2"
MONGODB = "mongodb"
CHUNK_BYTES = 128 * 1024
UNREAD_CHUNKS = InboxLimits(messages=4096, bytes=64 * 1024**2)  # nats-server sends 8 MiB ahead
CONNECT_SECONDS = 5.0
TIMEOUT = 60.0  # seconds without a reply
SELECT_MS = 5000
BATCH = 200  # documents
NO_SUCH_STREAM = 10059

RawDatabase = Database[RawBSONDocument]
RAW = CodecOptions(document_class=RawBSONDocument)
PRIVATE = 0o077  # umask: a backup has all conversations, and the hashes of keys


class BackupError(Exception):
    """The message says what is wrong, and what to do."""


class ApiError(Struct, frozen=True):
    code: int
    err_code: int = 0
    description: str = ""


class StreamDescription(Struct, frozen=True):
    """A stream's configuration and state, as nats-server takes it to restore the stream."""

    config: dict[str, Any] = {}
    state: dict[str, Any] = {}


class ApiReply(StreamDescription, frozen=True):
    """https://docs.nats.io/reference/reference-protocols/nats_api_reference"""

    deliver_subject: str = ""
    error: ApiError | None = None


class SnapshotRequest(Struct, frozen=True):
    """Consumers are left out: history makes new ones, which process the log again."""

    deliver_subject: str
    chunk_size: int = CHUNK_BYTES
    no_consumers: bool = True
    jsck: bool = True  # verify checksums


class StreamBackup:
    """The streams of a NATS server, and a folder with one folder for each of them."""

    def __init__(self, bus: Bus, folder: Path) -> None:
        self._bus = bus
        self._folder = folder

    async def create(self) -> None:
        """Raises BackupError."""
        for stream in STREAMS:
            await self._create(stream)

    async def require_none(self) -> None:
        """Raises BackupError if the server has one of the streams."""
        for stream in STREAMS:
            if await self._exists(stream):
                raise BackupError(
                    f"The server has a stream {stream}. Stop the services, then start nats-server"
                    " with an empty folder."
                )

    async def restore(self, replicas: int | None) -> None:
        """Restore all streams, with their number of replicas or another. Raises BackupError."""
        for stream in STREAMS:
            if (self._folder / stream).is_dir():
                await self._restore(stream, replicas)

    async def _exists(self, stream: str) -> bool:
        reply = await self._call("INFO", stream, Empty())
        if reply.error and reply.error.err_code != NO_SUCH_STREAM:
            raise BackupError(f"JetStream is not available: {reply.error.description}.")
        return reply.error is None

    async def _create(self, stream: str) -> None:
        inbox = self._bus.new_inbox()
        async with self._bus.inbox(inbox) as chunks:
            reply = await self._call("SNAPSHOT", stream, SnapshotRequest(inbox))
            if reply.error and reply.error.err_code == NO_SUCH_STREAM:
                return print(f"{stream}: there is none")
            _require_success(stream, reply)
            own = self._folder / stream
            own.mkdir()
            with (own / DATA).open("wb") as file:
                while data := _chunk(stream, chunk := await chunks.next(TIMEOUT)):
                    file.write(data)
                    if chunk.reply:  # nats-server sends more
                        await self._bus.send(chunk.reply)
        description = msgspec.json.encode(StreamDescription(reply.config, reply.state))
        (own / DESCRIPTION).write_bytes(msgspec.json.format(description))
        print(f"{stream}: {reply.state['messages']:,} messages")

    async def _restore(self, stream: str, replicas: int | None) -> None:
        own = self._folder / stream
        saved = msgspec.json.decode((own / DESCRIPTION).read_bytes(), type=StreamDescription)
        config = saved.config | ({"num_replicas": replicas} if replicas else {})
        request = StreamDescription(config, saved.state)
        target = await self._call("RESTORE", stream, request)
        _require_success(stream, target)
        inbox = self._bus.new_inbox()
        async with self._bus.inbox(inbox) as replies:
            async for chunk in _chunks(own / DATA):
                await self._bus.send(target.deliver_subject, chunk, inbox)
                answer = (await replies.next(TIMEOUT)).data or b"{}"
                done = msgspec.json.decode(answer, type=ApiReply)
                _require_success(stream, done)
        print(f"{stream}: {done.state['messages']:,} messages")

    async def _call(self, verb: str, stream: str, request: Struct) -> ApiReply:
        subject = f"$JS.API.STREAM.{verb}.{stream}"
        return await self._bus.request(subject, request, ApiReply, TIMEOUT)


def _require_success(stream: str, reply: ApiReply) -> None:
    if reply.error:
        raise BackupError(f"nats-server refuses, for {stream}: {reply.error.description}.")


def _chunk(stream: str, chunk: Delivery) -> bytes:
    """Return the data of a chunk; none at the end. Raises BackupError."""
    status = chunk.headers.get("Status", "204")
    if status != "204":
        reason = chunk.headers.get("Description", "")
        raise BackupError(f"The backup of {stream} broke off: {status} {reason}. Try again.")
    return chunk.data


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    """Yield the file's content, then an empty chunk, which ends it."""
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data
    yield b""


def dump(database: RawDatabase, folder: Path) -> None:
    """Write each collection to a file of BSON documents. Raises PyMongoError."""
    folder.mkdir(parents=True)
    for name in database.list_collection_names():
        count = 0
        with (folder / f"{name}.bson").open("wb") as file:
            for document in database[name].find(batch_size=BATCH):
                file.write(document.raw)
                count += 1
        print(f"{database.name}.{name}: {count:,} documents")


def load_dump(folder: Path, database: RawDatabase) -> None:
    """
    Insert the documents of all files, with the ids that they have. Raises BackupError if the
    database has collections; PyMongoError. History makes the indexes.
    """
    if database.list_collection_names():
        raise BackupError(f"The database {database.name} is not empty: drop it first.")
    for path in sorted(folder.glob("*.bson")):
        count = 0
        for batch in _batches(path):
            database[path.stem].insert_many(batch)
            count += len(batch)
        print(f"{database.name}.{path.stem}: {count:,} documents")


def _batches(path: Path) -> Iterator[list[RawBSONDocument]]:
    batch: list[RawBSONDocument] = []
    with path.open("rb") as file:
        for document in bson.decode_file_iter(file, RAW):
            batch.append(document)
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def database_of(settings: HistorySettings) -> RawDatabase | None:
    """
    Return the database of the settings; None if MONGODB_URI is the default, and nothing is there.
    Raises PyMongoError.
    """
    client: MongoClient[RawBSONDocument] = MongoClient(
        settings.mongodb_uri, document_class=RawBSONDocument, serverSelectionTimeoutMS=SELECT_MS
    )
    try:
        client.admin.command("ping")
    except ServerSelectionTimeoutError:
        if settings.mongodb_uri != DEFAULT_MONGODB:
            raise
        print("no MongoDB at MONGODB_URI: what NATS stores is all there is")
        return None
    return client.get_database(
        settings.mongodb_database,
        write_concern=WriteConcern("majority"),
        read_concern=ReadConcern("majority"),
    )


async def back_up(settings: HistorySettings, folder: Path) -> None:
    """
    Write a backup to a new folder, which appears once it is complete. Raises BackupError,
    PyMongoError, OSError.
    """
    if folder.exists():
        raise BackupError(f"{folder} exists: name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=folder.parent) as temporary:
        partial = Path(temporary, folder.name)
        partial.mkdir()
        async with _connected(settings) as bus:
            await StreamBackup(bus, partial).create()
        if (database := database_of(settings)) is not None:  # after the log: see above
            dump(database, partial / MONGODB / database.name)
        partial.rename(folder)


async def restore(settings: HistorySettings, folder: Path, replicas: int | None) -> None:
    """Raises BackupError, PyMongoError, OSError."""
    if not (folder / subjects.HISTORY_STREAM / DESCRIPTION).is_file():
        raise BackupError(f"{folder} is no backup: it has no {subjects.HISTORY_STREAM}.")
    dumps = list((folder / MONGODB).glob("*"))
    database = database_of(settings) if dumps else None
    if dumps and database is None:
        raise BackupError("The backup has a dump of MongoDB: start MongoDB, or set MONGODB_URI.")
    async with _connected(settings) as bus:
        streams = StreamBackup(bus, folder)
        await streams.require_none()  # before anything is written
        if database is not None:
            await asyncio.to_thread(load_dump, dumps[0], database)
        await streams.restore(replicas)


@asynccontextmanager
async def _connected(settings: HistorySettings) -> AsyncIterator[Bus]:
    """Raises BackupError if no server is there."""
    access = NatsAccess.of(settings)
    async with AsyncExitStack() as stack:
        connecting = Bus.connect(settings.nats_url, "backup", access, UNREAD_CHUNKS)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                bus = await stack.enter_async_context(connecting)
        except TimeoutError:
            raise BackupError("NATS can't be reached: is it running?") from None
        yield bus


def main() -> None:
    logs.configure("backup")
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("backup", "restore"):
        commands.add_parser(name).add_argument("folder", type=Path)
    replicas = "servers of a NATS cluster that keep each stream; default: as before"
    commands.choices["restore"].add_argument("--replicas", type=int, help=replicas)
    options = parser.parse_args()
    os.umask(PRIVATE)
    settings = load(HistorySettings)
    try:
        if options.command == "backup":
            asyncio.run(back_up(settings, options.folder))
        else:
            asyncio.run(restore(settings, options.folder, options.replicas))
    except (BackupError, ServiceError) as error:
        sys.exit(str(error))
    except (TimeoutError, NoResponders):
        sys.exit("JetStream does not reply: does nats-server run with -js?")
    except (PyMongoError, ValueError) as error:
        sys.exit(f"MongoDB: {str(error).partition(chr(34))[0]}")  # the rest may quote a password
    except OSError as error:
        sys.exit(f"{error.filename} can't be used: {error.strerror}.")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    try:
        main()
    except InvalidSetting as error:
        sys.exit(str(error))

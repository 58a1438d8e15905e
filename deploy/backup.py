"""
Back up what JetStream and MongoDB store while the services run, and restore it into empty servers.

    just backup FOLDER
    just restore FOLDER

A backup has the layout of `nats account backup` and of `mongodump`. It is consistent although chats
go on (docs/decisions/0108): snapshots and indexes are older than the log, from which history brings
them up to date, and MongoDB is younger than the log, which fills it idempotently.

MongoDB is read and written without an event loop, so that Ctrl-C ends that at once.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports prints no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import bson
import msgspec
from bson.codec_options import CodecOptions
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from msgspec import Struct
from pymongo import MongoClient, WriteConcern
from pymongo.database import Database
from pymongo.errors import PyMongoError, ServerSelectionTimeoutError
from pymongo.read_concern import ReadConcern

from deploy.lock import locked
from deploy.nats import server
from deploy.nats.secrets import DATA, NATS_PID, Secrets
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import HistoryStatus
from services.contract.messages import Empty
from services.contract.version import COMMAND
from services.history.settings import DEFAULT_MONGODB, HistorySettings
from services.runtime import logs
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, InboxLimits, NoResponders
from services.runtime.settings import InvalidSetting, environment, load, parse

STREAMS = (
    f"KV_{subjects.KEYS_BUCKET}",
    f"KV_{subjects.REQUESTS_BUCKET}",
    f"KV_{subjects.SESSIONS_BUCKET}",
    subjects.HISTORY_STREAM,  # the last one, so that nothing else is ahead of it
)
DESCRIPTION, DATA_FILE = "backup.json", "stream.tar.s2"
MONGODB = "mongodb"
CHUNK_BYTES = 128 * 1024
UNREAD_CHUNKS = InboxLimits(messages=4096, bytes=64 * 1024**2)  # nats-server sends 8 MiB ahead
CONNECT_SECONDS = 5.0
POLL_INTERVAL = 0.1  # seconds
TIMEOUT = 60.0  # seconds without a reply
RETRY_SECONDS = 2.0
SELECT_MS = 5000
BATCH = 200  # documents
NO_SUCH_STREAM = 10059
NOT_CLUSTERED = 10074
NO_LEADER = 10008
CHILD = Path(__file__).with_name("child.py")

RawDatabase = Database[RawBSONDocument]
RAW = CodecOptions(document_class=RawBSONDocument)
ABOUT = {
    "backup": "Save what NATS and MongoDB store to a new folder, while the services run.",
    "restore": "Restore a backup into empty servers, while no service runs.",
}
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
        self._is_single = False  # the server, as far as known: it takes no replicas

    async def create(self) -> None:
        """Raises BackupError."""
        for stream in STREAMS:
            await self._create(stream)

    async def require_none(self) -> None:
        """Raises BackupError if the server has one of the streams."""
        for stream in STREAMS:
            if await self._exists(stream):
                raise BackupError(
                    f"The NATS server is not empty: it has the stream {stream}. Stop everything,"
                    f" and move its data away: that of `{COMMAND} up` is {DATA / 'jetstream'}."
                )

    async def restore(self) -> None:
        """Restore all streams. A single server gets those of a cluster. Raises BackupError."""
        for stream in STREAMS:
            if (self._folder / stream).is_dir():
                await self._restore(stream)

    async def _exists(self, stream: str) -> bool:
        """Wait until JetStream replies: a cluster that has just started has no leader yet."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                with suppress(TimeoutError):
                    reply = await self._call("INFO", stream, Empty(), RETRY_SECONDS)
                    if reply.error is None or reply.error.err_code == NO_SUCH_STREAM:
                        return reply.error is None
                    if reply.error.err_code != NO_LEADER:
                        raise BackupError(f"No JetStream: {reply.error.description}.")
                    await asyncio.sleep(POLL_INTERVAL)

    async def _create(self, stream: str) -> None:
        inbox = self._bus.new_inbox()
        async with self._bus.inbox(inbox) as chunks:
            reply = await self._call("SNAPSHOT", stream, SnapshotRequest(inbox))
            if reply.error and reply.error.err_code == NO_SUCH_STREAM:
                return print(f"{stream}: there is none")
            _require_success(stream, reply)
            own = self._folder / stream
            own.mkdir()
            with (own / DATA_FILE).open("wb") as file:
                while data := _chunk(stream, chunk := await chunks.next(TIMEOUT)):
                    file.write(data)
                    if chunk.reply:  # nats-server sends more
                        await self._bus.send(chunk.reply)
        description = msgspec.json.encode(StreamDescription(reply.config, reply.state))
        (own / DESCRIPTION).write_bytes(msgspec.json.format(description))
        print(f"{stream}: {reply.state['messages']:,} messages")

    async def _restore(self, stream: str) -> None:
        saved = _description(self._folder / stream)
        config = saved.config | ({"num_replicas": 1} if self._is_single else {})
        done = await self._send(stream, StreamDescription(config, saved.state))
        if done.error and str(NOT_CLUSTERED) in done.error.description and not self._is_single:
            self._is_single = True
            return await self._restore(stream)
        _require_success(stream, done)
        print(f"{stream}: {done.state['messages']:,} messages")

    async def _send(self, stream: str, description: StreamDescription) -> ApiReply:
        """Send the stream's data to nats-server. Return its last reply, or one with an error."""
        target = await self._call("RESTORE", stream, description)
        if target.error:
            return target
        inbox = self._bus.new_inbox()
        async with self._bus.inbox(inbox) as replies:
            async for chunk in _chunks(self._folder / stream / DATA_FILE):
                await self._bus.send(target.deliver_subject, chunk, inbox)
                answer = (await replies.next(TIMEOUT)).data or b"{}"
                if (reply := msgspec.json.decode(answer, type=ApiReply)).error:
                    return reply
        return reply

    async def _call(
        self, verb: str, stream: str, request: Struct, timeout: float = TIMEOUT
    ) -> ApiReply:
        subject = f"$JS.API.STREAM.{verb}.{stream}"
        return await self._bus.request(subject, request, ApiReply, timeout)


def _require_success(stream: str, reply: ApiReply) -> None:
    if reply.error:
        raise BackupError(f"nats-server refuses, for {stream}: {reply.error.description}.")


def _description(folder: Path) -> StreamDescription:
    """Return the description of a saved stream. Raises BackupError."""
    try:
        return msgspec.json.decode((folder / DESCRIPTION).read_bytes(), type=StreamDescription)
    except msgspec.MsgspecError as error:
        raise BackupError(f"{folder / DESCRIPTION} is damaged: {error}.") from error


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
    Insert the documents of all files, with the ids that they have. Raises BackupError,
    PyMongoError. History makes the indexes.
    """
    for path in sorted(folder.glob("*.bson")):
        count = 0
        for batch in _batches(path):
            database[path.stem].insert_many(batch)
            count += len(batch)
        print(f"{database.name}.{path.stem}: {count:,} documents")


def _batches(path: Path) -> Iterator[list[RawBSONDocument]]:
    """Yield the documents of a file. Raises BackupError."""
    with path.open("rb") as file:
        documents = bson.decode_file_iter(file, RAW)
        try:
            while batch := list(islice(documents, BATCH)):
                yield batch
        except BSONError as error:
            raise BackupError(f"{path} is damaged: {error}.") from error


def database_of(settings: HistorySettings) -> RawDatabase | None:
    """
    Return the database of the settings; None if MONGODB_URI is the default, and nothing is there.
    Raises BackupError, PyMongoError.
    """
    client: MongoClient[RawBSONDocument] = MongoClient(
        settings.mongodb_uri, document_class=RawBSONDocument, serverSelectionTimeoutMS=SELECT_MS
    )
    try:
        client.admin.command("ping")
    except ServerSelectionTimeoutError as error:
        if settings.mongodb_uri != DEFAULT_MONGODB:
            reason = str(error).partition(" (configured")[0]
            raise BackupError(f"The MongoDB of MONGODB_URI can't be reached: {reason}.") from error
        return None
    return client.get_database(
        settings.mongodb_database,
        write_concern=WriteConcern("majority"),
        read_concern=ReadConcern("majority"),
    )


def back_up(settings: HistorySettings, folder: Path) -> None:
    """
    Write a backup to a new folder, which appears once it is complete. Raises BackupError,
    PyMongoError, OSError.
    """
    if folder.exists():
        raise BackupError(f"{folder} exists: name a new folder.")
    database = database_of(settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=folder.parent) as temporary:
        partial = Path(temporary, folder.name)
        partial.mkdir()
        asyncio.run(_save_streams(settings, partial, has_database=database is not None))
        if database is not None:  # after the log: see above
            dump(database, partial / MONGODB / database.name)
        partial.rename(folder)


async def _save_streams(settings: HistorySettings, folder: Path, has_database: bool) -> None:
    """Raises BackupError, also if the backup would lack what history has archived."""
    async with _connected(settings) as bus:
        if not has_database and await _has_archive(bus):
            raise BackupError(
                "History has an archive in MongoDB, which a backup needs, and there is none at"
                f" {DEFAULT_MONGODB}: set MONGODB_URI."
            )
        await StreamBackup(bus, folder).create()
    if not has_database:
        print("no MongoDB: what NATS stores is all there is")


async def _has_archive(bus: Bus) -> bool:
    """Return whether a history process runs that archives in MongoDB."""
    with suppress(NoResponders, TimeoutError):
        empty, timeout = Empty(), CONNECT_SECONDS
        status = await bus.request(subjects.HISTORY_STATUS, empty, HistoryStatus, timeout)
        return status.database_expected
    return False


def restore(settings: HistorySettings, folder: Path) -> None:
    """
    Restore a backup into empty servers. Nothing is written if one is not empty, or a file of the
    backup can't be read. Raises BackupError, PyMongoError, OSError, InvalidSetting.
    """
    dumps = _require_backup(folder)
    database = database_of(settings) if dumps else None
    if dumps and database is None:
        raise BackupError("The backup has a dump of MongoDB: start MongoDB, or set MONGODB_URI.")
    if database is not None and database.list_collection_names():
        raise BackupError(f"The database {database.name} is not empty: drop it first.")
    with _running_server(settings) as settings:
        asyncio.run(_with_streams(settings, folder, StreamBackup.require_none))
        try:
            asyncio.run(_with_streams(settings, folder, StreamBackup.restore))
            if database is not None:
                load_dump(dumps[0], database)
        except BaseException:
            print("Not all was restored: empty both servers before you try again.", file=sys.stderr)
            raise


def _require_backup(folder: Path) -> list[Path]:
    """Return the dumps of MongoDB in a backup, one or none. Raises BackupError if it is damaged."""
    if not (folder / subjects.HISTORY_STREAM / DESCRIPTION).is_file():
        raise BackupError(f"{folder} is no backup: it has no {subjects.HISTORY_STREAM}.")
    for stream in STREAMS:
        own = folder / stream
        if own.is_dir() and _description(own) and not (own / DATA_FILE).is_file():
            raise BackupError(f"{folder} is damaged: {own / DATA_FILE} is missing.")
    for path in (folder / MONGODB).glob("*/*.bson"):
        for _ in _batches(path):
            pass
    return list((folder / MONGODB).glob("*"))


async def _with_streams(
    settings: HistorySettings, folder: Path, do: Callable[[StreamBackup], Awaitable[None]]
) -> None:
    async with _connected(settings) as bus:
        await do(StreamBackup(bus, folder))


@contextmanager
def _running_server(settings: HistorySettings) -> Iterator[HistorySettings]:
    """
    Run the nats-server of `just up`, unless another one is there. Yield the settings for it. Raises
    InvalidSetting if `just up` runs in this folder.
    """
    environ = environment()
    if environ.get("NATS_URL", "").strip() or server.is_taken(settings.nats_port):
        yield settings
        return
    with locked(DATA, NATS_PID) as lock, server.LOG.open("ab") as log:
        secrets = Secrets()
        secrets.ensure()
        child = subprocess.Popen(
            [sys.executable, str(CHILD), str(os.getpid()), *server.command(settings.nats_port)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
        )
        try:
            while not server.is_taken(settings.nats_port):
                if child.poll() is not None:
                    raise BackupError(f"nats-server does not start: its log is {server.LOG}.")
                time.sleep(POLL_INTERVAL)
            yield parse(HistorySettings, environ | secrets.settings("admin"))
        finally:
            child.terminate()
            child.wait()


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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logs.configure("backup")
    parser = argparse.ArgumentParser(prog=COMMAND)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in ABOUT.items():
        commands.add_parser(name, description=about).add_argument("folder", type=Path)
    options = parser.parse_args()
    os.umask(PRIVATE)
    settings = load(HistorySettings)
    run = back_up if options.command == "backup" else restore
    try:
        run(settings, options.folder)
    except (BackupError, ServiceError, InvalidSetting) as error:
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

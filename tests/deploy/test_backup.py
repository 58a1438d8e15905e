"""Backups of running servers, restored into empty ones, with real services."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import bson
import pytest
from pymongo import MongoClient

from deploy.backup import STREAMS, UNREAD_CHUNKS, BackupError, StreamBackup, _save_streams
from services.contract import subjects
from services.history.settings import HistorySettings
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.e2e.stack import NO_MONGO, Stack, plain_environment, running_stack
from tests.history.samples import (
    TENANT,
    append,
    context,
    exchange,
    history,
    ids,
    messages,
    sessions,
    status,
    until,
    until_status,
    uri_of,
)
from tests.secured import SecuredServer
from tests.servers import (
    ROOT,
    Server,
    free_port,
    mongod,
    nats_cluster,
    nats_server,
    running,
    wait_for,
)

SESSION = "backup"


@pytest.fixture(scope="module")
def mongo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(mongod(tmp_path_factory.mktemp("mongo"))) as server:
        yield server


def execute(
    command: str, folder: Path, environ: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "deploy.backup", command, str(folder)]
    environ = plain_environment() | environ
    return subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True)


def run(stack: Stack, command: str, folder: Path, **environ: str) -> str:
    """Run the command as the admin of NATS. Return what it prints."""
    done = execute(command, folder, stack.user("admin") | environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def restored_stack(folder: Path, backup: Path, **environ: str) -> Iterator[Stack]:
    """Run the services on empty servers into which the backup was restored."""
    stack = Stack(folder, NO_MONGO, False, SecuredServer(folder), **environ)
    with ExitStack() as cleanup:
        cleanup.callback(stack.http.close)
        for part in stack.parts:
            cleanup.callback(part.stop, signal.SIGKILL)
        stack.nats.start()
        assert "HISTORY: " in run(stack, "restore", backup, **environ)
        for part in stack.parts[1:]:
            part.start()
        stack.wait_until_ready()
        yield stack


def documents(mongo: Server, database: str) -> list[dict[str, Any]]:
    with MongoClient[dict[str, Any]](uri_of(mongo)) as client:
        return list(client[database]["exchanges"].find().sort("seq"))


def test_restored_backup_has_memory_titles_and_archive(tmp_path: Path, mongo: Server) -> None:
    uri = uri_of(mongo)
    (tmp_path / "before").mkdir()
    with running_stack(tmp_path / "before", uri, MONGODB_DATABASE="source") as stack:
        assert stack.chat("my name is Ada", SESSION).end["done"]
        stack.http.patch(f"/sessions/{SESSION}", json={"title": "Names"}).raise_for_status()
        wait_for(lambda: stack.status()["history"]["unarchived"] == 0, "the archive")
        said = stack.messages(SESSION)
        environ = {"MONGODB_URI": uri, "MONGODB_DATABASE": "source"}
        report = run(stack, "backup", tmp_path / "backup", **environ)
        assert "source.exchanges: 1 documents" in report
        archived = documents(mongo, "source")
    (tmp_path / "after").mkdir()
    target = {"MONGODB_URI": uri, "MONGODB_DATABASE": "target"}
    with restored_stack(tmp_path / "after", tmp_path / "backup", **target) as stack:
        assert documents(mongo, "target") == archived
        assert stack.messages(SESSION) == said
        assert stack.http.get("/sessions").json()["sessions"][0]["title"] == "Names"
        assert "Ada" in stack.chat("what is my name?", SESSION).text
        wait_for(lambda: len(documents(mongo, "target")) == 2, "the archive")
        assert stack.status()["history"]["warning"] is None
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "backup").rglob("*"))


class BackupUnderLoad(StreamBackup):
    """Stores an exchange of a new and one of an old session before each stream."""

    async def _create(self, stream: str) -> None:
        await append(self._bus, "old", exchange(f"before-{stream}"))
        await append(self._bus, stream, exchange(f"new-{stream}"))
        await asyncio.sleep(0.3)  # history's consumers process them
        await super()._create(stream)


@pytest.mark.parametrize(("size", "target"), [(1, 1), (3, 1), (3, 3)])
async def test_backup_under_load_is_consistent(tmp_path: Path, size: int, target: int) -> None:
    """`size` servers are backed up, and the backup is restored into `target` new ones."""
    with started(nats_servers(tmp_path, size)) as url:
        async with history(url, history_replicas=size), connected_to(url) as bus:
            await append(bus, "old", exchange("first"))
            await BackupUnderLoad(bus, tmp_path).create()
    (tmp_path / "empty").mkdir()
    with started(nats_servers(tmp_path / "empty", target)) as url:
        async with connected_to(url) as bus:
            backup = StreamBackup(bus, tmp_path)
            await backup.require_none()  # at once, when a cluster has no leader yet
            await backup.restore()
            assert await Stream(bus, subjects.HISTORY_STREAM).replicas() == target
            async with history(url):
                await until(lambda: has_sessions(bus, {"old", *STREAMS}))
                assert ids(await context(bus, "old")) == [
                    "first",
                    *map("before-{}".format, STREAMS),
                ]
                shown = ids(await messages(bus, "old"))
                assert shown == ["first", *map("before-{}".format, STREAMS)]
                assert (await status(bus)).warning is None


def nats_servers(folder: Path, size: int) -> list[Server]:
    return nats_cluster(folder, size) if size > 1 else [nats_server(folder)]


async def has_sessions(bus: Bus, expected: set[str]) -> bool:
    page = await sessions(bus, TENANT)
    return {session.id for session in page.sessions} == expected


@contextmanager
def started(servers: list[Server]) -> Iterator[str]:
    """Start them, kill them at the end, and yield their URL."""
    with ExitStack() as cleanup:
        for server in servers:
            cleanup.callback(server.stop, signal.SIGKILL)
            server.start()
        yield ",".join(f"nats://127.0.0.1:{server.port}" for server in servers)


def connected_to(url: str) -> AbstractAsyncContextManager[Bus]:
    return Bus.connect(url, "test", inbox_limits=UNREAD_CHUNKS)


@pytest.fixture(scope="module")
def small_backup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backup")

    async def back_up(url: str) -> None:
        async with connected_to(url) as bus:
            await Stream(bus, subjects.HISTORY_STREAM).ensure(subjects.HISTORY_LOG, 1 << 20, 0)
            await append(bus, "s", exchange("r"))
            await StreamBackup(bus, folder).create()

    with started([nats_server(folder)]) as url:
        asyncio.run(back_up(url))
    return folder


async def test_existing_stream_is_not_replaced(small_backup: Path, empty_server: str) -> None:
    async with connected_to(empty_server) as bus:
        await Stream(bus, subjects.HISTORY_STREAM).ensure(subjects.HISTORY_LOG, 1 << 20, 0)
        with pytest.raises(BackupError, match="not empty: it has the stream HISTORY. Stop every"):
            await StreamBackup(bus, small_backup).require_none()


async def test_damaged_backup_is_refused(
    small_backup: Path, tmp_path: Path, empty_server: str
) -> None:
    damaged = shutil.copytree(small_backup / "HISTORY", tmp_path / "HISTORY") / "stream.tar.s2"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    async with connected_to(empty_server) as bus:
        with pytest.raises(BackupError, match="nats-server refuses, for HISTORY"):
            await StreamBackup(bus, tmp_path).restore()
        assert not await Stream(bus, subjects.HISTORY_STREAM).exists()


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("KV_keys/backup.json", None, "KV_keys/backup.json can't be used: No such file"),
        ("HISTORY/backup.json", b'{"config": 3', "HISTORY/backup.json is damaged: "),
        ("HISTORY/stream.tar.s2", None, "HISTORY/stream.tar.s2 is missing"),
        ("mongodb/db/exchanges.bson", bson.encode({"a": 1})[:-1], "exchanges.bson is damaged: "),
    ],
)
def test_damaged_file_is_named_before_anything_is_written(
    small_backup: Path, tmp_path: Path, file: str, content: bytes | None, error: str
) -> None:
    backup = shutil.copytree(small_backup, tmp_path / "backup")
    damaged = backup / file
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.unlink(missing_ok=True)
    if content is not None:
        damaged.write_bytes(content)
    done = execute("restore", backup, {"NATS_URL": "nats://127.0.0.1:9", "MONGODB_URI": NO_MONGO})
    assert done.returncode == 1 and error in done.stderr
    assert "Traceback" not in done.stderr and "Not all was restored" not in done.stderr


def test_restore_that_breaks_off_says_what_to_do(small_backup: Path, tmp_path: Path) -> None:
    backup = shutil.copytree(small_backup, tmp_path / "backup")
    data = backup / "HISTORY/stream.tar.s2"
    data.write_bytes(data.read_bytes()[:-200])
    with started([nats_server(tmp_path)]) as url:
        done = execute("restore", backup, {"NATS_URL": url, "MONGODB_URI": NO_MONGO})
    assert done.returncode == 1 and "nats-server refuses, for HISTORY" in done.stderr
    assert "Not all was restored: empty both servers" in done.stderr


async def test_backup_without_the_archive_of_history_is_refused(
    tmp_path: Path, mongo: Server
) -> None:
    with started([nats_server(tmp_path)]) as url:
        settings = HistorySettings(nats_url=url)
        async with history(url, uri_of(mongo)), connected_to(url) as bus:
            await until_status(bus, database_connected=True)
            with pytest.raises(BackupError, match="has an archive in MongoDB, .* set MONGODB_URI"):
                await _save_streams(settings, tmp_path, has_database=False)
            await _save_streams(settings, tmp_path, has_database=True)


@pytest.fixture
def empty_server(tmp_path: Path) -> Iterator[str]:
    with started([nats_server(tmp_path)]) as url:
        yield url


def test_absent_server_is_named(tmp_path: Path) -> None:
    done = execute("backup", tmp_path / "new", {"NATS_URL": f"nats://127.0.0.1:{free_port()}"})
    assert done.returncode == 1 and "NATS can't be reached" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "folder", "error"),
    [
        ("backup", ".", "exists: name a new folder"),
        ("restore", ".", "is no backup: it has no HISTORY"),
        ("backup", "new", "The MongoDB of MONGODB_URI can't be reached: "),
    ],
)
def test_command_says_why_it_fails(
    tmp_path: Path, nats_url: str, command: str, folder: str, error: str
) -> None:
    done = execute(command, tmp_path / folder, {"NATS_URL": nats_url, "MONGODB_URI": NO_MONGO})
    assert done.returncode == 1 and error in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())

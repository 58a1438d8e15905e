"""
Where API keys come from at run time: the file EDGE_KEYS_FILE, and the bucket `keys`, which
`just keys` and `POST /keys` change. Every edge sees a change within a second.
"""

import logging
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from services.contract import subjects
from services.contract.version import COMMAND
from services.edge.keys import ApiKey, ApiKeys, Source, is_tenant, select
from services.runtime.bus import Bus
from services.runtime.settings import InvalidSetting
from services.runtime.streams import Bucket, BucketVersion, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


class KeyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a key file, in JSON."""

    keys: tuple[ApiKey, ...]


class KeyBucket:
    """
    The keys in the bucket `keys`, by their SHA-256. All methods raise StreamUnavailable if
    JetStream does not reply.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, subjects.KEYS_BUCKET)

    async def version(self) -> BucketVersion | None:
        """Return what each change alters; None if no key was ever added."""
        return await self._bucket.version()

    async def keys(self) -> list[ApiKey]:
        """Return all keys by name; a value that can't be read is skipped with a log line."""
        if not await self._bucket.exists():
            return []
        found = await self._bucket.readable()
        values = [_decode(name, value.data) for name, value in found.items()]
        return sorted(filter(None, values), key=lambda key: (key.name, str(key.created)))

    async def add(self, key: ApiKey) -> ApiKey:
        """
        Store the key. History creates the bucket, as an edge may have
        no permission to; without history it is created here.
        """
        if not await self._bucket.exists():
            await self._bucket.ensure(ttl=0)
        await self._bucket.put(key.sha256, msgspec.json.encode(key), 0)
        return key

    async def revoke(self, name_or_id: str) -> list[ApiKey]:
        """
        Delete the key with this id, or all keys of a name. Return them. Raises
        ServiceError(not_found).
        """
        revoked = select(await self.keys(), name_or_id)
        for key in revoked:
            await self._bucket.remove(key.sha256)
        return revoked


def _decode(name: str, data: bytes) -> ApiKey | None:
    if not data:  # revoked by an earlier version
        return None
    try:
        key = msgspec.json.decode(data, type=ApiKey)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.error("unreadable API key entry=%s: %s", name, error)
        return None
    return key if key.sha256 == name else None


def read_file(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Raises InvalidSetting with a message that contains no digest."""
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=KeyFile).keys
    except OSError as error:
        raise _invalid(path, f"{error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _invalid(path, str(error)) from error
    if bad := next((key.name for key in keys if not is_tenant(key.name)), None):
        raise _invalid(path, f"the name {bad!r} must not be `_`")
    if len({key.sha256 for key in keys}) < len(keys):
        raise _invalid(path, "two entries have the same sha256")
    return keys


def _invalid(path: Path, why: str) -> InvalidSetting:
    return InvalidSetting(
        f"EDGE_KEYS_FILE={path} can't be used: {why}. It must be JSON like"
        ' {"keys": [{"name": "ann", "sha256": "…"}]}.'
    )


@asynccontextmanager
async def watching_keys(
    bus: Bus, keys: ApiKeys, path: Path | None, fail: Fail
) -> AsyncIterator[None]:
    """
    Keep `keys` up to date during the body. `fail` ends the process. Raises InvalidSetting if the
    file can't be used. Until the bucket was read, requests without a key of another source are
    refused: nobody can know whether keys are needed.
    """
    watch = KeyWatch(bus, keys, path)
    await watch.start()
    async with SupervisedLoop("watching API keys", watch.step, fail).running(is_cancelled=True):
        yield


class FileVersion(NamedTuple):
    inode: int
    changed_at: int  # nanoseconds
    bytes: int


class KeyWatch:
    """Looks for changes of the file and of the bucket."""

    def __init__(self, bus: Bus, keys: ApiKeys, path: Path | None) -> None:
        self._bucket = KeyBucket(bus)
        self._keys = keys
        self._path = path
        self._file_version: FileVersion | None = None  # as it was read
        self._file_error = ""
        self._bucket_version: BucketVersion | None = None
        self._is_bucket_known = False

    async def start(self) -> None:
        """Read both sources. Raises InvalidSetting if the file can't be used."""
        if self._path:
            self._file_version = self._version_of_file()
            self._keys.replace("EDGE_KEYS_FILE", read_file(self._path), is_required=True)
        self._keys.set_known(False)
        await self._read_bucket()

    async def step(self) -> float:
        """Read what has changed. Return the seconds until the next look."""
        self._read_file()
        await self._read_bucket()
        return POLL_SECONDS

    def _read_file(self) -> None:
        """Read a changed file. One that can't be used leaves the keys as they are."""
        version = self._version_of_file()
        if self._path is None or version == self._file_version:
            return
        try:
            keys = read_file(self._path)
        except InvalidSetting as error:  # perhaps somebody is writing it
            if str(error) != self._file_error:
                log.error("the earlier API keys stay valid: %s", error)
            self._file_error = str(error)
            return
        self._file_version, self._file_error = version, ""
        log.info("API keys read file=%s keys=%d", self._path, len(keys))
        self._take("EDGE_KEYS_FILE", keys)

    def _version_of_file(self) -> FileVersion | None:
        try:
            stat = self._path.stat() if self._path else None
        except OSError:
            return None
        return stat and FileVersion(stat.st_ino, stat.st_mtime_ns, stat.st_size)

    async def _read_bucket(self) -> None:
        """Read a changed bucket. Without JetStream the keys stay as they are."""
        try:
            version = await self._bucket.version()
            if version != self._bucket_version:
                await self._take_bucket(version)
            self._keys.set_known(True)
            self._is_bucket_known = True
        except StreamUnavailable as error:
            log.debug("API keys can't be read: %s", error)

    async def _take_bucket(self, version: BucketVersion | None) -> None:
        """
        Take the keys of the bucket. If it was lost, keys stay required until a restart: an edge
        never opens to everybody by itself.
        """
        keys = await self._bucket.keys()
        log.info("API keys read revision=%s keys=%d", version and version.revision, len(keys))
        if version is None:
            log.error("the bucket of API keys is gone: add keys again with `%s keys add`", COMMAND)
        if self._is_bucket_known:
            self._take("just keys", keys)
        else:  # the first time: these are no changes
            self._keys.replace("just keys", keys, is_required=True)
        self._bucket_version = version

    def _take(self, source: Source, keys: Collection[ApiKey]) -> None:
        """Take the changed keys of a source, and log what has changed."""
        before = [key for each, key in self._keys.all() if each == source]
        for change, key in _changes(before, keys):
            log.info(
                "API key %s name=%s id=%s is_admin=%s source=%r",
                *(change, key.name, key.id, key.admin, source),
            )
        self._keys.replace(source, keys, is_required=True)


def _changes(before: Collection[ApiKey], after: Collection[ApiKey]) -> Iterator[tuple[str, ApiKey]]:
    """Yield what has happened to keys, and these keys."""
    old, new = ({key.sha256: key for key in keys} for keys in (before, after))
    yield from (("revoked", key) for digest, key in old.items() if digest not in new)
    yield from (("added", key) for digest, key in new.items() if digest not in old)
    kept = new.keys() & old.keys()
    yield from (("changed", new[digest]) for digest in kept if new[digest] != old[digest])

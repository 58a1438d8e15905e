"""
Keeps cached prompts over a restart: a worker that drains writes its host KV cache into a file, and
the next worker of the same model reads it.

The file shows what users wrote. So only this user may read it, the worker that takes it removes it
at once, and a worker that starts removes those that are older than MAX_AGE_SECONDS. A failed read
or write is only logged: the worker then prefills as without the file.
"""

import hashlib
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import uuid4

import msgspec
from msgspec import Struct

from services.contract import subjects
from services.inference.engine.backend import SequenceState
from services.inference.engine.kv_cache.checkpoints import Checkpoint
from services.inference.engine.kv_cache.host_cache import SavedState

MAX_AGE_SECONDS = 3600.0
MIN_FREE_BYTES = 2**30  # that stay free on the disk: NATS may store the log on it
MAX_HEAD_BYTES = 2**28  # of a head, which is read whole before its checksum is compared
CHUNK_BYTES = 2**22  # written between two looks at the clock
DIGEST_BYTES = 16
WRITTEN, TAKEN, PART = ".states", ".taken", ".part"

_LENGTH = struct.Struct("<I")

log = logging.getLogger(__name__)


class KeptAnswer(Struct, frozen=True, array_like=True):
    """An entry of the AnswerCache. `tokens` are 4 bytes each, in the order of this machine."""

    tenant: str
    name: str
    tokens: bytes
    first_exchange: str
    session_key: str


class KeptCache(NamedTuple):
    """
    What a worker leaves: states, most recently used first, and the tokens of answers, without which
    a prompt would not begin as they do. `binding` is what both depend on.
    """

    binding: str
    answers: Sequence[KeptAnswer]
    states: Iterable[SavedState]


class _FileHead(Struct, frozen=True, array_like=True):
    worker_id: str
    binding: str
    answers: tuple[KeptAnswer, ...]


class _StateHead(Struct, frozen=True, array_like=True):
    """`sizes` are the bytes of the state, then of its checkpoints, which have these `lengths`."""

    key: bytes
    owner: str
    is_truncatable: bool
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]


class _Damaged(Exception):
    """The file is damaged."""


class _Full(Exception):
    """The time is over, or the disk is nearly full."""


@dataclass(eq=False)
class TakenStates:
    """The KeptCache of a worker that has ended, in a file that is already unlinked."""

    worker_id: str
    binding: str
    answers: tuple[KeptAnswer, ...]
    _file: BinaryIO

    def read(self, make: Callable[[bytearray], SequenceState]) -> Iterator[SavedState]:
        """Yield the states, most recently used first, up to one that is damaged."""
        with self._file as file:
            try:
                while head := _read_part(file):
                    yield _read_state(file, msgspec.msgpack.decode(head, type=_StateHead), make)
            except (_Damaged, OSError, msgspec.MsgspecError) as error:
                log.warning("cached prompts left out: the rest of the file is damaged (%s)", error)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class StateFolder:
    """
    The folder of MODEL_CACHE_FOLDER. Workers of several models may share it: `model` selects the
    files that this worker takes.
    """

    path: Path
    model: str

    def take(self) -> TakenStates | None:
        """Take the newest file of a worker of this model out of the folder, if there is one."""
        for file in self._files():
            try:
                if taken := _take(file):
                    return taken
            except (_Damaged, OSError, msgspec.MsgspecError) as error:
                log.warning("cached prompts not read file=%s error=%s", file, error)
        return None

    def write(self, worker_id: str, kept: KeptCache, seconds: float) -> None:
        """
        Write the states in their order, as many as can be written in these seconds and leave
        MIN_FREE_BYTES. A process that dies meanwhile leaves a file that nobody reads.
        """
        part = self.path / f"{self._prefix}{uuid4().hex}{PART}"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(part, "wb", opener=_open_private) as file:
                head = _FileHead(worker_id, kept.binding, tuple(kept.answers))
                _write_part(file, msgspec.msgpack.encode(head))
                count = _write_states(file, kept.states, time.monotonic() + seconds)
                megabytes = file.tell() // 10**6
            part.rename(part.with_suffix(WRITTEN))
        except OSError as error:
            log.warning("cached prompts not written folder=%s error=%s", self.path, error)
            with suppress(OSError):
                part.unlink()
        else:
            log.info("cached prompts written states=%d megabytes=%d", count, megabytes)

    @property
    def _prefix(self) -> str:
        return f"{hashlib.sha256(self.model.encode()).hexdigest()[:16]}."

    def _files(self) -> list[Path]:
        """Remove the files of all models that are too old. Return this model's, newest first."""
        times: dict[Path, float] = {}
        with suppress(FileNotFoundError, NotADirectoryError):
            for file in self.path.iterdir():
                if file.suffix in (WRITTEN, TAKEN, PART) and (when := _time_of(file)):
                    times[file] = when
        own = [f for f in times if f.suffix == WRITTEN and f.name.startswith(self._prefix)]
        return sorted(own, key=lambda file: times[file], reverse=True)


def _time_of(file: Path) -> float | None:
    """Return when the file was written. Remove it, and return None, if that is too long ago."""
    try:
        when = file.stat().st_mtime
        if when >= time.time() - MAX_AGE_SECONDS:
            return when
        file.unlink()
    except FileNotFoundError:
        pass  # another worker was faster
    except OSError as error:
        log.warning("old cached prompts not removed file=%s error=%s", file, error)
    return None


def _take(file: Path) -> TakenStates | None:
    """Return None if another worker was faster. Raises _Damaged, OSError or MsgspecError."""
    taken = file.with_suffix(TAKEN)
    try:
        state = file.stat()
        if state.st_uid != os.geteuid() or state.st_mode & 0o077:
            raise _Damaged("it is not of this user alone, so anybody may have written it")
        file.rename(taken)
    except FileNotFoundError:
        return None
    opened = taken.open("rb")
    try:
        taken.unlink()
        head = msgspec.msgpack.decode(_read_part(opened), type=_FileHead)
        if not subjects.is_id(head.worker_id):
            raise _Damaged("it names no worker")
    except BaseException:
        opened.close()
        raise
    return TakenStates(head.worker_id, head.binding, head.answers, opened)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_states(file: BinaryIO, states: Iterable[SavedState], until: float) -> int:
    """Return how many states were written as a whole. Others are cut off again."""
    count, end = 0, file.tell()
    with suppress(_Full):
        for state in states:
            _write_state(file, state, until)
            count, end = count + 1, file.tell()
    file.seek(end)
    file.truncate()
    return count


def _write_state(file: BinaryIO, saved: SavedState, until: float) -> None:
    """Raises _Full."""
    parts = [saved.state.tobytes(), *(each.state.tobytes() for each in saved.checkpoints)]
    if shutil.disk_usage(file.name).free - sum(map(len, parts)) < MIN_FREE_BYTES:
        raise _Full
    lengths = tuple(each.length for each in saved.checkpoints)
    sizes = tuple(map(len, parts))
    head = _StateHead(saved.key, saved.owner, saved.is_truncatable, lengths, sizes)
    _write_part(file, msgspec.msgpack.encode(head))
    for part in parts:
        for start in range(0, len(part), CHUNK_BYTES):
            if time.monotonic() > until:
                raise _Full
            file.write(memoryview(part)[start : start + CHUNK_BYTES])
        file.write(_digest(part))


def _read_state(
    file: BinaryIO, head: _StateHead, make: Callable[[bytearray], SequenceState]
) -> SavedState:
    if len(head.sizes) != 1 + len(head.lengths):
        raise _Damaged("it has another number of checkpoints")
    state, *others = [make(_read_checked(file, size)) for size in head.sizes]
    checkpoints = tuple(map(Checkpoint, head.lengths, others))
    return SavedState(head.key, state, head.owner, head.is_truncatable, checkpoints)


def _write_part(file: BinaryIO, data: bytes) -> None:
    file.write(_LENGTH.pack(len(data)) + data + _digest(data))


def _read_part(file: BinaryIO) -> bytearray:
    """Return nothing at the end of the file."""
    length = file.read(_LENGTH.size)
    if not length:
        return bytearray()
    if len(length) < _LENGTH.size:
        raise _Damaged("it ends within a length")
    (size,) = _LENGTH.unpack(length)
    if size > MAX_HEAD_BYTES:
        raise _Damaged("a length is wrong")
    return _read_checked(file, size)


def _read_checked(file: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    file.readinto(data)  # type: ignore[attr-defined]  # of a file opened with "rb"
    if file.read(DIGEST_BYTES) != _digest(data):
        raise _Damaged("a checksum is wrong")
    return data


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

"""
Keeps cached prompts over a restart: a worker that drains writes its host KV cache into a file, and
the next worker of the same model reads it.

The file shows what users wrote, so only this user may read it, the worker that takes it removes it
at once, and one that starts removes those that are older than MAX_AGE_SECONDS. A file is worth no
more than the prefill that it saves: one that can't be written or read is a line in the log.
"""

import hashlib
import logging
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import msgspec
from msgspec import Struct

from services.contract import subjects
from services.inference.engine.backend import SequenceState
from services.inference.engine.kv_cache.checkpoints import Checkpoint
from services.inference.engine.kv_cache.host_cache import SavedState

MAX_AGE_SECONDS = 3600.0
MAX_HEAD_BYTES = 2**24  # of a key, which has four bytes a token
DIGEST_BYTES = 16
WRITTEN, OTHERS = ".states", (".taken", ".part")

_LENGTH = struct.Struct("<I")

log = logging.getLogger(__name__)


class _FileHead(Struct, frozen=True, array_like=True):
    worker_id: str
    binding: str


class _StateHead(Struct, frozen=True, array_like=True):
    """`sizes` are the bytes of the state, then of its checkpoints, which have these `lengths`."""

    key: bytes
    owner: str
    is_truncatable: bool
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]


class _Broken(Exception):
    """The file is not as it was written."""


@dataclass(eq=False)
class TakenStates:
    """The states of a worker that has ended, in a file that is in no folder any more."""

    worker_id: str
    binding: str
    _file: BinaryIO

    def read(self, make: Callable[[bytes], SequenceState]) -> Iterator[SavedState]:
        """Yield the states, most recently used first, up to one that is damaged."""
        with self._file as file:
            try:
                while head := _read_part(file):
                    yield _read_state(file, msgspec.msgpack.decode(head, type=_StateHead), make)
            except (_Broken, OSError, msgspec.MsgspecError) as error:
                log.warning("cached prompts left out: the rest of the file is damaged (%s)", error)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class StateFolder:
    """
    The folder of MODEL_CACHE_FOLDER. Workers of several models may share it: `model` tells whose
    files are whose.
    """

    path: Path
    model: str

    def take(self) -> TakenStates | None:
        """Take the newest file of a worker of this model out of the folder, if there is one."""
        try:
            for file in self._files():
                if taken := _take(file):
                    return taken
        except OSError as error:
            log.warning("cached prompts not read folder=%s error=%s", self.path, error)
        return None

    def write(
        self, worker_id: str, binding: str, states: Iterable[SavedState], seconds: float
    ) -> None:
        """
        Write the states in their order, as many as can be written in these seconds. `binding` is
        what they depend on. A process that dies meanwhile leaves a file that nobody reads.
        """
        until = time.monotonic() + seconds
        part = self.path / f"{self._prefix}{uuid4().hex}{OTHERS[1]}"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.touch(0o600)
            with part.open("wb") as file:
                _write_part(file, msgspec.msgpack.encode(_FileHead(worker_id, binding)))
                count = 0
                for state in states:
                    if time.monotonic() > until:
                        break
                    _write_state(file, state)
                    count += 1
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
        for file in self.path.glob("*"):
            with suppress(FileNotFoundError):  # another worker was faster
                if file.suffix in (WRITTEN, *OTHERS):
                    times[file] = file.stat().st_mtime
                    if times[file] < time.time() - MAX_AGE_SECONDS:
                        file.unlink()
                        del times[file]
        own = [f for f in times if f.suffix == WRITTEN and f.name.startswith(self._prefix)]
        return sorted(own, key=lambda file: times[file], reverse=True)


def _take(file: Path) -> TakenStates | None:
    """Return None if another worker was faster, or the file is none of ours."""
    taken = file.with_suffix(OTHERS[0])
    try:
        file.rename(taken)
        opened = taken.open("rb")
    except FileNotFoundError:
        return None
    taken.unlink()
    try:
        head = msgspec.msgpack.decode(_read_part(opened), type=_FileHead)
        if not subjects.is_id(head.worker_id):
            raise _Broken("it names no worker")
    except (_Broken, OSError, msgspec.MsgspecError) as error:
        log.warning("cached prompts not read: the file is damaged (%s)", error)
        opened.close()
        return None
    return TakenStates(head.worker_id, head.binding, opened)


def _write_state(file: BinaryIO, saved: SavedState) -> None:
    parts = [saved.state.tobytes(), *(each.state.tobytes() for each in saved.checkpoints)]
    lengths = tuple(each.length for each in saved.checkpoints)
    sizes = tuple(map(len, parts))
    head = _StateHead(saved.key, saved.owner, saved.is_truncatable, lengths, sizes)
    _write_part(file, msgspec.msgpack.encode(head))
    for part in parts:
        file.write(part)
        file.write(_digest(part))


def _read_state(
    file: BinaryIO, head: _StateHead, make: Callable[[bytes], SequenceState]
) -> SavedState:
    if len(head.sizes) != 1 + len(head.lengths):
        raise _Broken("it has another number of checkpoints")
    state, *others = [make(_read_checked(file, size)) for size in head.sizes]
    checkpoints = tuple(map(Checkpoint, head.lengths, others))
    return SavedState(head.key, state, head.owner, head.is_truncatable, checkpoints)


def _write_part(file: BinaryIO, data: bytes) -> None:
    file.write(_LENGTH.pack(len(data)) + data + _digest(data))


def _read_part(file: BinaryIO) -> bytes:
    """Return b"" at the end of the file."""
    if not (length := file.read(_LENGTH.size)):
        return b""
    (size,) = _LENGTH.unpack(length.ljust(_LENGTH.size, b"\xff"))
    if size > MAX_HEAD_BYTES:
        raise _Broken("a length is wrong")
    return _read_checked(file, size)


def _read_checked(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if file.read(DIGEST_BYTES) != _digest(data):
        raise _Broken("a checksum is wrong")
    return data


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

"""Cached prompts in a folder, between the end of a worker and the start of the next."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.checkpoints import Checkpoint
from services.inference.engine.kv_cache.host_cache import SavedState
from services.inference.state_folder import (
    MAX_AGE_SECONDS,
    MIN_FREE_BYTES,
    KeptAnswer,
    KeptCache,
    StateFolder,
)
from tests.inference.fake_backend import FakeBackend, FakeState

STATES = [
    SavedState(prefix.pack(0, [1, 2, 3]), FakeState((1, 2, 3), 0), "0.alice.c2Vzc2lvbg"),
    SavedState(
        prefix.pack(0, [4]), FakeState((4,), 0), "", False, (Checkpoint(1, FakeState((4,), 0)),)
    ),
]
ANSWERS = (KeptAnswer("alice", "r1", b"\1\0\0\0", "r0", "alice.c2Vzc2lvbg"),)
KEPT = KeptCache("binding", ANSWERS, STATES)


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "cache", "model/demo.gguf")


def write(folder: StateFolder, worker_id: str = "w1", seconds: float = 30) -> None:
    folder.write(worker_id, KEPT, seconds)


def read(folder: StateFolder) -> list[SavedState]:
    taken = folder.take()
    assert taken is not None
    return list(taken.read(FakeBackend({}).state))


def files(folder: StateFolder) -> list[Path]:
    return sorted(folder.path.glob("*"))


def test_states_are_read_as_they_were_written_and_only_once(folder: StateFolder) -> None:
    write(folder)
    taken = folder.take()
    assert taken is not None
    assert (taken.worker_id, taken.binding, taken.answers) == ("w1", "binding", ANSWERS)
    assert files(folder) == [], "nothing stays on the disk while it is read"
    assert list(taken.read(FakeBackend({}).state)) == STATES
    assert folder.take() is None


def test_only_this_user_may_read_them(folder: StateFolder) -> None:
    write(folder)
    assert folder.path.stat().st_mode & 0o077 == 0
    assert [file.stat().st_mode & 0o077 for file in files(folder)] == [0]


def test_each_worker_takes_the_newest_file_of_its_model(folder: StateFolder) -> None:
    for age, worker_id in ((20, "old"), (10, "new")):
        before = files(folder)
        write(folder, worker_id)
        (file,) = (each for each in files(folder) if each not in before)
        os.utime(file, times=(time.time() - age,) * 2)
    assert StateFolder(folder.path, "model/other.gguf").take() is None
    for worker_id in ("new", "old"):
        taken = folder.take()
        assert taken is not None and taken.worker_id == worker_id
        taken.close()
    assert folder.take() is None


def test_old_files_are_removed_whatever_their_state(folder: StateFolder) -> None:
    StateFolder(folder.path, "model/other.gguf").write("w", KEPT, 30)
    (folder.path / "begun.part").touch()
    (folder.path / "read.taken").touch()
    kept = folder.path / "notes.txt"
    kept.touch()
    for file in files(folder):
        os.utime(file, times=(time.time() - MAX_AGE_SECONDS - 1,) * 2)
    assert folder.take() is None
    assert files(folder) == [kept]


@pytest.mark.parametrize("cut", [-1, -20, -100])
def test_cut_file_gives_the_states_before_the_cut(folder: StateFolder, cut: int) -> None:
    write(folder)
    (file,) = files(folder)
    file.write_bytes(file.read_bytes()[:cut])
    assert read(folder) == STATES[:1]


def test_every_changed_byte_is_noticed(
    folder: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "services.inference")
    write(folder)
    (file,) = files(folder)
    data = file.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        taken = folder.take()
        states = list(taken.read(FakeBackend({}).state)) if taken else []
        assert states == STATES[: len(states)] and len(states) < len(STATES)


def test_worker_that_may_not_write_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    folder = StateFolder(tmp_path / "file" / "cache", "model/demo.gguf")
    write(folder)
    assert folder.take() is None
    assert "cached prompts not written" in caplog.text


def test_writing_ends_after_its_seconds_with_a_file_that_can_be_read(folder: StateFolder) -> None:
    def states() -> Iterator[SavedState]:
        yield STATES[0]
        time.sleep(0.1)  # longer than the writing may take
        yield STATES[1]

    folder.write("w1", KEPT._replace(states=states()), seconds=0.05)
    assert read(folder) == STATES[:1]


def test_nearly_full_disk_is_left_alone(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = MIN_FREE_BYTES + STATES[0].nbytes
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    write(folder)
    assert read(folder) == []


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_file_that_others_could_have_written_is_not_read(
    folder: StateFolder, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder)
    (file,) = files(folder)
    file.chmod(mode)
    assert folder.take() is None and "not of this user alone" in caplog.text


def test_unreadable_file_does_not_hide_others(folder: StateFolder) -> None:
    write(folder)
    (file,) = files(folder)
    garbage = file.with_name(file.name.replace(".states", "0.states"))
    garbage.write_bytes(b"\0" * 100)
    garbage.chmod(0o600)
    (file.parent / f"{file.name.partition('.')[0]}.folder.states").mkdir()
    assert read(folder) == STATES

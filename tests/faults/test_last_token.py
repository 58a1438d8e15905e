"""A worker that is killed between its last token and its Done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.stack import Process
from tests.faults import ledger
from tests.faults.arena import Arena, one
from tests.faults.load import Told
from tests.servers import wait_for


@contextmanager
def dying_worker(arena: Arena, dies: str, folder: Path) -> Iterator[Process]:
    environ = arena.stack.inference.environ | {"DIES": dies}
    dying = Process("tests.faults.dying_inference", 0, environ, folder)
    before = len(arena.stack.status()["workers"])
    dying.start()
    try:
        wait_for(lambda: len(ready(arena)) > before, "the dying worker")
        yield dying
    finally:
        dying.stop()


def ready(arena: Arena) -> list[object]:
    return [w for w in arena.stack.status()["workers"] if w["state"] == "ready"]


@pytest.mark.parametrize("dies", ["before", "after"])
def test_another_worker_ends_the_answer_which_is_stored_once(
    arena: Arena, tmp_path: Path, dies: str
) -> None:
    told: dict[str, Told] = {}
    with dying_worker(arena, dies, tmp_path) as dying:
        while not dying.has_died:
            session = f"last token {dies} {len(told)}"
            told[session] = one(arena.stack, session)
    assert all(each.is_acknowledged for each in told.values()), told
    acknowledged = {session: [each.request_id] for session, each in told.items()}
    assert ledger.check(arena.stack, arena.mongodb_uri, acknowledged) == len(told)


@pytest.mark.campaign
@pytest.mark.parametrize("dies, stored", [("before", 0), ("after", 1)])
def test_where_there_is_no_other_worker_the_client_is_told_that_it_is_lost(
    arena: Arena, tmp_path: Path, dies: str, stored: int
) -> None:
    session = f"alone {dies}"
    arena.stack.inference.stop()
    wait_for(lambda: not arena.stack.status()["workers"], "the end of the other worker's reports")
    try:
        with dying_worker(arena, dies, tmp_path):
            told = one(arena.stack, session)
    finally:
        arena.stack.inference.start()
        arena.stack.wait_until_ready()
    assert told.end["code"] == "worker_lost" and not told.is_acknowledged
    assert ledger.check(arena.stack, arena.mongodb_uri, {session: []}) == stored

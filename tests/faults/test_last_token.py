"""A worker is killed between its last token and its Done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.stack import Process
from tests.faults import consistency
from tests.faults.harness import Harness, ask_once
from tests.faults.load import Turn
from tests.servers import wait_for


@contextmanager
def dying_worker(harness: Harness, dies: str, folder: Path) -> Iterator[Process]:
    """Add a worker that dies after its first answer, `before` or `after` the log has it."""
    environ = harness.stack.inference.environ | {"DIES": dies}
    dying = Process("tests.faults.dying_inference", 0, environ, folder)
    before = len(harness.stack.status()["workers"])
    dying.start()
    try:
        wait_for(lambda: ready_workers(harness) > before, "the dying worker")
        yield dying
    finally:
        dying.stop()


def ready_workers(harness: Harness) -> int:
    return sum(w["state"] == "ready" for w in harness.stack.status()["workers"])


@pytest.mark.parametrize("dies", ["before", "after"])
def test_another_worker_finishes_the_answer_stored_once(
    harness: Harness, tmp_path: Path, dies: str
) -> None:
    turns: dict[str, Turn] = {}
    with dying_worker(harness, dies, tmp_path) as dying:
        while not dying.has_died:
            session = f"last token {dies} {len(turns)}"
            turns[session] = ask_once(harness.stack, session)
    assert all(turn.is_acknowledged for turn in turns.values()), turns
    acknowledged = {session: [turn.request_id] for session, turn in turns.items()}
    assert consistency.check(harness.stack, harness.mongodb_uri, acknowledged) == len(turns)


@pytest.mark.campaign
@pytest.mark.parametrize("dies, stored", [("before", 0), ("after", 1)])
def test_without_another_worker_the_client_gets_worker_lost(
    harness: Harness, tmp_path: Path, dies: str, stored: int
) -> None:
    session = f"alone {dies}"
    harness.stack.inference.stop()
    wait_for(lambda: not harness.stack.status()["workers"], "the end of the other worker's reports")
    try:
        with dying_worker(harness, dies, tmp_path):
            turn = ask_once(harness.stack, session)
    finally:
        harness.stack.inference.start()
        harness.stack.wait_until_ready()
    assert turn.end["code"] == "worker_lost" and not turn.is_acknowledged
    assert consistency.check(harness.stack, harness.mongodb_uri, {session: []}) == stored

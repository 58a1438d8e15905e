"""Parts die or freeze under load: every acknowledged exchange is stored, once."""

import asyncio
import signal
import time
from pathlib import Path

import httpx

from tests.e2e.stack import running_stack
from tests.faults import consistency
from tests.faults.harness import Harness, Size, ask_once
from tests.faults.load import Load, Turn, send_turn
from tests.servers import mongod, running

RETRY_SECONDS = 0.3  # after which a worker asks another history process
PAIRS = 50


def failures(load: Load) -> list[object]:
    return [turn.end for turn in load.all if not turn.is_acknowledged]


def test_kill_of_the_only_history_process(harness: Harness) -> None:
    load = harness.load("one history")
    with load.running():
        load.wait_for(0.2)
        harness.stack.history.stop(signal.SIGKILL)
        time.sleep(0.5)  # the outage
        harness.stack.history.start()
        harness.erase_doomed(load)
    assert failures(load) == []
    harness.check(load)


def test_kill_of_one_of_two_history_processes(harness: Harness) -> None:
    load = harness.load("two histories")
    with harness.second_history() as second, load.running():
        load.wait_for(0.2)
        second.stop(signal.SIGKILL)
        harness.erase_doomed(load)
        load.wait_for(0.8)
        second.start()
    assert failures(load) == []
    harness.check(load)


def test_freeze_of_one_of_two_history_processes(harness: Harness) -> None:
    load = harness.load("frozen history")
    with harness.second_history() as second, load.running():
        load.wait_for(0.2)
        second.signal(signal.SIGSTOP)
        harness.erase_doomed(load)
        load.wait_for(0.8)
        second.signal(signal.SIGCONT)
    assert failures(load) == []
    harness.check(load)


def test_frozen_history_process_costs_one_retry(harness: Harness) -> None:
    with harness.second_history() as second:
        second.signal(signal.SIGSTOP)
        turns = [ask_once(harness.stack, f"retry {n}") for n in range(16)]
        second.signal(signal.SIGCONT)
    assert all(turn.is_acknowledged for turn in turns)
    slow = [turn.seconds for turn in turns if turn.seconds >= RETRY_SECONDS]
    assert slow and min(slow) < 2 * RETRY_SECONDS, slow


def test_kill_of_the_nats_server(harness: Harness) -> None:
    load = harness.load("nats")
    with load.running():
        load.wait_for(0.2)
        harness.stack.nats.stop(signal.SIGKILL)
        time.sleep(0.5)  # the outage
        harness.stack.nats.start()
        harness.erase_doomed(load)
    harness.stack.wait_until_ready()
    harness.check(load)


def test_mongodb_that_starts_last_gets_everything(tmp_path: Path, size: Size) -> None:
    mongo = mongod(tmp_path)
    with running_stack(tmp_path, f"mongodb://127.0.0.1:{mongo.port}/") as stack:
        harness = Harness(stack, mongo, tmp_path, size)
        load = harness.load("no mongod yet")
        with load.running():
            load.wait_for(0.5)
            harness.erase_doomed(load)
        assert failures(load) == []
        with running(mongo):
            harness.check(load)


def test_two_turns_of_a_session_that_end_together_are_stored(harness: Harness) -> None:
    turns = asyncio.run(send_pairs(harness, "pairs"))
    assert all(turn.is_acknowledged for turn in turns)
    assert consistency.check(harness.stack, harness.mongodb_uri, {"pairs": []}) == 2 * PAIRS


async def send_pairs(harness: Harness, session: str) -> list[Turn]:
    turns: list[Turn] = []
    async with httpx.AsyncClient(base_url=harness.stack.http.base_url, timeout=30) as http:
        for _ in range(PAIRS):
            both = (send_turn(http, session, prompt) for prompt in ("hello", "goodbye"))
            turns += await asyncio.gather(*both)
    return turns


def test_kill_of_mongodb(harness: Harness) -> None:
    load = harness.load("mongod killed", seconds=harness.size.outage)
    with load.running():
        load.wait_for(0.1)
        harness.mongo.stop(signal.SIGKILL)
        time.sleep(harness.size.outage / 2)
        harness.erase_doomed(load)
        time.sleep(harness.size.outage / 2)
        harness.mongo.start()
    assert failures(load) == []
    harness.check(load)


def test_freeze_of_mongodb(harness: Harness) -> None:
    load = harness.load("mongod hangs", seconds=harness.size.outage / 3)
    with load.running():
        load.wait_for(0.1)
        harness.mongo.signal(signal.SIGSTOP)
        try:
            time.sleep(harness.size.outage / 3)
            harness.erase_doomed(load)
        finally:
            harness.mongo.signal(signal.SIGCONT)
    assert failures(load) == []
    harness.check(load)

"""Parts that die or freeze while many talk: what was acknowledged is there, once."""

import asyncio
import signal
import time
from pathlib import Path

import httpx

from tests.e2e.stack import running_stack
from tests.faults import ledger
from tests.faults.arena import Arena, Size, one
from tests.faults.load import Load, Told, ask
from tests.servers import mongod, running

RETRY = 0.3  # seconds after which a worker asks another history process


def failures(load: Load) -> list[object]:
    return [told.end for told in load.all if not told.is_acknowledged]


def test_the_only_history_process_is_killed_and_comes_back(arena: Arena) -> None:
    load = arena.load("one history")
    with load.running():
        load.wait_for(0.2)
        arena.stack.history.stop(signal.SIGKILL)
        time.sleep(0.5)
        arena.stack.history.start()
        arena.erase_doomed(load)
    assert failures(load) == []
    arena.check(load)


def test_one_of_two_history_processes_is_killed(arena: Arena) -> None:
    load = arena.load("two histories")
    with arena.second_history() as second, load.running():
        load.wait_for(0.2)
        second.stop(signal.SIGKILL)
        arena.erase_doomed(load)
        load.wait_for(0.8)
        second.start()
    assert failures(load) == []
    arena.check(load)


def test_one_of_two_history_processes_is_frozen(arena: Arena) -> None:
    load = arena.load("frozen history")
    with arena.second_history() as second, load.running():
        load.wait_for(0.2)
        second.signal(signal.SIGSTOP)
        arena.erase_doomed(load)
        load.wait_for(0.8)
        second.signal(signal.SIGCONT)
    assert failures(load) == []
    arena.check(load)


def test_a_frozen_history_process_costs_one_retry(arena: Arena) -> None:
    with arena.second_history() as second:
        second.signal(signal.SIGSTOP)
        answers = [one(arena.stack, f"retry {n}") for n in range(16)]
        second.signal(signal.SIGCONT)
    assert all(told.is_acknowledged for told in answers)
    slow = [told.seconds for told in answers if told.seconds >= RETRY]
    assert slow and min(slow) < 2 * RETRY, slow


def test_the_nats_server_is_killed_and_comes_back_on_its_store(arena: Arena) -> None:
    load = arena.load("nats")
    with load.running():
        load.wait_for(0.2)
        arena.stack.nats.stop(signal.SIGKILL)
        time.sleep(0.5)
        arena.stack.nats.start()
        arena.erase_doomed(load)
    arena.stack.wait_until_ready()
    arena.check(load)


def test_mongodb_comes_after_all_the_others(tmp_path: Path, size: Size) -> None:
    mongo = mongod(tmp_path)
    with running_stack(tmp_path, f"mongodb://127.0.0.1:{mongo.port}/") as stack:
        arena = Arena(stack, mongo, tmp_path, size)
        load = arena.load("no mongod yet")
        with load.running():
            load.wait_for(0.5)
            arena.erase_doomed(load)
        assert failures(load) == []
        with running(mongo):
            arena.check(load)


def test_two_turns_of_a_session_that_end_at_the_same_moment_are_both_kept(arena: Arena) -> None:
    pairs = asyncio.run(pairs_of_turns(arena, "pairs", 100))
    told = [told for pair in pairs for told in pair]
    assert all(each.is_acknowledged for each in told)
    assert ledger.check(arena.stack, arena.mongodb_uri, {"pairs": []}) == len(told)


async def pairs_of_turns(arena: Arena, session: str, count: int) -> list[tuple[Told, Told]]:
    async with httpx.AsyncClient(base_url=arena.stack.http.base_url, timeout=30) as http:
        return [
            await asyncio.gather(ask(http, session, "hello"), ask(http, session, "goodbye"))
            for _ in range(count)
        ]


def test_mongodb_is_killed_and_comes_back(arena: Arena) -> None:
    load = arena.load("mongod killed", lasting=arena.size.outage)
    with load.running():
        load.wait_for(0.1)
        arena.mongo.stop(signal.SIGKILL)
        time.sleep(arena.size.outage / 2)
        arena.erase_doomed(load)
        time.sleep(arena.size.outage / 2)
        arena.mongo.start()
    assert failures(load) == []
    arena.check(load)


def test_mongodb_hangs(arena: Arena) -> None:
    load = arena.load("mongod hangs", lasting=arena.size.outage / 3)
    with load.running():
        load.wait_for(0.1)
        arena.mongo.signal(signal.SIGSTOP)
        try:
            time.sleep(arena.size.outage / 3)
            arena.erase_doomed(load)
        finally:
            arena.mongo.signal(signal.SIGCONT)
    assert failures(load) == []
    arena.check(load)

"""Parts that die or freeze while many talk: what was acknowledged is there, once."""

import asyncio
import signal
import time

import httpx

from tests.faults.arena import Arena
from tests.faults.load import Load, Told, ask

RETRY = 0.3  # seconds after which a worker asks another history process


def failures(load: Load) -> list[object]:
    return [told.end for told in load.all if not told.is_acknowledged]


def test_the_only_history_process_is_killed_and_comes_back(arena: Arena) -> None:
    load = arena.load("one history")
    with load.running():
        load.wait_for(0.2)
        arena.up.history.stop(signal.SIGKILL)
        time.sleep(0.5)
        arena.up.history.start()
    assert failures(load) == []
    arena.check(load)


def test_one_of_two_history_processes_is_killed(arena: Arena) -> None:
    load = arena.load("two histories")
    with arena.second_history() as second, load.running():
        load.wait_for(0.2)
        second.stop(signal.SIGKILL)
        load.wait_for(0.8)
        second.start()
    assert failures(load) == []
    arena.check(load)


def test_one_of_two_history_processes_is_frozen(arena: Arena) -> None:
    load = arena.load("frozen history")
    with arena.second_history() as second, load.running():
        load.wait_for(0.2)
        second.signal(signal.SIGSTOP)
        load.wait_for(0.8)
        second.signal(signal.SIGCONT)
    assert failures(load) == []
    arena.check(load)


def test_a_frozen_history_process_costs_one_retry(arena: Arena) -> None:
    with arena.second_history() as second:
        second.signal(signal.SIGSTOP)
        answers = [asyncio.run(one(arena, f"retry {n}")) for n in range(8)]
        second.signal(signal.SIGCONT)
    assert all(told.is_acknowledged for told in answers)
    slow = [told.seconds for told in answers if told.seconds >= RETRY]
    assert slow and max(slow) < 2 * RETRY, slow


async def one(arena: Arena, session: str) -> Told:
    async with httpx.AsyncClient(base_url=arena.up.http.base_url) as http:
        return await ask(http, session, "hello")


def test_the_nats_server_is_killed_and_comes_back_on_its_store(arena: Arena) -> None:
    load = arena.load("nats")
    with load.running():
        load.wait_for(0.2)
        arena.up.nats.stop(signal.SIGKILL)
        time.sleep(0.5)
        arena.up.nats.start()
    arena.up.wait_until_ready()
    arena.check(load)


def test_mongodb_is_killed_and_comes_back(arena: Arena) -> None:
    load = arena.load("mongod killed", lasting=arena.size.outage)
    with load.running():
        load.wait_for(0.1)
        arena.mongo.stop(signal.SIGKILL)
        time.sleep(arena.size.outage)
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
        finally:
            arena.mongo.signal(signal.SIGCONT)
    assert failures(load) == []
    arena.check(load)

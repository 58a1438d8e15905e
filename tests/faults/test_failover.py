"""Processes killed and frozen in the middle of an answer: it comes whole, and is stored once."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import httpx
import nats
import pytest

from services.client.failover import DEFAULT_POLICY
from services.contract import subjects
from tests.faults.pair import AFTER, Heard, Pair, events, pair, second_edge
from tests.faults.wire import wire
from tests.servers import wait_for

SEEDED = {"temperature": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("two")) as two:
        yield two


@pytest.fixture(scope="module")
def undisturbed(two: Pair) -> Heard:
    return two.ask("undisturbed")


def check_stored_once(two: Pair, session: str, heard: Heard) -> None:
    """With the text that its client saw."""
    (message,) = two.stack.messages(session)
    assert message["model_response"] == heard.text
    assert message["id"] == heard.end["request_id"]


@pytest.mark.parametrize("sampling", [{}, SEEDED], ids=["greedy", "seeded"])
def test_an_answer_goes_on_after_its_workers_death_without_waiting_for_its_silence(
    two: Pair, sampling: dict[str, Any]
) -> None:
    whole = two.ask(f"whole {sampling}", **sampling)
    killed = []

    def kill(_: Heard) -> None:
        killed.append(two.answering())
        killed[0].stop(signal.SIGKILL)

    heard = two.ask(f"killed {sampling}", kill, **sampling)
    two.start(killed[0])
    assert heard.text == whole.text
    assert heard.end["done"] and heard.end["stored"] == "log"
    assert heard.end["usage"] == whole.end["usage"] | {
        "cached_tokens": heard.end["usage"]["cached_tokens"]
    }
    assert heard.longest_gap < DEFAULT_POLICY.lost_seconds
    check_stored_once(two, f"killed {sampling}", heard)


def test_an_answer_goes_on_after_its_workers_freeze_and_the_frozen_one_does_no_harm(
    two: Pair, undisturbed: Heard
) -> None:
    frozen = []

    def freeze(_: Heard) -> None:
        frozen.append(two.answering())
        frozen[0].signal(signal.SIGSTOP)

    try:
        heard = two.ask("frozen", freeze)
    finally:
        frozen[0].signal(signal.SIGCONT)
    assert heard.text == undisturbed.text
    assert heard.end["done"] and heard.longest_gap < 2 * DEFAULT_POLICY.lost_seconds
    wait_for(lambda: len(two.stack.status()["workers"]) == 2, "the frozen one's report")
    wait_for(lambda: two.stack.running() == 0, "its slot")
    time.sleep(0.5)  # in which it could store what it had
    check_stored_once(two, "frozen", heard)


@pytest.mark.parametrize("seconds", [2, 3.5], ids=["goes on itself", "has dropped it"])
def test_an_answer_survives_a_freeze_of_its_worker_that_nobody_noticed(
    two: Pair, undisturbed: Heard, seconds: float
) -> None:
    def freeze(_: Heard) -> None:
        worker = two.answering()
        worker.signal(signal.SIGSTOP)
        time.sleep(seconds)
        worker.signal(signal.SIGCONT)

    heard = two.ask(f"frozen for {seconds}", freeze)
    assert heard.text == undisturbed.text and heard.end["stored"] == "log"
    check_stored_once(two, f"frozen for {seconds}", heard)


def test_an_answer_goes_on_at_another_edge_after_its_own_was_killed(
    two: Pair, undisturbed: Heard, tmp_path: Path
) -> None:
    with second_edge(two.stack, tmp_path) as edge:
        heard = Heard()
        body = {"prompt": "count to 50", "session_id": "edge", "temperature": 0}
        url = f"http://127.0.0.1:{edge.port}"
        with pytest.raises(httpx.RemoteProtocolError):
            with httpx.stream("POST", f"{url}/chat", json=body) as answer:
                heard.address = answer.headers["content-location"]
                for event_id, event in events(answer):
                    heard.take(event_id, event)
                    if len(heard.text) >= AFTER:
                        edge.stop(signal.SIGKILL)
    last_id = {"Last-Event-ID": str(len(heard.text))}
    with two.stack.http.stream("GET", heard.address, headers=last_id) as answer:
        for event_id, event in events(answer):
            heard.take(event_id, event)
    assert heard.text == undisturbed.text
    check_stored_once(two, "edge", heard)


@pytest.mark.parametrize("seconds", [0.3, 4.5], ids=["a moment", "long"])
def test_an_answer_goes_on_after_nats_was_away(
    two: Pair, undisturbed: Heard, seconds: float
) -> None:
    """For longer than 3 s: then its worker has dropped it, and it is asked for again."""

    def restart(_: Heard) -> None:
        two.stack.nats.stop(signal.SIGKILL)
        time.sleep(seconds)
        two.stack.nats.start()

    heard = two.ask(f"nats away for {seconds}", restart)
    assert heard.text == undisturbed.text and heard.end["stored"] == "log"
    two.stack.wait_until_ready()
    check_stored_once(two, f"nats away for {seconds}", heard)


def test_a_chat_in_the_terminal_goes_on_by_itself(two: Pair) -> None:
    command = [sys.executable, "-m", "services.client", "--session", "terminal"]
    environ = two.stack.edge.environ
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environ) as chat:
        assert chat.stdin and chat.stdout
        chat.stdin.write("count to 50\n")
        chat.stdin.flush()
        worker = two.answering()
        worker.stop(signal.SIGKILL)
        chat.stdin.close()
        told = chat.stdout.read()
    two.start(worker)
    (message,) = two.stack.messages("terminal")
    assert told.endswith(f"> {message['model_response']}\n> \n")


def test_an_answer_whose_only_reader_died_is_cancelled_after_its_grace(two: Pair) -> None:
    """A native caller that asks for none gets 2 s."""

    async def ask_and_die() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{two.stack.nats.port}")
        inbox = client.new_inbox()
        events = await client.subscribe(inbox)
        body = {"prompt": "count to 50", "session_id": "gone", "temperature": 0}
        await client.publish("chat.request", json.dumps(body).encode(), reply=inbox)
        while json.loads((await events.next_msg(5)).data)["type"] != "token":
            pass
        await client.close()

    asyncio.run(ask_and_die())
    began = time.monotonic()
    wait_for(lambda: bool(two.stack.messages("gone")), "the exchange", seconds=6)
    assert time.monotonic() - began > 1.5
    (message,) = two.stack.messages("gone")
    assert message["finish_reason"] == "cancelled"
    assert 0 < len(message["model_response"]) < 150


@pytest.mark.parametrize("part", ["edge", "inference"])
def test_an_answer_survives_that_nats_cuts_off_a_consumer_that_is_too_slow(
    two: Pair, undisturbed: Heard, part: str
) -> None:
    def times_cut_off() -> int:
        lines = two.stack.nats.log.read_text().splitlines()
        return sum("Slow Consumer" in line and f":{part}" in line for line in lines)

    def fall_behind(_: Heard) -> None:
        slow, heard_by_it = two.stack.edge, subjects.report("x")
        if part == "inference":
            slow = two.answering()
            (worker_id,) = (key for key, worker in two.workers.items() if worker is slow)
            heard_by_it = subjects.worker_request(worker_id, subjects.OPEN_TENANT)
        before = times_cut_off()
        slow.signal(signal.SIGSTOP)
        asyncio.run(flood(two, heard_by_it))
        wait_for(lambda: times_cut_off() > before, "the cut")
        slow.signal(signal.SIGCONT)

    heard = two.ask(f"{part} is slow", fall_behind)
    assert heard.text == undisturbed.text and heard.end["stored"] == "log"
    check_stored_once(two, f"{part} is slow", heard)


async def flood(two: Pair, subject: str) -> None:
    """More than the 64 MiB that nats-server keeps for one client."""
    client = await nats.connect(f"nats://127.0.0.1:{two.stack.nats.port}")
    for _ in range(100):
        await client.publish(subject, bytes(1_000_000))
        await client.flush()
    await client.close()


@pytest.mark.parametrize(
    ("seconds", "within"),
    [(5, 2 * DEFAULT_POLICY.lost_seconds), (0, DEFAULT_POLICY.lost_seconds)],
    ids=["dead for 5 s", "cut"],
)
def test_an_answer_survives_its_workers_being_cut_off(
    two: Pair, undisturbed: Heard, seconds: float, within: float
) -> None:
    with wire(two.stack.nats.port) as line:
        third = two.add_worker(NATS_URL=f"nats://127.0.0.1:{line.port}")
        session = two.session_of(third, f"cut off for {seconds}")

        def cut_off(_: Heard) -> None:
            if not seconds:
                return line.cut()
            line.go_dead()
            threading.Timer(seconds, line.live).start()

        heard = two.ask(session, cut_off)
        assert heard.text == undisturbed.text and heard.end["stored"] == "log"
        assert (3 if seconds else 0) < heard.longest_gap < within
        wait_for(lambda: two.stack.running() == 0 and line.is_alive, "its slot")
        time.sleep(1.5)  # in which it could store what it had
        assert third.stop(signal.SIGTERM) == 0
    check_stored_once(two, session, heard)

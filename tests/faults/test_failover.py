"""A process dies or freezes in the middle of an answer: it arrives whole and is stored once."""

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
from tests.faults.tcp_proxy import tcp_proxy
from tests.faults.worker_pair import (
    DISTURB_AFTER,
    StreamedAnswer,
    WorkerPair,
    events,
    running_pair,
    second_edge,
)
from tests.servers import wait_for

SEEDED = {"temperature": 0.9, "seed": 7}
MIROSTAT = SEEDED | {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPair]:
    """Shared: each test uses sessions of its own and leaves two workers running."""
    with running_pair(tmp_path_factory.mktemp("pair")) as pair:
        yield pair


@pytest.fixture(scope="module")
def undisturbed(pair: WorkerPair) -> StreamedAnswer:
    return pair.ask("undisturbed")


def check_stored_once(pair: WorkerPair, session: str, answer: StreamedAnswer) -> None:
    """Check that the session has this answer alone, with the text that the client got."""
    (message,) = pair.stack.messages(session)
    assert message["model_response"] == answer.text
    assert message["id"] == answer.end["request_id"]


@pytest.mark.parametrize("sampling", [{}, SEEDED, MIROSTAT], ids=["greedy", "seeded", "mirostat"])
def test_kill_of_the_worker_resumes_without_waiting_for_silence(
    pair: WorkerPair, sampling: dict[str, Any]
) -> None:
    whole = pair.ask(f"whole {sampling}", **sampling)
    killed = []

    def kill(_: StreamedAnswer) -> None:
        killed.append(pair.answering())
        killed[0].stop(signal.SIGKILL)

    answer = pair.ask(f"killed {sampling}", kill, **sampling)
    pair.start(killed[0])
    assert answer.text == whole.text
    assert answer.end["done"] and answer.end["stored"] == "log"
    assert answer.end["usage"] == whole.end["usage"] | {
        "cached_tokens": answer.end["usage"]["cached_tokens"]
    }
    assert answer.longest_gap < DEFAULT_POLICY.lost_seconds
    check_stored_once(pair, f"killed {sampling}", answer)


def test_freeze_of_the_worker_resumes_and_it_stores_nothing(
    pair: WorkerPair, undisturbed: StreamedAnswer
) -> None:
    frozen = []

    def freeze(_: StreamedAnswer) -> None:
        frozen.append(pair.answering())
        frozen[0].signal(signal.SIGSTOP)

    try:
        answer = pair.ask("frozen", freeze)
    finally:
        frozen[0].signal(signal.SIGCONT)
    assert answer.text == undisturbed.text
    assert answer.end["done"] and answer.longest_gap < 2 * DEFAULT_POLICY.lost_seconds
    wait_for(lambda: len(pair.stack.status()["workers"]) == 2, "the frozen worker's report")
    wait_for(lambda: pair.stack.running() == 0, "its free slot")
    time.sleep(0.5)  # in which it could store its answer
    check_stored_once(pair, "frozen", answer)


@pytest.mark.parametrize("seconds", [2, 3.5])
def test_freeze_of_the_worker_that_no_reader_notices(
    pair: WorkerPair, undisturbed: StreamedAnswer, seconds: float
) -> None:
    def freeze(_: StreamedAnswer) -> None:
        worker = pair.answering()
        worker.signal(signal.SIGSTOP)
        time.sleep(seconds)
        worker.signal(signal.SIGCONT)

    answer = pair.ask(f"frozen for {seconds}", freeze)
    assert answer.text == undisturbed.text and answer.end["stored"] == "log"
    check_stored_once(pair, f"frozen for {seconds}", answer)


def test_kill_of_the_edge_lets_another_edge_resume(
    pair: WorkerPair, undisturbed: StreamedAnswer, tmp_path: Path
) -> None:
    with second_edge(pair.stack, tmp_path) as edge:
        answer = StreamedAnswer()
        body = {"prompt": "count to 50", "session_id": "edge", "temperature": 0}
        url = f"http://127.0.0.1:{edge.port}"
        with pytest.raises(httpx.RemoteProtocolError):
            with httpx.stream("POST", f"{url}/chat", json=body) as response:
                answer.address = response.headers["content-location"]
                for event_id, event in events(response):
                    answer.take(event_id, event)
                    if len(answer.text) >= DISTURB_AFTER:
                        edge.stop(signal.SIGKILL)
    last_id = {"Last-Event-ID": str(len(answer.text))}
    with pair.stack.http.stream("GET", answer.address, headers=last_id) as response:
        for event_id, event in events(response):
            answer.take(event_id, event)
    assert answer.text == undisturbed.text
    check_stored_once(pair, "edge", answer)


@pytest.mark.parametrize("seconds", [0.3, 4.5], ids=["a moment", "long"])
def test_nats_outage(pair: WorkerPair, undisturbed: StreamedAnswer, seconds: float) -> None:
    """After more than 3 s the worker has dropped the answer, and the edge requests it again."""

    def restart(_: StreamedAnswer) -> None:
        pair.stack.nats.stop(signal.SIGKILL)
        time.sleep(seconds)
        pair.stack.nats.start()

    answer = pair.ask(f"nats away for {seconds}", restart)
    assert answer.text == undisturbed.text and answer.end["stored"] == "log"
    pair.stack.wait_until_ready()
    check_stored_once(pair, f"nats away for {seconds}", answer)


def test_terminal_chat_resumes_by_itself(pair: WorkerPair) -> None:
    command = [sys.executable, "-m", "services.terminal", "--session", "terminal"]
    environ = pair.stack.edge.environ | pair.stack.user("client")
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environ) as chat:
        assert chat.stdin and chat.stdout
        chat.stdin.write("count to 50\n")
        chat.stdin.flush()
        worker = pair.answering()
        worker.stop(signal.SIGKILL)
        chat.stdin.close()
        output = chat.stdout.read()
    pair.start(worker)
    (message,) = pair.stack.messages("terminal")
    assert output == f"{message['model_response']}\n"


def test_answer_without_a_reader_is_cancelled_after_its_grace(pair: WorkerPair) -> None:
    """A NATS client that asks for no other grace gets 2 s."""

    async def ask_and_die() -> None:
        user = pair.stack.user("client")
        client = await nats.connect(
            user["NATS_URL"],
            nkeys_seed=user["NATS_CREDS"],
            inbox_prefix=user["NATS_INBOX_PREFIX"],
        )
        inbox = client.new_inbox()
        replies = await client.subscribe(inbox)
        body = {"prompt": "count to 50", "session_id": "gone", "temperature": 0}
        await client.publish("chat.request", json.dumps(body).encode(), reply=inbox)
        while json.loads((await replies.next_msg(5)).data)["type"] != "token":
            pass
        await client.close()

    asyncio.run(ask_and_die())
    began = time.monotonic()
    wait_for(lambda: bool(pair.stack.messages("gone")), "the exchange", seconds=6)
    assert time.monotonic() - began > 1.5
    (message,) = pair.stack.messages("gone")
    assert message["finish_reason"] == "cancelled"
    assert 0 < len(message["model_response"]) < 150


@pytest.mark.parametrize("part", ["edge", "inference"])
def test_slow_consumer_that_nats_disconnects(
    pair: WorkerPair, undisturbed: StreamedAnswer, part: str
) -> None:
    def disconnects() -> int:
        lines = pair.stack.nats.log.read_text().splitlines()
        return sum("Slow Consumer" in line and f":{part}" in line for line in lines)

    def fall_behind(_: StreamedAnswer) -> None:
        slow, subscribed = pair.stack.edge, subjects.report("x")
        if part == "inference":
            slow = pair.answering()
            (worker_id,) = (key for key, worker in pair.workers.items() if worker is slow)
            subscribed = subjects.worker_request(worker_id, subjects.OPEN_TENANT)
        before = disconnects()
        slow.signal(signal.SIGSTOP)
        asyncio.run(flood(pair, subscribed))
        wait_for(lambda: disconnects() > before, "the disconnect")
        slow.signal(signal.SIGCONT)

    answer = pair.ask(f"{part} is slow", fall_behind)
    assert answer.text == undisturbed.text and answer.end["stored"] == "log"
    check_stored_once(pair, f"{part} is slow", answer)


async def flood(pair: WorkerPair, subject: str) -> None:
    """Publish more than the 64 MiB that nats-server buffers for a client."""
    admin = pair.stack.user("admin")
    client = await nats.connect(admin["NATS_URL"], nkeys_seed=admin["NATS_CREDS"])
    for _ in range(100):
        await client.publish(subject, bytes(1_000_000))
        await client.flush()
    await client.close()


@pytest.mark.parametrize(
    ("seconds", "max_gap"),
    [(5, 2 * DEFAULT_POLICY.lost_seconds), (0, DEFAULT_POLICY.lost_seconds)],
    ids=["stalled for 5 s", "cut"],
)
def test_worker_loses_its_connection_to_nats(
    pair: WorkerPair, undisturbed: StreamedAnswer, seconds: float, max_gap: float
) -> None:
    with tcp_proxy(pair.stack.nats.port) as proxy:
        third = pair.add_worker(NATS_URL=f"nats://127.0.0.1:{proxy.port}")
        session = pair.session_of(third, f"disconnected for {seconds}")

        def disconnect(_: StreamedAnswer) -> None:
            if not seconds:
                return proxy.cut()
            proxy.stall()
            threading.Timer(seconds, proxy.resume).start()

        answer = pair.ask(session, disconnect)
        assert answer.text == undisturbed.text and answer.end["stored"] == "log"
        assert (3 if seconds else 0) < answer.longest_gap < max_gap
        wait_for(lambda: pair.stack.running() == 0 and not proxy.is_stalled, "its free slot")
        time.sleep(1.5)  # in which it could store its answer
        assert third.stop(signal.SIGTERM) == 0
    check_stored_once(pair, session, answer)

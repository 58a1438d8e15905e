"""The log or the disk is full: chats are rejected, and acknowledged exchanges are kept."""

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from services.contract import subjects
from tests.e2e.stack import Stack, running_stack
from tests.faults import consistency
from tests.faults.harness import ask_once
from tests.faults.load import TIMEOUT_SECONDS, Turn, send_turn
from tests.faults.small_disk import small_disk
from tests.servers import NATS_VERSIONS, NatsVersion, mongod, nats_server, running, wait_for

# Some 3,000 exchanges. Workers keep contexts up to 80 %, and trust them for 2 s: the 15 % from
# there to the rejection must be more than 2 s bring.
MAX_LOG_BYTES = 3 * 1024 * 1024
SESSIONS = 4  # that send turns at once
LONG_PROMPT = "hello " * 100


async def limit_log(stack: Stack) -> None:
    async with stack.connect("operator") as bus:
        config = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
        config.max_bytes = MAX_LOG_BYTES
        await bus.jetstream.update_stream(config)


async def send_until_rejected(stack: Stack, session: str) -> list[Turn]:
    """
    Send turns until one is rejected: with a 503, or where NATS hangs with an event, since the
    worker retries the log for some seconds while the client waits.
    """
    turns: list[Turn] = []
    async with httpx.AsyncClient(base_url=stack.http.base_url, timeout=TIMEOUT_SECONDS) as http:
        while not turns or not (
            turns[-1].is_rejected or turns[-1].end.get("code") == "history_unavailable"
        ):
            turns.append(await send_turn(http, session, "hello"))
    return turns


async def all_until_rejected(stack: Stack, sessions: list[str]) -> dict[str, list[Turn]]:
    turns = await asyncio.gather(*(send_until_rejected(stack, session) for session in sessions))
    return dict(zip(sessions, turns, strict=True))


def test_full_log_rejects_chats_until_mongodb_is_back(tmp_path: Path) -> None:
    mongo = mongod(tmp_path)
    uri = f"mongodb://127.0.0.1:{mongo.port}/"
    sessions = [f"s{n}" for n in range(SESSIONS)]
    with running(mongo), running_stack(tmp_path, uri) as stack:
        ask_once(stack, "first")  # so that the log has something for MongoDB
        consistency.wait_for_archive(stack)
        asyncio.run(limit_log(stack))
        mongo.stop(signal.SIGKILL)
        turns = asyncio.run(all_until_rejected(stack, sessions))
        check_rejections(turns)
        assert "MongoDB" in stack.status()["history"]["warning"]
        mongo.start()
        wait_for(lambda: ask_once(stack, "after").is_acknowledged, "a chat")
        consistency.wait_for_archive(stack)
        check_archive_and_contexts(stack, uri, turns)


def check_rejections(turns: dict[str, list[Turn]]) -> None:
    """Check that only the last turn of each session failed, and why."""
    assert [t.end for each in turns.values() for t in each[:-1] if not t.is_acknowledged] == []
    assert {each[-1].end["error"]["code"] for each in turns.values()} == {"history_full"}


def check_archive_and_contexts(stack: Stack, uri: str, turns: dict[str, list[Turn]]) -> None:
    acknowledged = {
        session: [turn.request_id for turn in each[:-1]] for session, each in turns.items()
    }
    assert consistency.in_mongodb(uri, list(turns)) == acknowledged
    _, contexts = consistency.log_and_contexts(stack, list(turns))  # the log was trimmed
    for session, context in contexts.items():
        assert len(context) in consistency.CONTEXT_EXCHANGES
        assert context == acknowledged[session][-len(context) :]


async def send_on_a_full_disk(stack: Stack) -> list[Turn]:
    """Send turns until one is rejected; return those that began before that was known."""
    async with httpx.AsyncClient(base_url=stack.http.base_url, timeout=TIMEOUT_SECONDS) as http:
        turns = [
            asyncio.create_task(send_turn(http, f"full {n}", LONG_PROMPT)) for n in range(SESSIONS)
        ]
        await send_until_rejected(stack, "rejected")
        return await asyncio.gather(*turns)


@pytest.mark.campaign
@pytest.mark.timeout(180)
@pytest.mark.parametrize("version", NATS_VERSIONS)
def test_full_disk_rejects_chats_and_keeps_acknowledged_ones(
    tmp_path: Path, version: NatsVersion
) -> None:
    """nats-server 2.15 then writes nothing until it is restarted; 2.11 takes small records."""
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk") as disk:
        nats = nats_server(tmp_path, disk.folder, disk.within, version)
        with running_stack(tmp_path, nats=nats) as stack:
            turns = {"before": ask_once(stack, "before")}
            assert turns["before"].is_acknowledged
            disk.fill()
            full = asyncio.run(send_on_a_full_disk(stack))
            turns |= {f"full {n}": turn for n, turn in enumerate(full)}
            assert stack.http.get("/readyz").status_code == 503
            disk.make_room()
            stack.nats.stop(signal.SIGKILL)
            stack.nats.start()
            stack.wait_until_ready()
            wait_for(lambda: ask_once(stack, "after").is_acknowledged, "a chat")
            check_stored_if_acknowledged(stack, turns)


def check_stored_if_acknowledged(stack: Stack, turns: dict[str, Turn]) -> None:
    logged, contexts = consistency.log_and_contexts(stack, list(turns))
    for session, turn in turns.items():
        stored = [turn.request_id]
        assert logged[session] in ([stored] if turn.is_acknowledged else [[], stored])
        assert contexts[session] == logged[session]

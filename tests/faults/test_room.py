"""No room left, in the log or on the disk: chats are refused, what was acknowledged is there."""

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from services.contract import subjects
from services.runtime.bus import Bus
from tests.e2e.stack import Stack, running_stack
from tests.faults import ledger
from tests.faults.arena import one
from tests.faults.load import PATIENCE, Told, ask
from tests.faults.small_disk import small_disk
from tests.servers import NATS_VERSIONS, NatsVersion, mongod, nats_server, running, wait_for

LIMIT = 1024**2  # bytes of the log; some 1,000 exchanges
AT_ONCE = 4
LONG = "hello " * 100


async def limit(stack: Stack, max_bytes: int) -> None:
    async with Bus.connect(f"nats://127.0.0.1:{stack.nats.port}", "operator") as bus:
        config = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
        config.max_bytes = max_bytes
        await bus.jetstream.update_stream(config)


def wait_for_mongodb(stack: Stack) -> None:
    """Until the log knows that it owes MongoDB something."""
    one(stack, "first")
    ledger.wait_for_archive(stack)


async def ask_until_refused(stack: Stack, session: str) -> list[Told]:
    """
    The last one is the refusal; where NATS hangs it is an event, since the log is asked again for
    some seconds, and the caller is told meanwhile that its request lives.
    """
    told: list[Told] = []
    async with httpx.AsyncClient(base_url=stack.http.base_url, timeout=PATIENCE) as http:
        while not told or not (
            told[-1].is_refused or told[-1].end.get("code") == "history_unavailable"
        ):
            told.append(await ask(http, session, "hello"))
    return told


async def many_until_refused(stack: Stack, sessions: list[str]) -> list[list[Told]]:
    return await asyncio.gather(*(ask_until_refused(stack, session) for session in sessions))


def test_a_log_that_is_full_refuses_chats_until_mongodb_is_back(tmp_path: Path) -> None:
    mongo = mongod(tmp_path)
    uri = f"mongodb://127.0.0.1:{mongo.port}/"
    sessions = [f"s{n}" for n in range(AT_ONCE)]
    with running(mongo), running_stack(tmp_path, uri) as stack:
        wait_for_mongodb(stack)
        asyncio.run(limit(stack, LIMIT))
        mongo.stop(signal.SIGKILL)
        told = asyncio.run(many_until_refused(stack, sessions))
        assert [t.end for turns in told for t in turns[:-1] if not t.is_acknowledged] == []
        assert {turns[-1].end["error"]["code"] for turns in told} == {"history_full"}
        assert "MongoDB" in stack.status()["history"]["warning"]
        mongo.start()
        wait_for(lambda: one(stack, "after").is_acknowledged, "a chat")
        ledger.wait_for_archive(stack)
        ids = [[each.request_id for each in turns[:-1]] for turns in told]
        acknowledged = dict(zip(sessions, ids, strict=True))
        assert ledger.in_mongodb(uri, sessions) == acknowledged
        _, shown = ledger.logged_and_shown(stack, sessions)  # the log was trimmed
        for session in sessions:
            size = len(shown[session])
            assert size in ledger.WINDOW and shown[session] == acknowledged[session][-size:]


async def ask_on_a_full_disk(stack: Stack) -> list[Told]:
    """Until one is refused; what those were told who were answered before it was known."""
    async with httpx.AsyncClient(base_url=stack.http.base_url, timeout=PATIENCE) as http:
        asked = [asyncio.create_task(ask(http, f"full {n}", LONG)) for n in range(AT_ONCE)]
        await ask_until_refused(stack, "refused")
        return await asyncio.gather(*asked)


@pytest.mark.campaign
@pytest.mark.timeout(180)
@pytest.mark.parametrize("version", NATS_VERSIONS)
def test_a_full_disk_refuses_chats_and_has_what_was_acknowledged(
    tmp_path: Path, version: NatsVersion
) -> None:
    """nats-server 2.9 hangs then, 2.15 does not write any more, until it is started again."""
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk") as disk:
        nats = nats_server(tmp_path, disk.folder, disk.within, version)
        with running_stack(tmp_path, nats=nats) as stack:
            told = {"before": one(stack, "before")}
            assert told["before"].is_acknowledged
            disk.fill()
            full = asyncio.run(ask_on_a_full_disk(stack))
            told |= {f"full {n}": each for n, each in enumerate(full)}
            assert stack.http.get("/readyz").status_code == 503
            disk.make_room()
            stack.nats.stop(signal.SIGKILL)
            stack.nats.start()
            stack.wait_until_ready()
            wait_for(lambda: one(stack, "after").is_acknowledged, "a chat")
            logged, shown = ledger.logged_and_shown(stack, list(told))
            for session, each in told.items():
                there = [each.request_id]
                assert logged[session] in ([there] if each.is_acknowledged else [[], there])
                assert shown[session] == logged[session]

"""A log that can't be written, on a full disk, with both versions of nats-server."""

import asyncio
import signal
from pathlib import Path

import pytest
from msgspec.structs import replace

from services.contract import subjects
from services.contract.errors import ServiceError
from services.history.log import Log
from services.inference.history_client import HistoryClient
from services.inference.limits import InferenceLimits
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.faults.small_disk import small_disk
from tests.history.samples import append, context, exchange, history, ids, status, until, url_of
from tests.servers import NATS_VERSIONS, NatsVersion, Server, nats_server, running

LARGE = "x" * 100_000
KEY = subjects.session_key("alice", "s")


@pytest.mark.parametrize("version", NATS_VERSIONS)
async def test_failed_append_refuses_chats_until_the_log_takes_records(
    tmp_path: Path, version: NatsVersion
) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk") as disk:
        nats = nats_server(tmp_path, disk.folder, disk.within, version)
        with running(nats):
            async with (
                history(url_of(nats)),
                Bus.connect(url_of(nats), "worker") as bus,
                Bus.connect(url_of(nats), "other") as other,
            ):
                await append(other, "s", exchange("before"))
                await asyncio.to_thread(disk.fill)
                worker = HistoryClient(bus, InferenceLimits(append_timeout_seconds=4.0))
                for n in range(9):  # use up what nats-server has reserved, then it fails
                    said = exchange(f"lost{n}", response=LARGE)
                    last = await Stream(bus, subjects.HISTORY_STREAM).last(subjects.log(KEY))
                    said = replace(said, previous=last.seq if last else 0)
                    kept = await worker.append(KEY, said, lambda: True)
                    if kept.stored == "failed":
                        break
                assert kept.stored == "failed"
                with pytest.raises(ServiceError) as refused:
                    await worker.context("alice", "other")
                assert refused.value.code in ("history_unavailable", "history_full")
                assert refused.value.retry_after

                await asyncio.to_thread(disk.make_room)
                await asyncio.to_thread(nats.stop, signal.SIGKILL)
                await asyncio.to_thread(nats.start)

                async def is_taken() -> bool:
                    try:
                        await worker.context("alice", "other")
                    except (ServiceError, TimeoutError):
                        return False
                    return (await status(other)).refuses is None

                await until(is_taken, 30)
                assert (await status(other)).warning is None
                before = (await other.jetstream.stream_info("HISTORY")).state.messages
                assert await append(other, "s", exchange("after"))
                assert (await other.jetstream.stream_info("HISTORY")).state.messages == before + 1
                assert ids(await context(other, "s"))[-1] == "after"


async def test_refusal_is_reported_and_ends_by_itself(own_bus: Bus, own_nats: Server) -> None:
    """Fill the log by a limit, which can be lifted while the server runs."""
    async with history(url_of(own_nats)):
        await append(own_bus, "s", exchange("before"))
        await Stream(own_bus, subjects.HISTORY_STREAM).refuse_when_full()
        await limit(own_bus, (await status(own_bus)).log_bytes or 0)
        await own_bus.publish(subjects.HISTORY_APPEND_FAILED, exchange("any"))

        async def refuses(code: str | None) -> bool:
            return (await status(own_bus)).refuses == code

        await until(lambda: refuses("history_full"))
        with pytest.raises(ServiceError) as refused:
            await context(own_bus, "s")
        assert (refused.value.code, refused.value.retry_after) == ("history_full", 5)
        assert "no records" in ((await status(own_bus)).warning or "")
        await limit(own_bus, 2**20)
        await until(lambda: refuses(None))
        assert ids(await context(own_bus, "s")) == ["before"]
        state = (await own_bus.jetstream.stream_info(subjects.HISTORY_STREAM)).state
        assert state.messages == 1, "the probe is gone"


async def limit(bus: Bus, max_bytes: int) -> None:
    config = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
    config.max_bytes = max_bytes
    await bus.jetstream.update_stream(config)


async def test_probe_is_delivered_to_no_consumer(own_bus: Bus) -> None:
    log = Log(own_bus, 0)
    await log.ensure()
    await own_bus.jetstream.publish(subjects.HISTORY_PROBE, b"")
    await append(own_bus, "s", exchange("a"))
    fetched = await log.unsaved(9, 1)
    assert [pending.stored.subject for pending in fetched] == [
        subjects.log(subjects.session_key("alice", "s"))
    ]
    await log.close()


async def test_doubts_without_end_hold_up_nobody(own_bus: Bus, own_nats: Server) -> None:
    """As of workers whose answers are too large for the log."""
    async with history(url_of(own_nats)):
        await append(own_bus, "s", exchange("before"))

        async def doubt() -> None:
            while True:
                await own_bus.publish(subjects.HISTORY_APPEND_FAILED, exchange("any"))
                await asyncio.sleep(0.001)

        doubting = asyncio.create_task(doubt())
        for _ in range(20):
            assert ids(await context(own_bus, "s")) == ["before"]
        doubting.cancel()


@pytest.mark.parametrize("lost", ["HISTORY", "KV_sessions", "KV_requests"])
async def test_lost_stream_is_made_anew(own_bus: Bus, own_nats: Server, lost: str) -> None:
    """While NATS stays connected, as by an operator's mistake."""
    async with history(url_of(own_nats)):
        await append(own_bus, "s", exchange("before"))
        assert ids(await context(own_bus, "s")) == ["before"]
        await own_bus.jetstream.delete_stream(lost)

        async def is_taken() -> bool:
            try:
                await context(own_bus, "s")
            except ServiceError:
                return False
            return True

        await until(is_taken)
        await append(own_bus, "s", exchange("after"))
        assert ids(await context(own_bus, "s"))[-1] == "after"

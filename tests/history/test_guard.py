"""A log that can't be written, because the disk is full or a stream was deleted."""

import asyncio
import signal
from pathlib import Path

import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.messages import Empty
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from services.runtime.streams import Stream, StreamUnavailable
from tests.faults.small_disk import small_disk
from tests.history.samples import append, context, exchange, history, ids, status, until, url_of
from tests.servers import NATS_VERSIONS, NatsVersion, Server, nats_server, running

LARGE = "x" * 100_000


@pytest.mark.parametrize("version", NATS_VERSIONS)
async def test_failed_append_refuses_chats_until_the_log_takes_records(
    tmp_path: Path, version: NatsVersion
) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk") as disk:
        nats = nats_server(tmp_path, disk.folder, disk.within, version)
        with running(nats):
            async with history(url_of(nats)), Bus.connect(url_of(nats), "worker") as bus:
                await append(bus, "s", exchange("before"))
                await asyncio.to_thread(disk.fill)
                await append_until_it_fails(bus)
                await bus.publish(subjects.HISTORY_APPEND_FAILED, Empty())
                await until(lambda: is_refused(bus), 30)

                await asyncio.to_thread(disk.make_room)
                await asyncio.to_thread(nats.stop, signal.SIGKILL)
                await asyncio.to_thread(nats.start)
                await until(lambda: is_accepted(bus), 30)
                assert (await status(bus)).warning is None
                before = (await bus.jetstream.stream_info("HISTORY")).state.messages
                assert await append(bus, "s", exchange("after"))
                assert (await bus.jetstream.stream_info("HISTORY")).state.messages == before + 1
                assert ids(await context(bus, "s"))[-1] == "after"


async def append_until_it_fails(bus: Bus) -> None:
    """Use up what nats-server has reserved on the disk."""
    with pytest.raises(StreamUnavailable):
        for n in range(99):
            await append(bus, "s", exchange(f"lost{n}", response=LARGE))


async def is_refused(bus: Bus) -> bool:
    try:
        await context(bus, "other")
    except ServiceError as error:
        assert error.code in ("history_unavailable", "history_full")
        return error.retry_after is not None
    return False


async def is_accepted(bus: Bus) -> bool:
    try:
        await context(bus, "other")
        return (await status(bus)).refuses is None
    except (ServiceError, TimeoutError, NoResponders):
        return False


async def test_full_log_is_reported_until_it_has_room(empty_bus: Bus, empty_nats: Server) -> None:
    """Fill the log by a limit, which can be lifted while the server runs."""
    async with history(url_of(empty_nats)):
        await append(empty_bus, "s", exchange("before"))
        await Stream(empty_bus, subjects.HISTORY_STREAM).refuse_when_full()
        await limit(empty_bus, (await status(empty_bus)).log_bytes or 0)
        await empty_bus.publish(subjects.HISTORY_APPEND_FAILED, exchange("any"))

        async def refuses(code: str | None, warning: str = "") -> bool:
            current = await status(empty_bus)
            return current.refuses == code and warning in (current.warning or "")

        await until(lambda: refuses("history_full", "takes no records"))  # not only by the quota
        with pytest.raises(ServiceError) as refused:
            await context(empty_bus, "s")
        assert (refused.value.code, refused.value.retry_after) == ("history_full", 5)
        await limit(empty_bus, 2**20)
        await until(lambda: refuses(None))
        assert ids(await context(empty_bus, "s")) == ["before"]
        state = (await empty_bus.jetstream.stream_info(subjects.HISTORY_STREAM)).state
        assert state.messages == 1, "the probe is gone"


async def limit(bus: Bus, max_bytes: int) -> None:
    config = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
    config.max_bytes = max_bytes
    await bus.jetstream.update_stream(config)


async def test_endless_failed_appends_do_not_block_requests(
    empty_bus: Bus, empty_nats: Server
) -> None:
    """As of workers whose answers are too large for the log."""
    async with history(url_of(empty_nats)):
        await append(empty_bus, "s", exchange("before"))

        async def fail_appends() -> None:
            while True:
                await empty_bus.publish(subjects.HISTORY_APPEND_FAILED, exchange("any"))
                await asyncio.sleep(0.001)

        failing = asyncio.create_task(fail_appends())
        for _ in range(20):
            assert ids(await context(empty_bus, "s")) == ["before"]
        failing.cancel()


@pytest.mark.parametrize("lost", ["HISTORY", "KV_sessions", "KV_requests"])
async def test_lost_stream_is_created_again(empty_bus: Bus, empty_nats: Server, lost: str) -> None:
    """While NATS stays connected, as by an operator's mistake."""
    async with history(url_of(empty_nats)):
        await append(empty_bus, "s", exchange("before"))
        assert ids(await context(empty_bus, "s")) == ["before"]
        await empty_bus.jetstream.delete_stream(lost)

        async def is_accepted() -> bool:
            try:
                await context(empty_bus, "s")
            except ServiceError:
                return False
            return True

        await until(is_accepted)
        await append(empty_bus, "s", exchange("after"))
        assert ids(await context(empty_bus, "s"))[-1] == "after"

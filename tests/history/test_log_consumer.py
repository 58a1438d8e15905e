"""The loop that archiver, snapshot saver and indexer share, on a real nats-server."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from services.contract import subjects
from services.history.log import SessionLog
from services.history.log_consumer import LogConsumer
from services.runtime.bus import Bus
from services.runtime.consumers import PendingMessage
from services.runtime.streams import StoredMessage, StreamUnavailable
from tests.history.samples import FAST, append_many, until

UNAVAILABLE = StreamUnavailable("no")


class Recorder(LogConsumer):
    """Records the subjects that it processes; raises `error` the first `failures` times."""

    def __init__(self, log: SessionLog, failures: int, error: Exception) -> None:
        super().__init__("recorder", pytest.fail, FAST, batch=10)
        self.log = log
        self.failures = failures
        self.error = error
        self.processed: list[str] = []
        self.recovered: list[Exception] = []

    async def fetch(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        return await self.log.snapshot_consumer.fetch(batch, timeout)

    async def process(self, records: Sequence[StoredMessage]) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error
        self.processed += [record.subject for record in records]

    async def recover(self, error: Exception) -> None:
        self.recovered.append(error)


@asynccontextmanager
async def recording(
    bus: Bus, failures: int = 0, error: Exception = UNAVAILABLE
) -> AsyncIterator[Recorder]:
    log = SessionLog(bus, limits=FAST)
    await log.ensure()
    recorder = Recorder(log, failures, error)
    async with recorder.running():
        yield recorder
    await log.close()


async def is_all_acknowledged(recorder: Recorder) -> bool:
    return (await recorder.log.snapshot_consumer.progress()).unacknowledged == 0


async def test_every_record_is_processed_and_acknowledged(empty_bus: Bus) -> None:
    async with recording(empty_bus) as recorder:
        await append_many(empty_bus, "s", 25)
        await until(lambda: is_all_acknowledged(recorder))
        subject = subjects.log(subjects.session_key("alice", "s"))
        assert recorder.processed == [subject] * 25 and recorder.recovered == []


async def test_failed_batch_is_given_back_and_processed_again(empty_bus: Bus) -> None:
    async with recording(empty_bus, failures=2) as recorder:
        await append_many(empty_bus, "s", 3)
        async with asyncio.timeout(FAST.ack_wait_seconds):  # sooner than it is redelivered anyway
            await until(lambda: is_all_acknowledged(recorder))
        assert len(recorder.processed) == 3 and len(recorder.recovered) == 2


async def test_batch_of_a_failed_step_is_redelivered(
    empty_bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a process that dies before it acknowledges the batch."""
    error = ZeroDivisionError("unexpected")
    async with recording(empty_bus, failures=1, error=error) as recorder:
        await append_many(empty_bus, "s", 3)
        await until(lambda: is_all_acknowledged(recorder))
        assert len(recorder.processed) == 3 and recorder.recovered == []
    assert "recorder failed" in caplog.text


async def test_probe_is_acknowledged_but_not_processed(empty_bus: Bus) -> None:
    async with recording(empty_bus) as recorder:
        await empty_bus.jetstream.publish(subjects.HISTORY_PROBE, b"")
        await append_many(empty_bus, "s", 1)
        await until(lambda: bool(recorder.processed))  # NATS may not count the record at once
        await until(lambda: is_all_acknowledged(recorder))
        assert recorder.processed == [subjects.log(subjects.session_key("alice", "s"))]

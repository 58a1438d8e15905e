"""The request index over the bus, on a real nats-server and a real mongod."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

import nats
import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.history import Exchange, ExchangeRequest, Imported
from services.history import requests
from services.history.log import SNAPSHOT_DURABLE
from services.history.requests import Indexer, RequestIndex
from services.runtime.bus import Bus
from services.runtime.consumers import Consumer, ConsumerProgress, PendingMessage
from services.runtime.streams import Bucket, Stream, StreamUnavailable
from tests.history.samples import (
    FAST,
    append,
    archived,
    clear,
    connected,
    erase,
    exchange,
    history,
    import_exchanges,
    until,
    url_of,
)
from tests.servers import Server, nats_cluster, running

READS = ("$JS.API.STREAM.MSG.GET.", "$JS.API.CONSUMER.INFO.HISTORY.requests")


@pytest.fixture
def tenant() -> str:
    return uuid4().hex


@pytest.fixture
def nothing_is_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch_nothing(
        indexer: Indexer, batch: int, timeout: float
    ) -> Sequence[PendingMessage]:
        await asyncio.sleep(timeout)
        return ()

    monkeypatch.setattr(Indexer, "fetch", fetch_nothing)


async def find(bus: Bus, tenant: str, request_id: str) -> str:
    """Return the response of the exchange with this request id."""
    request = ExchangeRequest(request_id)
    return (await bus.request(subjects.history("exchange", tenant), request, Exchange, 5)).response


async def is_known(bus: Bus, tenant: str, request_id: str) -> bool:
    try:
        await find(bus, tenant, request_id)
    except ServiceError as error:
        if error.code != "not_found":
            raise
        return False
    return True


async def indexed(bus: Bus) -> None:
    """Wait until index and snapshots include the whole log."""

    async def is_done() -> bool:
        for durable in (requests.DURABLE, SNAPSHOT_DURABLE):
            try:
                info = await bus.jetstream.consumer_info(subjects.HISTORY_STREAM, durable)
            except NotFoundError:  # the index is about to be rebuilt
                return False
            if info.num_pending or info.num_ack_pending:
                return False
        return True

    await until(is_done)


@asynccontextmanager
async def counted_reads(nats_url: str) -> AsyncIterator[list[str]]:
    """Yield the subjects of JetStream reads during the body."""
    client = await nats.connect(nats_url)
    reads: list[str] = []

    async def count(message: Msg) -> None:
        if message.subject.startswith(READS):
            reads.append(message.subject)

    await client.subscribe("$JS.API.>", cb=count)
    await client.flush()
    try:
        yield reads
    finally:
        await client.close()


async def test_find_costs_a_few_reads_after_600_exchanges(
    empty_nats: Server, empty_bus: Bus, tenant: str
) -> None:
    async with history(url_of(empty_nats)):
        await append(empty_bus, "first", exchange("wanted", response="the response"), tenant)
        for n in range(600):
            await append(empty_bus, f"session {n % 7}", exchange(f"r{n}"), tenant)
        await indexed(empty_bus)
        async with counted_reads(url_of(empty_nats)) as reads:
            assert await find(empty_bus, tenant, "wanted") == "the response"
        assert len(reads) <= 5


async def test_find_of_an_unknown_id_costs_three_reads(
    empty_nats: Server, empty_bus: Bus, tenant: str
) -> None:
    async with history(url_of(empty_nats)):
        for n in range(100):
            await append(empty_bus, "a session", exchange(f"r{n}"), tenant)
        await indexed(empty_bus)
        async with counted_reads(url_of(empty_nats)) as reads:
            async with asyncio.timeout(30):
                known = await asyncio.gather(
                    *(is_known(empty_bus, tenant, f"unknown{n}") for n in range(30))
                )
            assert known == [False] * 30
            assert len(reads) == 3 * 30
            assert await is_known(empty_bus, tenant, "r0")
            assert len(reads) > 3 * 30, "it is counted, too"


@pytest.mark.usefixtures("nothing_is_indexed")
async def test_find_before_it_is_indexed(empty_nats: Server, empty_bus: Bus, tenant: str) -> None:
    async with history(url_of(empty_nats)):
        await append(empty_bus, "another", exchange("r0"), tenant)
        await append(empty_bus, "a session", exchange("r1", response="the response"), tenant)
        assert await find(empty_bus, tenant, "r1") == "the response"
        assert not await is_known(empty_bus, tenant, "r2")


@pytest.mark.usefixtures("nothing_is_indexed")
async def test_find_of_a_moved_record_before_it_is_indexed_again(
    empty_nats: Server, empty_bus: Bus, tenant: str
) -> None:
    """As after a repair of the log, which gives its records other sequences."""
    async with history(url_of(empty_nats)):
        moved = await append(
            empty_bus, "a session", exchange("r1", response="the response"), tenant
        )
        key = subjects.session_key(tenant, "a session")
        bucket = Bucket(empty_bus, subjects.REQUESTS_BUCKET)
        await bucket.put(
            subjects.request_entry(tenant, "r1"), encode(requests.IndexEntry(key, moved + 7)), 0
        )
        assert await find(empty_bus, tenant, "r1") == "the response"


async def test_record_that_nats_does_not_count_yet_is_found(
    nats_url: str,
    bus: Bus,
    tenant: str,
    session_id: str,
    nothing_is_indexed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = Consumer.progress

    async def count_nothing(consumer: Consumer) -> ConsumerProgress:
        return ConsumerProgress((await counted(consumer)).floor, unacknowledged=0)

    monkeypatch.setattr(Consumer, "progress", count_nothing)
    async with history(nats_url):
        at = await append(bus, session_id, exchange("r1"), tenant)
        assert await is_known(bus, tenant, "r1") and not await is_known(bus, tenant, "r2")
        elsewhere = requests.IndexEntry(subjects.session_key(tenant, session_id), at + 7)
        bucket = Bucket(bus, subjects.REQUESTS_BUCKET)
        await bucket.put(subjects.request_entry(tenant, "r1"), encode(elsewhere), 0)
        assert await is_known(bus, tenant, "r1")


async def test_request_id_belongs_to_its_tenant(
    nats_url: str, bus: Bus, tenant: str, session_id: str
) -> None:
    async with history(nats_url):
        await append(bus, session_id, exchange("r1"), tenant)
        assert await is_known(bus, tenant, "r1")
        assert not await is_known(bus, uuid4().hex, "r1")


@pytest.mark.parametrize("is_archived", [False, True], ids=["log alone", "archived"])
async def test_find_in_an_erased_session_is_not_found(
    nats_url: str, mongodb_uri: str, bus: Bus, tenant: str, session_id: str, is_archived: bool
) -> None:
    async with history(nats_url, mongodb_uri if is_archived else ""):
        if is_archived:
            await connected(bus)
        await append(bus, session_id, exchange("r1"), tenant)
        await append(bus, "another", exchange("r2"), tenant)
        await indexed(bus)
        if is_archived:
            await archived(bus)
        await erase(bus, session_id, tenant)
        assert not await is_known(bus, tenant, "r1")
        assert await is_known(bus, tenant, "r2")


async def test_find_in_a_cleared_session(
    nats_url: str, bus: Bus, tenant: str, session_id: str
) -> None:
    async with history(nats_url):
        await append(bus, session_id, exchange("r1"), tenant)
        await clear(bus, session_id, tenant)
        assert await is_known(bus, tenant, "r1")


async def test_find_of_a_trimmed_record_in_mongodb(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, tenant: str
) -> None:
    database = f"requests_{tenant[:8]}"
    async with history(url_of(empty_nats), mongodb_uri, mongodb_database=database):
        await connected(empty_bus)
        seq = await append(empty_bus, "a session", exchange("r1", response="the response"), tenant)
        await archived(empty_bus)
        await indexed(empty_bus)
        await Stream(empty_bus, subjects.HISTORY_STREAM).delete(seq)
        assert await find(empty_bus, tenant, "r1") == "the response"
        await empty_bus.jetstream.delete_key_value(subjects.REQUESTS_BUCKET)  # a day later
        await Bucket(empty_bus, subjects.REQUESTS_BUCKET).ensure(60)

        async def is_found() -> bool:  # unavailable while the index is created again
            with suppress(ServiceError):
                return await find(empty_bus, tenant, "r1") == "the response"
            return False

        await until(is_found)
    async with history(url_of(empty_nats)):
        await indexed(empty_bus)
        assert not await is_known(empty_bus, tenant, "r1"), "no record of it is left"


async def test_find_without_mongodb_is_unavailable_not_404(
    empty_nats: Server, empty_bus: Bus, mongodb_uri: str, tenant: str
) -> None:
    database = f"requests_{tenant[:8]}"
    async with history(url_of(empty_nats), mongodb_uri, mongodb_database=database):
        await connected(empty_bus)
        seq = await append(empty_bus, "a session", exchange("r1"), tenant)
        await archived(empty_bus)
        await indexed(empty_bus)
        await Stream(empty_bus, subjects.HISTORY_STREAM).delete(seq)
    async with history(url_of(empty_nats)):
        with pytest.raises(ServiceError, match="only in MongoDB") as raised:
            await find(empty_bus, tenant, "r1")
        assert raised.value.code == "history_unavailable"


async def test_lost_index_is_rebuilt_without_a_false_404(
    empty_nats: Server, empty_bus: Bus, tenant: str
) -> None:
    url, limits = url_of(empty_nats), dataclasses.replace(FAST, max_index_lag=5)
    async with history(url, limits=limits), history(url, limits=limits):
        for n in range(20):
            await append(empty_bus, f"session {n % 3}", exchange(f"r{n}"), tenant)
        await indexed(empty_bus)
        await empty_bus.jetstream.delete_key_value(subjects.REQUESTS_BUCKET)
        assert await is_known_at_last(empty_bus, tenant, "r0")
        await append(empty_bus, "a session", exchange("later"), tenant)
        for request_id in ("r7", "r19", "later"):
            assert await is_known_at_last(empty_bus, tenant, request_id)
        assert not await is_known_at_last(empty_bus, tenant, "r20")


async def is_known_at_last(bus: Bus, tenant: str, request_id: str) -> bool:
    """Repeat the request until the index is available."""
    async with asyncio.timeout(15):
        while True:
            try:
                return await is_known(bus, tenant, request_id)
            except ServiceError as error:
                assert error.code == "history_unavailable"
            await asyncio.sleep(0.02)


async def test_index_lost_before_the_start_is_rebuilt(
    empty_nats: Server, empty_bus: Bus, tenant: str
) -> None:
    async with history(url_of(empty_nats)):
        await append(empty_bus, "a session", exchange("r1"), tenant)
        await indexed(empty_bus)
    await empty_bus.jetstream.delete_key_value(subjects.REQUESTS_BUCKET)
    async with history(url_of(empty_nats)):
        assert await is_known(empty_bus, tenant, "r1")


@pytest.mark.usefixtures("nothing_is_indexed")
async def test_find_in_a_lagging_index_is_unavailable_not_404(
    empty_nats: Server, empty_bus: Bus, tenant: str
) -> None:
    limits = dataclasses.replace(FAST, max_index_lag=1)
    async with history(url_of(empty_nats), limits=limits):
        for n in range(2):
            await append(empty_bus, "a session", exchange(f"r{n}"), tenant)
        consumer = Consumer(empty_bus, subjects.HISTORY_STREAM, requests.DURABLE)

        async def are_counted() -> bool:
            return (await consumer.progress()).unacknowledged == 2

        await until(are_counted)
        with pytest.raises(ServiceError, match="being rebuilt") as raised:
            await find(empty_bus, tenant, "r1")
        assert raised.value.code == "history_unavailable"


async def test_first_exchange_keeps_its_id_until_it_is_erased(
    nats_url: str, bus: Bus, tenant: str, session_id: str
) -> None:
    async with history(nats_url):
        await append(bus, session_id, exchange("r1", response="the first"), tenant)
        await indexed(bus)
        copy = Imported(request_id="r1", prompt="hi", response="a copy")
        await import_exchanges(bus, "copy", [copy], tenant)
        await indexed(bus)
        assert await find(bus, tenant, "r1") == "the first"
        await erase(bus, session_id, tenant)
        await import_exchanges(bus, "copy 2", [replace(copy, response="another")], tenant)
        await indexed(bus)
        assert await find(bus, tenant, "r1") == "another"


@pytest.mark.timeout(60)
async def test_index_has_as_many_replicas_as_the_log(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(running(server)) for server in nats_cluster(tmp_path, 3)]
        async with Bus.connect(",".join(map(url_of, servers)), "test") as bus:

            async def is_ensured() -> bool:
                try:
                    await Stream(bus, subjects.HISTORY_STREAM).ensure(
                        subjects.HISTORY_LOG, 2**20, 0, 3
                    )
                    await RequestIndex(bus, None, FAST).ensure()
                except StreamUnavailable:  # the cluster chooses its leader
                    return False
                return True

            await until(is_ensured, 30)
            info = await bus.jetstream.stream_info(f"KV_{subjects.REQUESTS_BUCKET}")
            assert info.config.num_replicas == 3

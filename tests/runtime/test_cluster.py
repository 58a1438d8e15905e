"""JetStream on a cluster of three servers, which tolerates the loss of any one."""

import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from uuid import uuid4

import pytest

from services.runtime.bus import Bus
from services.runtime.streams import Bucket, Stream, StreamUnavailable
from tests.history.samples import until
from tests.servers import Server, nats_cluster, running

CLUSTER_TIMEOUT = 15  # seconds in which a cluster elects a leader


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        servers = nats_cluster(tmp_path_factory.mktemp("cluster"), 3)
        for server in servers:
            stack.enter_context(running(server))
        yield servers


@pytest.fixture
def name() -> str:
    """Return a name for the test's own stream and bucket."""
    return f"T{uuid4().hex}"


def urls(servers: list[Server]) -> str:
    return ",".join(f"nats://127.0.0.1:{server.port}" for server in servers)


async def ensured(bus: Bus, name: str, replicas: int | None) -> Stream:
    """Create the stream and a bucket, which fails until the cluster has elected its leader."""
    stream = Stream(bus, name)

    async def is_created() -> bool:
        with suppress(StreamUnavailable):
            await stream.ensure(f"{name}.>", 2**20, 0, replicas)
            await Bucket(bus, name).ensure(0, replicas)
            return True
        return False

    await until(is_created, CLUSTER_TIMEOUT)
    return stream


async def append(stream: Stream, text: str) -> None:
    """Append, and retry until the stream has acknowledged it, as the services do."""
    subject, data = f"{stream.name}.test", text.encode()

    async def is_stored() -> bool:
        with suppress(StreamUnavailable):
            last = await stream.last(subject)
            if not (last and last.data == data):  # else by a server that died afterwards
                await stream.append(subject, data, uuid4().hex, last.seq if last else 0)
            return True
        return False

    await until(is_stored, CLUSTER_TIMEOUT)


async def test_acknowledged_record_survives_loss_of_the_leader(
    cluster: list[Server], name: str
) -> None:
    async with Bus.connect(urls(cluster), "test") as bus:
        stream = await ensured(bus, name, replicas=3)
        await append(stream, "before")
        info = (await bus.jetstream.stream_info(name)).cluster
        assert info and info.leader
        leader = cluster[int(info.leader.removeprefix("n"))]
        leader.stop(signal.SIGKILL)
        try:
            await append(stream, "after")
            found = [await stream.get(seq) for seq in (1, 2)]
        finally:
            leader.start()
        assert [stored and stored.data for stored in found] == [b"before", b"after"]


async def test_every_server_reads_an_acknowledged_record(cluster: list[Server], name: str) -> None:
    async with AsyncExitStack() as stack:
        buses = [
            await stack.enter_async_context(Bus.connect(urls([server]), "test"))
            for server in cluster
        ]
        writer = await ensured(buses[0], name, replicas=3)
        for number in range(50):
            await append(writer, str(number))
            for bus in buses:
                last = await Stream(bus, name).last(f"{name}.test")
                assert last and last.data == str(number).encode()


async def test_replicas_can_be_raised_and_are_kept(cluster: list[Server], name: str) -> None:
    async with Bus.connect(urls(cluster), "test") as bus:
        for replicas, expected in ((None, 1), (3, 3), (None, 3)):
            await ensured(bus, name, replicas)
            for stream in (name, f"KV_{name}"):
                config = (await bus.jetstream.stream_info(stream)).config
                assert config.num_replicas == expected


async def test_client_leaves_a_frozen_server(cluster: list[Server]) -> None:
    async with Bus.connect(urls(cluster), "test") as bus:
        url = bus._client.connected_url
        assert url is not None
        (frozen,) = [server for server in cluster if server.port == url.port]

        async def has_moved() -> bool:
            return bus._client.connected_url != url and await bus.is_responsive()

        frozen.signal(signal.SIGSTOP)
        try:
            await until(has_moved, 30)
        finally:
            frozen.signal(signal.SIGCONT)

"""JetStream on a cluster of three servers, which tolerates the loss of any one."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from services.runtime.bus import Bus
from services.runtime.streams import Bucket, Stream, StreamUnavailable
from tests.servers import Server, nats_cluster, running

SUBJECT = "cluster.test"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[list[Server]]:
    async with AsyncExitStack() as stack:
        servers = nats_cluster(tmp_path, 3)
        for server in servers:
            stack.enter_context(running(server))
        yield servers


def urls(servers: list[Server]) -> str:
    return ",".join(f"nats://127.0.0.1:{server.port}" for server in servers)


async def ensured(bus: Bus, replicas: int | None) -> Stream:
    """Create the stream, which fails until the cluster has elected its leader."""
    stream = Stream(bus, "TEST")
    async with asyncio.timeout(15):
        while True:
            try:
                await stream.ensure("cluster.>", 2**20, 0, replicas)
                await Bucket(bus, "test").ensure(0, replicas)
                return stream
            except StreamUnavailable:
                await asyncio.sleep(0.2)


async def append(stream: Stream, text: str) -> None:
    """Append, and retry until the stream has acknowledged it, as the services do."""
    async with asyncio.timeout(15):
        while True:
            try:
                last = await stream.last(SUBJECT)
                if last and last.data == text.encode():
                    return  # stored by a server that died before it acknowledged
                await stream.append(SUBJECT, text.encode(), uuid4().hex, last.seq if last else 0)
                return
            except StreamUnavailable:
                await asyncio.sleep(0.1)


@pytest.mark.timeout(60)
async def test_acknowledged_record_survives_loss_of_the_leader(
    cluster: list[Server],
) -> None:
    async with Bus.connect(urls(cluster), "test") as bus:
        stream = await ensured(bus, replicas=3)
        await append(stream, "before")
        info = (await bus.jetstream.stream_info("TEST")).cluster
        assert info and info.leader
        cluster[int(info.leader.removeprefix("n"))].stop(signal.SIGKILL)
        await append(stream, "after")
        found = [await stream.get(seq) for seq in (1, 2)]
        assert [stored and stored.data for stored in found] == [b"before", b"after"]


@pytest.mark.timeout(60)
async def test_every_server_reads_an_acknowledged_record(
    cluster: list[Server],
) -> None:
    async with AsyncExitStack() as stack:
        buses = [
            await stack.enter_async_context(Bus.connect(urls([server]), "test"))
            for server in cluster
        ]
        writer = await ensured(buses[0], replicas=3)
        for number in range(50):
            await append(writer, str(number))
            for bus in buses:
                last = await Stream(bus, "TEST").last(SUBJECT)
                assert last and last.data == str(number).encode()


@pytest.mark.timeout(60)
async def test_replicas_can_be_raised_and_are_kept(cluster: list[Server]) -> None:
    async with Bus.connect(urls(cluster), "test") as bus:
        for asked, there in ((None, 1), (3, 3), (None, 3)):
            await ensured(bus, asked)
            for name in ("TEST", "KV_test"):
                assert (await bus.jetstream.stream_info(name)).config.num_replicas == there


@pytest.mark.timeout(60)
async def test_client_leaves_a_frozen_server(cluster: list[Server]) -> None:
    async with Bus.connect(urls(cluster), "test") as bus:
        url = bus._client.connected_url
        assert url is not None
        (frozen,) = [server for server in cluster if server.port == url.port]
        frozen.signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(8):
                while bus._client.connected_url == url or not await bus.is_responsive():
                    await asyncio.sleep(0.1)
        finally:
            frozen.signal(signal.SIGCONT)

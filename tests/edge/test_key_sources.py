"""API keys in a bucket and in a file, seen by running edges."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from msgspec.structs import replace

from services.contract.errors import ServiceError
from services.edge.key_sources import KeyBucket, KeyFile, read_file, watching_keys
from services.edge.keys import ApiKey, ApiKeys, new_key, sha256_of
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.settings import InvalidSetting
from services.runtime.streams import Bucket, Stream
from tests.edge.conftest import edge_on
from tests.servers import nats_server, running


def key_of(name: str, secret: str, is_admin: bool = False) -> ApiKey:
    return ApiKey(name=name, sha256=sha256_of(secret), admin=is_admin)


@pytest.fixture(scope="module")
def own_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of this file: keys would close the edges of other tests."""
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


@pytest.fixture
async def own_bus(own_nats: str) -> AsyncIterator[Bus]:
    """A connection to a server without keys."""
    async with Bus.connect(own_nats, "edge") as bus:
        await Stream(bus, "KV_keys").remove()
        yield bus


@asynccontextmanager
async def watching_edge(
    bus: Bus, setting: str = "", path: Path | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    keys = ApiKeys.parse(setting)
    async with watching_keys(bus, keys, path, pytest.fail), edge_on(bus, keys) as http:
        yield http


async def status(http: httpx.AsyncClient, secret: str = "") -> int:
    return (await http.get("/sessions", headers={"X-API-Key": secret})).status_code


async def until(http: httpx.AsyncClient, wanted: int, secret: str = "") -> None:
    async with asyncio.timeout(30):
        while (got := await status(http, secret)) != wanted:
            assert got in (401, 503)  # without history
            await asyncio.sleep(0.01)


async def test_first_key_closes_an_open_edge(own_bus: Bus) -> None:
    async with watching_edge(own_bus) as http:
        assert await status(http) == 503
        await KeyBucket(own_bus).add(key_of("ann", "ann's"))
        await until(http, 401)
        assert await status(http, "ann's") == 503 and await status(http, "other") == 401


async def test_every_edge_sees_added_and_revoked_keys(own_bus: Bus) -> None:
    bucket = KeyBucket(own_bus)
    async with watching_edge(own_bus, "ops:secret") as one, watching_edge(own_bus) as other:
        ann = await bucket.add(key_of("ann", "ann's"))
        await bucket.add(key_of("ann", "ann's second"))
        for http in (one, other):
            await until(http, 503, "ann's second")
        assert [key.name for key in await bucket.revoke(ann.id)] == ["ann"]
        for http in (one, other):
            await until(http, 401, "ann's")
            assert await status(http, "ann's second") == 503
        assert await status(one, "secret") == 503 and await status(other, "secret") == 401


async def test_edge_stays_closed_when_the_last_key_is_revoked(own_bus: Bus) -> None:
    bucket = KeyBucket(own_bus)
    await bucket.add(key_of("ann", "ann's"))
    async with watching_edge(own_bus) as http:
        await until(http, 503, "ann's")
        await bucket.revoke("ann")
        await until(http, 401, "ann's")
        assert await status(http) == 401
    async with watching_edge(own_bus) as http:
        assert await status(http) == 401


async def test_edge_stays_closed_when_the_bucket_is_lost(own_bus: Bus) -> None:
    await KeyBucket(own_bus).add(key_of("ann", "ann's"))
    async with watching_edge(own_bus) as http:
        await Stream(own_bus, "KV_keys").remove()
        await until(http, 401, "ann's")
        assert await status(http) == 401


async def test_edge_is_closed_until_it_can_read_the_bucket(tmp_path: Path) -> None:
    """A server without JetStream can't tell whether there are keys."""
    server = nats_server(tmp_path)
    program = server.command[0]
    server.command = [program, "-a", "127.0.0.1", "-p", str(server.port)]
    with running(server):
        await check_closed(f"nats://127.0.0.1:{server.port}")


async def check_closed(nats_url: str) -> None:
    async with Bus.connect(nats_url, "edge") as bus:
        async with watching_edge(bus, "ops:secret") as http:
            assert await status(http, "secret") == 503
        async with watching_edge(bus) as http:
            refused = await http.get("/sessions")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "bus_unavailable")


async def test_unreadable_entry_disturbs_no_other_key(
    own_bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    await KeyBucket(own_bus).add(key_of("ann", "ann's"))
    await Bucket(own_bus, "keys").put("f" * 64, b"{", 0)
    await Bucket(own_bus, "keys").put("c" * 64, b"", 0)  # revoked by an earlier version
    await Bucket(own_bus, "keys").put("d" * 64, b'"\xff"', 0)
    await Bucket(own_bus, "keys").put("e" * 64, msgspec.json.encode(key_of("eve", "other")), 0)
    assert [key.name for key in await KeyBucket(own_bus).keys()] == ["ann"]
    assert "unreadable API key" in caplog.text and "c" * 64 not in caplog.text


async def test_unknown_key_can_not_be_revoked(own_bus: Bus) -> None:
    with pytest.raises(ServiceError, match="no key 'ann'"):
        await KeyBucket(own_bus).revoke("ann")


async def test_reading_costs_a_read_per_key(own_bus: Bus, own_nats: str) -> None:
    bucket = KeyBucket(own_bus)
    for number in range(20):
        await bucket.add(key_of(f"old-{number}", f"{number}"))
    for number in range(20):
        await bucket.revoke(f"old-{number}")
    for name in ("ann", "bob"):
        await bucket.add(key_of(name, name))
    reads: list[Delivery] = []
    async with Bus.connect(own_nats, "observer") as observer:
        await observer.subscribe("$JS.API.STREAM.MSG.GET.KV_keys", reads.append)
        assert [key.name for key in await bucket.keys()] == ["ann", "bob"]
        await bucket.revoke("bob")
        async with asyncio.timeout(30):
            while len(reads) < 3 + 3:  # two keys and the end: twice
                await asyncio.sleep(0.01)
    assert len(reads) == 6


@pytest.mark.parametrize("has_bucket", [False, True])
async def test_looking_costs_one_request(own_bus: Bus, own_nats: str, has_bucket: bool) -> None:
    """Every edge looks twice a second."""
    if has_bucket:
        await KeyBucket(own_bus).add(key_of("ann", "ann's"))
    seen: list[str] = []
    is_over = asyncio.Event()
    async with Bus.connect(own_nats, "observer") as observer:
        await observer.subscribe("$JS.API.>", lambda delivery: seen.append(delivery.subject))
        await observer.subscribe("over", lambda _: is_over.set())
        await observer._client.flush()  # the server has both subscriptions
        await KeyBucket(own_bus).version()
        await own_bus.send("over", b"")
        await asyncio.wait_for(is_over.wait(), 30)
    assert seen == ["$JS.API.STREAM.INFO.KV_keys"]


async def test_each_change_gives_a_new_version(own_bus: Bus) -> None:
    bucket = KeyBucket(own_bus)
    assert await bucket.version() is None
    seen = []
    for name in ("ann", "bob"):
        await bucket.add(key_of(name, name))
        seen.append(await bucket.version())
    for name in ("ann", "bob"):
        await bucket.revoke(name)
        seen.append(await bucket.version())
    await bucket.add(key_of("eve", "eve's"))
    seen.append(await bucket.version())
    assert len(set(seen)) == 5 and None not in seen


async def test_changes_are_logged_without_the_key(
    own_bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, bucket = tmp_path / "keys.json", KeyBucket(own_bus)
    write(path, key_of("eve", "eve's"))
    await bucket.add(key_of("old", "old one's"))
    ann = key_of("ann", "ann's", is_admin=True)
    eve = replace(key_of("eve", "eve's"), parallel=3)
    expected = [
        f"added name=ann id={ann.id} is_admin=True source='just keys'",
        f"revoked name=ann id={ann.id} is_admin=True source='just keys'",
        f"changed name=eve id={eve.id} is_admin=False source='EDGE_KEYS_FILE'",
    ]
    async with watching_edge(own_bus, path=path):
        await bucket.add(ann)
        await logged(caplog, expected[0])
        await bucket.revoke("ann")
        await logged(caplog, expected[1])
        write(path, eve)
        await logged(caplog, expected[2])
    lines = [line for line in caplog.messages if line.startswith("API key ")]
    assert lines == [f"API key {each}" for each in expected]  # not those of the start
    assert ann.sha256 not in caplog.text


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in caplog.text:
            await asyncio.sleep(0.01)


def write(path: Path, *keys: ApiKey) -> None:
    path.write_bytes(msgspec.json.encode(KeyFile(keys)))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # two writes in one tick of the clock


async def test_changed_file_is_read_again(
    own_bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    write(path, key_of("ann", "ann's"))
    async with watching_edge(own_bus, path=path) as http:
        assert await status(http, "ann's") == 503 and await status(http, "bob's") == 401
        write(path, key_of("bob", "bob's"))
        await until(http, 503, "bob's")
        assert await status(http, "ann's") == 401
        path.write_text("{")
        async with asyncio.timeout(30):
            while "the earlier API keys stay valid" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await status(http, "bob's") == 503


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"keys": [{"name": "ann", "sha256": "abc"}]}',
        '{"keys": [{"name": "_", "sha256": "%s"}]}' % ("0" * 64),
        '{"keys": [{"name": "a", "sha256": "%s"}, {"name": "b", "sha256": "%s"}]}'
        % (("0" * 64,) * 2),
        '{"keys": [{"name": "a.b", "sha256": "%s"}]}' % ("0" * 64),
        '{"keys": [{"name": "a", "sha256": "%s", "parallel": 0}]}' % ("0" * 64),
        '{"keys": [{"name": "a", "sha256": "%s", "rpm": 1}]}' % ("0" * 64),
    ],
)
def test_unusable_file_is_an_invalid_setting(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidSetting, match=r"EDGE_KEYS_FILE=.* can't be used: .+\. It must be"):
        read_file(path)


def test_made_keys_are_long_and_different() -> None:
    assert len({new_key() for _ in range(100)}) == 100
    assert all(len(key) > 40 and key.isascii() for key in (new_key(),))

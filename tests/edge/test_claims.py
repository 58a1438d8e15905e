"""A request that is repeated with its Idempotency-Key is answered once."""

import asyncio
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange
from services.contract.messages import Failed, Sampling, Timings, Usage
from services.edge import answers
from services.edge.chat import read_prompt
from services.edge.claims import Claims, name_of
from services.runtime.bus import Bus
from services.runtime.streams import Stream, StreamUnavailable
from tests.client.tellers import STORY, teller
from tests.edge.conftest import edge_on
from tests.edge.test_chat import JSON, text_of
from tests.fakes import history_of
from tests.servers import nats_cluster, running


@pytest.fixture
def key() -> dict[str, str]:
    return {"Idempotency-Key": f"key {uuid4()}"}


async def test_two_that_come_at_once_at_two_edges_are_one(nats_url: str) -> None:
    async with (
        Bus.connect(nats_url, "one") as one,
        Bus.connect(nats_url, "two") as two,
        edge_on(one) as first,
        edge_on(two) as second,
        teller(nats_url, "w1") as some,
        teller(nats_url, "w2") as other,
        history_of(one, None),
    ):
        for _ in range(4):
            headers = {"Idempotency-Key": f"key {uuid4()}"}
            asked = [edge.post("/chat", json=JSON, headers=headers) for edge in (first, second)]
            got = await asyncio.gather(*asked)
            assert [text_of(answer) for answer in got] == [STORY, STORY]
            assert len({answer.headers["content-location"] for answer in got}) == 1
        assert len(some.requests) + len(other.requests) == 4


async def test_a_repeat_after_the_end_is_told_the_same(
    http: httpx.AsyncClient, nats_url: str, key: dict[str, str]
) -> None:
    async with teller(nats_url) as worker:
        for _ in range(2):
            assert text_of(await http.post("/chat", json=JSON, headers=key)) == STORY
        assert len(worker.requests) == 1


async def test_the_key_of_another_request_is_refused_and_not_to_be_tried_again(
    http: httpx.AsyncClient, nats_url: str, key: dict[str, str]
) -> None:
    async with teller(nats_url):
        await http.post("/chat", json=JSON, headers=key)
        other = await http.post("/chat", json={"prompt": "other"}, headers=key)
        same = await http.post("/chat", content=b'{ "prompt":"hi" }', headers=key)
    assert other.status_code == 409 and other.headers["x-should-retry"] == "false"
    assert other.json()["error"]["code"] == "conflict"
    assert same.status_code == 200


async def test_a_key_is_its_tenants(bus: Bus, nats_url: str, key: dict[str, str]) -> None:
    async with edge_on(bus, "acme:one,other:two") as http, teller(nats_url):
        with_keys = [key | {"X-API-Key": api_key} for api_key in ("one", "two")]
        for headers, prompt in zip(with_keys, ("hi", "else"), strict=True):
            answer = await http.post("/chat", json={"prompt": prompt}, headers=headers)
            assert answer.status_code == 503, "tellers serve the open tenant alone"


async def test_one_that_failed_is_asked_anew(
    bus: Bus, nats_url: str, key: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "CLAIM_TIME", 0.3)
    async with edge_on(bus) as http, history_of(bus, None):
        async with teller(nats_url, "w1", 5, Failed("internal", "It broke.")):
            failed = await http.post("/chat", json=JSON, headers=key)
            assert '"code":"internal"' in failed.text
            again = await http.post("/chat", json=JSON, headers=key)
            assert again.headers["content-location"] != failed.headers["content-location"]
        refused = await http.post("/chat", json=JSON, headers=key)
        assert refused.status_code == 503
        async with teller(nats_url, "w2"):
            assert text_of(await http.post("/chat", json=JSON, headers=key)) == STORY


@pytest.mark.parametrize("ahead", [0, 3600])
async def test_one_whose_edge_died_before_it_asked_is_asked_by_another(
    bus: Bus, nats_url: str, key: dict[str, str], monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """`ahead` in seconds: of its clock."""
    monkeypatch.setattr(answers, "CLAIM_TIME", 0.3)
    name, now = name_of("_", key["Idempotency-Key"]), time.time()
    with monkeypatch.context() as there:
        there.setattr(time, "time", lambda: now + ahead)
        assert await Claims(bus).take("_", name, read_prompt(b'{"prompt":"hi"}'), name)
    async with edge_on(bus) as http, history_of(bus, None), teller(nats_url) as worker:
        got = await asyncio.gather(*(http.post("/chat", json=JSON, headers=key) for _ in range(3)))
        assert [text_of(answer) for answer in got] == [STORY] * 3
        assert len(worker.requests) == 1


async def test_one_that_ended_long_ago_is_told_from_history(
    bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with edge_on(bus) as http, teller(nats_url) as worker:
        address = (await http.post("/chat", json=JSON, headers=key)).headers["content-location"]
        worker.forget()
        now = datetime.now(UTC)
        exchange = Exchange(
            previous=0, request_id=address.removeprefix("/chat/"), epoch=0, prompt="hi",
            response=STORY, asked_at=now, answered_at=now, finish_reason="stop", model=None,
            sampling=Sampling(), usage=Usage(1, 2, 0), timings=Timings(0, 0, 0),
            stop_string="User:",
        )  # fmt: skip
        async with history_of(bus, exchange):
            assert text_of(await http.post("/chat", json=JSON, headers=key)) == STORY
            rest = await http.get(address, headers={"Last-Event-ID": "9"})
            assert text_of(rest) == STORY[9:]
            assert '"finish_reason":"stop"' in rest.text and '"stop_string":"User:"' in rest.text
            assert (await http.get("/chat/unknown")).status_code == 404
        assert len(worker.requests) == 1


@pytest.mark.parametrize("bad", ["x" * 257, "a\tb"])
async def test_a_key_that_is_none_is_refused(http: httpx.AsyncClient, bad: str) -> None:
    answer = await http.post("/chat", json=JSON, headers={"Idempotency-Key": bad})
    assert answer.status_code == 400 and "Idempotency-Key" in answer.json()["error"]["message"]


@pytest.mark.timeout(60)
async def test_claims_are_kept_by_as_many_servers_as_the_log(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(running(server)) for server in nats_cluster(tmp_path, 3)]
        url = ",".join(f"nats://127.0.0.1:{server.port}" for server in servers)
        async with Bus.connect(url, "test") as bus:
            async with asyncio.timeout(20):
                while not await is_claimed_beside_a_log(bus):
                    await asyncio.sleep(0.2)  # a cluster chooses its leader
            info = await bus.jetstream.stream_info(f"KV_{subjects.REQUESTS_BUCKET}")
            assert info.config.num_replicas == 3


async def is_claimed_beside_a_log(bus: Bus) -> bool:
    try:
        await Stream(bus, subjects.HISTORY_STREAM).ensure(subjects.HISTORY_LOG, 2**20, 0, 3)
        await Claims(bus).take("_", "name", read_prompt(b'{"prompt":"hi"}'), "request")
    except (StreamUnavailable, ServiceError):
        return False
    return True

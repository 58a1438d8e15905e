"""A request repeated with its Idempotency-Key is answered once."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from msgspec.structs import replace as replace_struct

from services.client.failover import FailoverPolicy
from services.contract import subjects
from services.contract.history import Exchange
from services.contract.messages import Failed, Sampling, Timings, Usage
from services.edge.api.chat import read_prompt
from services.edge.idempotency import IdempotencyKeys, identify
from services.runtime.bus import Bus
from services.runtime.streams import Bucket
from tests.client.story_worker import STORY, story_worker
from tests.edge.api.test_chat import JSON, read_until, text_of
from tests.edge.conftest import LIMITS, edge_on
from tests.fakes import history_of
from tests.history.samples import append, history, url_of, with_channels
from tests.servers import nats_server, running

PROMPT = read_prompt(b'{"prompt":"hi"}', LIMITS)
QUICK = replace(
    LIMITS,
    claim_seconds=0.2,
    claim_poll_seconds=0.01,
    history_poll_seconds=0.02,
    failover=FailoverPolicy(join_seconds=0.2),
)


@pytest.fixture(scope="module")
async def http(nats_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an edge with short timeouts."""
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, limits=QUICK) as client:
        yield client


@pytest.fixture
def key() -> dict[str, str]:
    return {"Idempotency-Key": f"key {uuid4()}"}


async def test_concurrent_repeats_at_two_edges_generate_once(nats_url: str) -> None:
    async with (
        Bus.connect(nats_url, "one") as one,
        Bus.connect(nats_url, "two") as two,
        edge_on(one) as first,
        edge_on(two) as second,
        story_worker(nats_url, "w1") as some,
        story_worker(nats_url, "w2") as other,
        history_of(one, None),
    ):
        for _ in range(4):
            headers = {"Idempotency-Key": f"key {uuid4()}"}
            asked = [edge.post("/chat", json=JSON, headers=headers) for edge in (first, second)]
            got = await asyncio.gather(*asked)
            assert [text_of(answer) for answer in got] == [STORY, STORY]
            assert len({answer.headers["content-location"] for answer in got}) == 1
        assert len(some.requests) + len(other.requests) == 4


async def test_repeat_after_the_end_returns_the_same_answer(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with story_worker(nats_url) as worker, history_of(bus, None):
        for _ in range(2):
            assert text_of(await http.post("/chat", json=JSON, headers=key)) == STORY
        assert len(worker.requests) == 1


async def test_key_of_another_request_is_a_409_without_retry(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with story_worker(nats_url), history_of(bus, None):
        await http.post("/chat", json=JSON, headers=key)
        other = await http.post("/chat", json={"prompt": "other"}, headers=key)
        same = await http.post("/chat", content=b'{ "prompt":"hi" }', headers=key)
    assert other.status_code == 409 and other.headers["x-should-retry"] == "false"
    assert other.json()["error"]["code"] == "conflict"
    assert same.status_code == 200


async def test_same_key_of_two_tenants_is_two_requests(
    bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with (
        edge_on(bus, "acme:one,other:two") as http,
        story_worker(nats_url),
        history_of(bus, None),
    ):
        with_keys = [key | {"X-API-Key": api_key} for api_key in ("one", "two")]
        for headers, prompt in zip(with_keys, ("hi", "else"), strict=True):
            answer = await http.post("/chat", json={"prompt": prompt}, headers=headers)
            assert answer.status_code == 503, "story workers serve the open tenant alone"


async def test_failed_request_is_started_again(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with history_of(bus, None):
        async with story_worker(nats_url, "w1", 5, Failed("internal", "It broke.")):
            failed = await http.post("/chat", json=JSON, headers=key)
            assert '"code":"internal"' in failed.text
            again = await http.post("/chat", json=JSON, headers=key)
            assert again.headers["content-location"] != failed.headers["content-location"]
        rejected = await http.post("/chat", json=JSON, headers=key)
        assert rejected.status_code == 503
        async with story_worker(nats_url, "w2"):
            assert text_of(await http.post("/chat", json=JSON, headers=key)) == STORY


@pytest.mark.parametrize("clock_ahead", [0, 3600])
async def test_request_of_an_edge_that_died_is_started_by_another(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str], clock_ahead: float
) -> None:
    keyed = identify("_", key["Idempotency-Key"], PROMPT)
    await Bucket(bus, subjects.REQUESTS_BUCKET).ensure(60)
    dead = IdempotencyKeys(bus, QUICK, clock=lambda: time.time() + clock_ahead)
    assert await dead.claim(keyed, keyed.name)
    async with (
        history_of(bus, None),
        story_worker(nats_url) as worker,
    ):
        got = await asyncio.gather(*(http.post("/chat", json=JSON, headers=key) for _ in range(3)))
        assert [text_of(answer) for answer in got] == [STORY] * 3
        assert len(worker.requests) == 1


async def test_repeat_long_after_the_end_is_answered_from_history(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with story_worker(nats_url) as worker:
        async with history_of(bus, None):
            address = (await http.post("/chat", json=JSON, headers=key)).headers["content-location"]
        worker.forget()
        async with history_of(bus, exchange(address)):
            assert text_of(await http.post("/chat", json=JSON, headers=key)) == STORY
            rest = await http.get(address, headers={"Last-Event-ID": "9"})
            assert text_of(rest) == STORY[9:]
            assert '"finish_reason":"stop"' in rest.text and '"stop_string":"User:"' in rest.text
            assert (await http.get("/chat/unknown")).status_code == 404
        assert len(worker.requests) == 1


async def test_repeat_with_last_event_id_resumes_the_answer(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with (
        story_worker(nats_url) as worker,
        history_of(bus, None),
    ):
        async with http.stream("POST", "/chat", json=JSON, headers=key) as answer:
            last_id = await read_until(answer, STORY[:9])
        resuming = key | {"Last-Event-ID": last_id}
        for _ in range(2):
            rest = await http.post("/chat", json=JSON, headers=resuming)
            assert text_of(rest) == STORY[int(last_id) :]
            assert rest.headers["content-location"] == answer.headers["content-location"]
        after_the_end = await http.post("/chat", json=JSON, headers=key | {"Last-Event-ID": "end"})
        assert (after_the_end.status_code, after_the_end.content) == (204, b"")
        other = await http.post("/chat", json={"prompt": "other"}, headers=resuming)
        assert other.status_code == 409
        assert len(worker.requests) == 1


async def test_repeat_with_last_event_id_starts_no_new_answer(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with (
        story_worker(nats_url) as worker,
        history_of(bus, None),
    ):
        resuming = key | {"Last-Event-ID": "9"}
        assert (await http.post("/chat", json=JSON, headers=resuming)).status_code == 404
        assert (await http.post("/chat", json=JSON, headers=key)).status_code == 200
        worker.forget()
        assert (await http.post("/chat", json=JSON, headers=resuming)).status_code == 404
        assert len(worker.requests) == 1


async def test_answer_of_a_lost_claim_is_returned_not_regenerated(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    keyed = identify("_", key["Idempotency-Key"], PROMPT)
    async with story_worker(nats_url) as worker:
        async with history_of(bus, exchange(keyed.name)):
            for _ in range(2):
                other = await http.post("/chat", json={"prompt": "other"}, headers=key)
                assert other.status_code == 409
            assert text_of(await http.post("/chat", json=JSON, headers=key)) == STORY
        assert worker.requests == []


async def test_logged_answer_of_other_results_or_prefix_is_a_409(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    result = {"tool_call_id": "c0", "content": "done"}
    body = {"prompt": "hi", "tool_results": [result], "prefix": "First."}
    keyed = identify("_", key["Idempotency-Key"], PROMPT)
    stored = replace_struct(with_channels(keyed.name), prompt="hi", prefix_length=6, order=())
    async with story_worker(nats_url) as worker, history_of(bus, stored):
        for other in ({"prefix": "Firs"}, {"prefix": ""}, {"tool_results": [result] * 2}):
            answer = await http.post("/chat", json=body | other, headers=key)
            assert answer.status_code == 409, other
        same = await http.post("/chat", json=body, headers=key)
        assert same.status_code == 200 and '{"token":"Then."}' in same.text
        assert worker.requests == []


async def test_erased_answer_is_not_generated_again(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with (
        story_worker(nats_url) as worker,
        history_of(bus, None),
    ):
        address = (await http.post("/chat", json=JSON, headers=key)).headers["content-location"]
        worker.forget()
        entry = subjects.request_entry("_", address.removeprefix("/chat/"))
        await Bucket(bus, subjects.REQUESTS_BUCKET).put(entry, b"it was in the log", 0)
        for _ in range(2):
            erased = await http.post("/chat", json=JSON, headers=key)
            assert erased.status_code == 409 and "erased" in erased.json()["error"]["message"]
        assert len(worker.requests) == 1


async def test_without_history_no_key_is_claimed(
    bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    impatient = replace(QUICK, history_restart_seconds=0)
    async with edge_on(bus, limits=impatient) as http, story_worker(nats_url) as worker:
        async with history_of(bus, None):
            pass  # creates the bucket
        rejected = await http.post("/chat", json=JSON, headers=key)
        assert rejected.status_code == 503 and worker.requests == []


async def test_request_waits_for_a_history_that_restarts(
    http: httpx.AsyncClient, bus: Bus, nats_url: str, key: dict[str, str]
) -> None:
    async with story_worker(nats_url):
        async with history_of(bus, None):
            pass  # creates the bucket
        asking = asyncio.create_task(http.post("/chat", json=JSON, headers=key))
        await asyncio.wait({asking}, timeout=0.1)
        assert not asking.done()
        async with history_of(bus, None):
            assert text_of(await asking) == STORY


async def test_repeat_after_600_other_exchanges_is_answered(
    tmp_path: Path, key: dict[str, str]
) -> None:
    with running(nats_server(tmp_path)) as server:
        url = url_of(server)
        async with (
            Bus.connect(url, "edge") as bus,
            history(url),
            edge_on(bus, limits=QUICK) as http,
            story_worker(url) as worker,
        ):
            first = await http.post("/chat", json=JSON, headers=key)
            await append(bus, "default", exchange(first.headers["content-location"]), "_")
            worker.forget()
            for number in range(600):
                await append(bus, f"session {number % 9}", exchange(f"r{number}"), "_")
            repeat = await http.post("/chat", json=JSON, headers=key)
            assert text_of(repeat) == STORY
            assert repeat.headers["content-location"] == first.headers["content-location"]
            assert len(worker.requests) == 1
            unknown = await asyncio.gather(*(http.get(f"/chat/unknown{n}") for n in range(30)))
            assert {answer.status_code for answer in unknown} == {404}
            assert "a day" in unknown[0].json()["error"]["message"]


def exchange(address: str) -> Exchange:
    now = datetime.now(UTC)
    return Exchange(
        previous=0, request_id=address.removeprefix("/chat/"), epoch=0, prompt="hi",
        response=STORY, asked_at=now, answered_at=now, finish_reason="stop", model=None,
        sampling=Sampling(), usage=Usage(1, 2, 0), timings=Timings(0, 0, 0),
        stop_string="User:",
    )  # fmt: skip


@pytest.mark.parametrize("bad", ["x" * 257, "a\tb"])
async def test_invalid_key_is_rejected(http: httpx.AsyncClient, bad: str) -> None:
    answer = await http.post("/chat", json=JSON, headers={"Idempotency-Key": bad})
    assert answer.status_code == 400 and "Idempotency-Key" in answer.json()["error"]["message"]


async def test_new_keys_of_a_tenant_are_limited(nats_url: str) -> None:
    limits = replace(QUICK, claim_burst=2, claims_per_second=0.01)
    async with (
        Bus.connect(nats_url, "edge") as bus,
        edge_on(bus, limits=limits) as http,
        story_worker(nats_url, "w1"),
        history_of(bus, None),
    ):
        headers = [JSON | {"Idempotency-Key": f"limited {uuid4()}"} for _ in range(3)]
        answers = [await http.post("/chat", headers=h, content=b'{"prompt":"hi"}') for h in headers]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        error = answers[2].json()
        assert "Too many new Idempotency-Keys" in str(error)
        assert 90 <= int(answers[2].headers["retry-after"]) <= 100
        again = await http.post("/chat", headers=headers[0], content=b'{"prompt":"hi"}')
        assert again.status_code == 200

"""Limits of API keys, with real edges and a worker that sends what the test scripted."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from msgspec.structs import replace

from services.client.observer import AnswerObserver
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import (
    ChatRequest,
    Failed,
    Started,
    StreamEvent,
    Token,
    Usage,
)
from services.contract.usage import EdgeUsage, TenantUsage
from services.edge.keys import ApiKey, ApiKeys, sha256_of
from services.edge.rate_limits import RateLimits, Use, Window, shifted, steady_clock
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on, until
from tests.fakes import (
    ACCEPTED,
    DONE,
    HELLO,
    MODEL,
    Script,
    direct_worker,
    report,
    reporting,
    scripted_worker,
)

ADA = {"X-API-Key": "ada's key"}
BOB = {"X-API-Key": "bob's key"}
WAITS = (ACCEPTED, Started(5, 0, 0, 0), 4.0, DONE)


def keys(**limits: object) -> ApiKeys:
    """Return keys of ada, with these limits, and of bob, without any."""
    ada = ApiKey(name="ada", sha256=sha256_of("ada's key"), **limits)  # type: ignore[arg-type]
    return ApiKeys([ada, ApiKey(name="bob", sha256=sha256_of("bob's key"))])


@asynccontextmanager
async def edges(
    nats_url: str, keys: ApiKeys, script: Script = HELLO, count: int = 1
) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Yield clients of edges that share one bus, with a scripted worker behind them."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(scripted_worker(nats_url, script))
        clients = []
        for _ in range(count):
            bus = await stack.enter_async_context(Bus.connect(nats_url, "edge"))
            clients.append(await stack.enter_async_context(edge_on(bus, keys)))
        yield clients


async def ask(http: httpx.AsyncClient, who: dict[str, str] = ADA) -> httpx.Response:
    return await http.post("/chat", json={"prompt": "hi"}, headers=who)


async def until_refused(http: httpx.AsyncClient) -> httpx.Response:
    """Ask for what needs no worker until the edge refuses it."""
    async with asyncio.timeout(30):
        while (response := await http.post("/v1/tokenize", json={}, headers=ADA)).status_code < 429:
            await asyncio.sleep(0.01)
    return response


async def test_requests_over_the_limit_are_429(nats_url: str) -> None:
    await until(lambda: time.time() % 60 < 55, 30)  # in the next minute the estimate is lower
    async with edges(nats_url, keys(requests_per_minute=2)) as (http,):
        answers = [await ask(http) for _ in range(3)]
        others = await ask(http, BOB)
        read = await http.get("/sessions", headers=ADA)
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert others.status_code == 200 and "x-ratelimit-limit-requests" not in others.headers
    assert read.status_code != 429
    refused = answers[-1]
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "2 requests per minute" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert remaining == ["1", "0", "0"]
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert 0 < float(refused.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 120


async def test_requests_count_at_all_edges(nats_url: str) -> None:
    async with edges(nats_url, keys(requests_per_minute=2), count=2) as (one, other):
        assert [(await ask(one)).status_code for _ in range(2)] == [200, 200]
        assert (await until_refused(other)).status_code == 429


async def test_parallel_answers_count_at_all_edges_until_they_end(nats_url: str) -> None:
    async with edges(nats_url, keys(parallel=1), WAITS, count=2) as (one, other):
        async with one.stream("POST", "/chat", json={"prompt": "hi"}, headers=ADA) as running:
            assert running.status_code == 200
            assert (refused := await ask(one)).status_code == 429
            assert "1 parallel answers" in refused.json()["error"]["message"]
            async with asyncio.timeout(30):
                while (await usage(other))["running"] != 1:
                    await asyncio.sleep(0.01)
            assert (await ask(other)).status_code == 429
        async with asyncio.timeout(30):
            while (await usage(other))["running"]:
                await asyncio.sleep(0.01)
        async with other.stream("POST", "/chat", json={"prompt": "hi"}, headers=ADA) as running:
            assert running.status_code == 200


async def usage(http: httpx.AsyncClient) -> dict[str, int]:
    return dict((await http.get("/status", headers=ADA)).json()["key"])


async def test_each_choice_counts_as_an_answer(nats_url: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 3}
    async with edges(nats_url, keys(parallel=2)) as (http,):
        answer = await http.post("/v1/chat/completions", json=body, headers=ADA)
    assert answer.status_code == 429


async def test_tokens_of_prompt_and_answer_count(nats_url: str) -> None:
    async with edges(nats_url, keys(tokens_per_minute=8)) as (http,):  # HELLO has 5 + 2
        first, second, third = [await ask(http) for _ in range(3)]
        used = await usage(http)
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert "8 tokens per minute" in third.json()["error"]["message"]
    assert third.headers["x-ratelimit-remaining-tokens"] == "0"
    assert (used["tokens"], used["tokens_per_minute"], used["running"]) == (14, 8, 0)


def ask_for(max_tokens: int | None = None, prompt: str = "x" * 400, **more: object) -> ChatRequest:
    """Return a request that needs 100 tokens for its prompt, and these for its answer."""
    return ChatRequest(prompt=prompt, max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def limits_of(bus: Bus, **limits: object) -> RateLimits:
    return RateLimits(bus, keys(**limits), WorkerDirectory())


def remaining(limits: RateLimits) -> int:
    return int(dict(limits.headers("ada"))[b"x-ratelimit-remaining-tokens"])


def begin(limits: RateLimits, request: ChatRequest | None) -> AnswerObserver:
    observer = limits.observe("ada", request)
    assert observer is not None
    return observer


async def test_requests_sent_at_once_reserve_their_tokens(bus: Bus) -> None:
    limits = limits_of(bus, tokens_per_minute=1000)
    begin(limits, ask_for(400))
    begin(limits, ask_for(300))
    assert remaining(limits) == 1000 - 500 - 400
    message = "0 are used, 900 are reserved for running requests, and this one may need 101"
    with pytest.raises(ServiceError, match=message) as caught:
        begin(limits, ask_for(1))
    assert (caught.value.code, caught.value.retry_after) == ("rate_limit_exceeded", 1)
    assert limits.usage("ada") == (2, 0, 0)  # nothing of a refused one is left
    begin(limits, ask_for(95, prompt="hi there!"))


async def test_use_replaces_the_reservation_as_it_comes(bus: Bus) -> None:
    limits = limits_of(bus, tokens_per_minute=1000)
    answer = begin(limits, ask_for(200))
    assert remaining(limits) == 700
    answer.on_event(Started(150, 0, 0, 0))  # the estimate of the prompt was 100
    assert remaining(limits) == 650
    answer.on_event(Token(0, "hello", tuple(range(50))))
    assert (remaining(limits), limits.usage("ada")) == (650, (1, 0, 200))
    answer.on_event(replace(DONE, usage=Usage(150, 50, 0)))
    answer.close()
    assert (remaining(limits), limits.usage("ada")) == (800, (0, 0, 200))


@pytest.mark.parametrize(
    ("events", "grace", "left"),
    [
        ((), 0.0, 1000),
        ((Failed("overloaded", "Full."),), 10.0, 1000),
        ((Started(100, 0, 0, 0), Failed("worker_lost", "Lost.")), 10.0, 900),
        ((Started(100, 0, 0, 0), Token(0, "hi", (1, 2))), 0.0, 898),
        ((Started(100, 0, 0, 0), Token(0, "hi", (1, 2))), 10.0, 700),
        ((), 10.0, 700),
    ],
    ids=["left", "rejected", "failed", "left running", "left, continues", "left early, continues"],
)
async def test_no_reservation_outlives_its_reader(
    bus: Bus, events: Sequence[StreamEvent], grace: float, left: int
) -> None:
    """An answer that continues without a reader counts as all that it has reserved."""
    limits = limits_of(bus, tokens_per_minute=1000)
    answer = begin(limits, ask_for(200, grace_s=grace))
    for event in events:
        answer.on_event(event)
    answer.close()
    assert remaining(limits) == left
    assert limits.usage("ada") == (0, 0, 1000 - left)


async def test_one_request_alone_may_exceed_the_limit(bus: Bus) -> None:
    limits = limits_of(bus, tokens_per_minute=50)
    answer = begin(limits, ask_for(5000))
    assert remaining(limits) == 0
    with pytest.raises(ServiceError, match="5100 are reserved"):
        begin(limits, ask_for(1, prompt="hi"))
    answer.on_event(replace(DONE, usage=Usage(100, 50, 0)))
    answer.close()
    with pytest.raises(ServiceError, match="50 tokens per minute, which are used up"):
        begin(limits, ask_for(1, prompt="hi"))


async def test_reservation_is_at_most_the_context_window(nats_url: str) -> None:
    workers = WorkerDirectory()
    async with Bus.connect(nats_url, "edge") as bus:
        await bus.subscribe(subjects.report("w1"), workers.on_report)
        await bus.publish(subjects.report("w1"), report("w1"))
        await until(lambda: workers.ready)
        limits = RateLimits(bus, keys(tokens_per_minute=10_000), workers)
        begin(limits, ask_for(32_000))
        assert remaining(limits) == 10_000 - MODEL.context


async def test_flood_gets_what_the_limit_allows_until_it_ends(nats_url: str) -> None:
    script = (ACCEPTED, 0.5, *HELLO[1:])
    body = {"prompt": "hi", "max_tokens": 100}
    async with edges(nats_url, keys(tokens_per_minute=250), script) as (http,):
        sent = [http.post("/chat", json=body, headers=ADA) for _ in range(10)]
        answers = await asyncio.gather(*sent)
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 8
        assert (await http.post("/chat", json=body, headers=ADA)).status_code == 200
        assert (await usage(http))["tokens"] == 3 * 7


async def test_reservations_count_at_all_edges_while_they_live(nats_url: str, bus: Bus) -> None:
    limits = limits_of(bus, tokens_per_minute=1000)
    usage = TenantUsage(1, (0, 0), (0, 0), reserved=900)
    async with limits.sharing(pytest.fail), Bus.connect(nats_url, "edge") as other:
        message = EdgeUsage("other", int(time.time() // 60), {"ada": usage})
        await other.publish(subjects.usage("other"), message)
        async with asyncio.timeout(30):
            while remaining(limits) != 100:
                await asyncio.sleep(0.01)
        with pytest.raises(ServiceError, match="900 are reserved"):
            begin(limits, ask_for(1))
        async with asyncio.timeout(30):  # the edge is dead
            while remaining(limits) != 1000:
                await asyncio.sleep(0.1)
        begin(limits, ask_for(1))


def test_usage_of_an_earlier_version_reserves_nothing() -> None:
    message = b'{"edge_id": "e", "minute": 1, "tenants": {"ada": {"running": 1,'
    message += b' "requests": [0, 0], "tokens": [0, 7]}}}'
    assert decode(message, EdgeUsage).tenants["ada"].reserved == 0


async def test_embedding_reserves_its_tokens_while_it_runs(bus: Bus) -> None:
    limits = limits_of(bus, tokens_per_minute=1000)
    with limits.embedding("ada", 2000) as observe:
        assert remaining(limits) == 500
        count = observe("demo", "embedding")
        count(100)
        assert remaining(limits) == 500
        with pytest.raises(ServiceError, match="are reserved"), limits.embedding("ada", 2004):
            pytest.fail("it was let in")
    assert remaining(limits) == 900
    with pytest.raises(ZeroDivisionError), limits.embedding("ada", 2000):
        raise ZeroDivisionError
    assert remaining(limits) == 900


async def test_tenants_without_limits_leave_no_counts(bus: Bus) -> None:
    limits = limits_of(bus)
    with limits.embedding("bob", 2000):
        assert limits.observe("bob", ask_for(1)) is None
    assert limits.usage("bob") == (0, 0, 0)


def test_clock_of_limits_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, before = steady_clock(), time.time()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock() == pytest.approx(before, abs=5)


async def test_openai_client_raises_and_reads_the_headers(nats_url: str) -> None:
    async with edges(nats_url, keys(requests_per_minute=1)) as (http,):
        async with openai.AsyncOpenAI(
            base_url=f"{http.base_url}/v1", api_key="ada's key", max_retries=0
        ) as client:
            raw = await client.completions.with_raw_response.create(model="demo", prompt="hi")
            assert raw.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(openai.RateLimitError, match="1 requests per minute"):
                await client.completions.create(model="demo", prompt="hi")


async def test_resume_and_cancel_are_never_refused(nats_url: str) -> None:
    async with edges(nats_url, keys(requests_per_minute=1)) as (http,):
        where = (await ask(http)).headers["content-location"]
        assert (await ask(http)).status_code == 429
        resumed = await http.get(where, headers=ADA | {"Last-Event-ID": "end"})
        assert resumed.status_code == 204
        assert (await http.delete(where, headers=ADA)).status_code == 202


@pytest.mark.parametrize(
    ("models", "asked", "status"),
    [
        (("demo",), "demo", 200),
        (("demo",), None, 200),
        (("demo",), "demo:pirate", 404),
        (("demo:pirate",), "demo:pirate", 200),
        (("demo:pirate",), "demo:pirate@0.5", 200),
        (("demo:pirate",), "demo", 404),
        (("demo:pirate",), None, 404),
        (("demo:*",), "demo:pirate", 200),
        (("*",), "demo", 200),
        (("other",), "demo", 404),
    ],
)
async def test_key_allows_its_models_only(
    nats_url: str, models: Sequence[str], asked: str | None, status: int
) -> None:
    async with edges(nats_url, keys(models=tuple(models))) as (http,):
        async with (
            direct_worker(nats_url, "w1", HELLO),
            Bus.connect(nats_url, "w1") as bus,
            reporting(bus, report("w1", replace(MODEL, adapters=("pirate",)))),
        ):
            async with asyncio.timeout(30):
                while not (await http.get("/v1/models", headers=BOB)).json()["data"]:
                    await asyncio.sleep(0.01)
            more = {} if asked is None else {"model": asked}
            answer = await http.post("/chat", json={"prompt": "hi", **more}, headers=ADA)
            listed = (await http.get("/v1/models", headers=ADA)).json()["data"]
            others = (await http.get("/v1/models", headers=BOB)).json()["data"]
    assert answer.status_code == status, answer.text
    if status == 404:
        assert answer.json()["error"]["code"] == "model_not_found"
    key = ApiKey(name="x", sha256="0" * 64, models=tuple(models))
    assert [each["id"] for each in listed] == [
        each["id"] for each in others if key.allows(each["id"])
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}] * 3_000}),
        ("/v1/completions", {"prompt": [1] * 3_000}),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "hi"}] * 3_000, "max_tokens": 9},
        ),
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}] * 3_000}),
        ("/v1/responses", {"input": [{"role": "user", "content": "hi"}] * 3_000}),
    ],
)
async def test_long_prompt_tells_nothing_of_a_forbidden_model(
    nats_url: str, path: str, body: dict[str, Any]
) -> None:
    async with edges(nats_url, keys(models=("other",))) as (http,):
        async with (
            direct_worker(nats_url, "w1", HELLO),
            Bus.connect(nats_url, "w1") as bus,
            reporting(bus, report("w1")),
        ):
            async with asyncio.timeout(30):
                while not (await http.get("/v1/models", headers=BOB)).json()["data"]:
                    await asyncio.sleep(0.01)
            answers = [
                await http.post(path, json=body | {"model": "demo"}, headers=who)
                for who in (ADA, BOB)
            ]
    assert [answer.status_code for answer in answers] == [404, 400]
    assert "context" not in answers[0].text and "context" in answers[1].text


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("d?mo", False),
        ("[d]emo", False),
        ("d*", True),
        ("*", True),
        ("*o", True),
        ("d*o", True),
        ("d*e*o", True),
        ("demo*", True),
        ("*demo", True),
        ("dem*emo", False),  # the texts must not overlap
        ("d*m*e*o", False),
        ("*e*e*", False),
        ("emo*", False),
        ("*dem", False),
    ],
)
def test_only_a_star_stands_for_other_text(pattern: str, allowed: bool) -> None:
    assert ApiKey(name="x", sha256="0" * 64, models=(pattern,)).allows("demo") is allowed


def test_long_name_costs_no_more_than_its_length() -> None:
    key = ApiKey(name="x", sha256="0" * 64, models=("*a*a*a*a*b",))
    began = time.perf_counter()
    assert not key.allows("a" * 100_000)
    assert time.perf_counter() - began < 1


async def test_resumed_answer_counts_again_and_is_not_refused(bus: Bus) -> None:
    """Else a client could leave an answer and return to it, and have any number at once."""
    limits = RateLimits(bus, keys(parallel=1, tokens_per_minute=9), WorkerDirectory())
    readers = [limits.observe("ada", None) for _ in range(2)]
    for reader in readers:
        assert reader is not None
        reader.on_event(Token(0, "hello", (1, 2)))
    assert limits.usage("ada") == (2, 0, 4)
    with pytest.raises(ServiceError, match="1 parallel answers"):
        limits.observe("ada", ChatRequest(prompt="hi", model="demo"))
    for reader in readers:
        assert reader is not None
        reader.close()
    assert limits.usage("ada") == (0, 0, 4)


@pytest.mark.parametrize(
    ("use", "limit", "seconds"),
    [
        (Use(0, 0, 10), 5, 0),
        (Use(0, 4, 10), 5, 0),
        (Use(60, 0, 30), 30, 0.0),  # just below in a moment
        (Use(60, 0, 0), 30, 30),
        (Use(60, 10, 0), 30, 40),
        (Use(0, 30, 45), 30, 15),
        (Use(0, 60, 45), 30, 15 + 30),
    ],
)
def test_wait_ends_when_the_estimate_reaches_the_limit(
    use: Use, limit: int, seconds: float
) -> None:
    assert use.seconds_until_below(limit) == pytest.approx(seconds)
    over = seconds + use.elapsed
    previous, current = shifted((use.previous, use.current), int(over // 60))
    assert Use(previous, current, over % 60).used <= limit + 1e-9


def test_window_forgets_after_two_minutes() -> None:
    window = Window()
    window.add(3, minute=7)
    window.add(2, minute=7)
    assert window.counts(7) == (0, 5)
    window.add(1, minute=8)
    assert window.counts(8) == (5, 1)
    assert window.counts(9) == (1, 0)
    assert window.counts(10) == (0, 0)

"""Ranking and the worker directory are pure; offers go to fake workers over NATS."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from services.client.chat_client import ChatClient
from services.client.failover import FailoverPolicy
from services.client.routing import PACKED_SECONDS, WorkerDirectory, in_flight, rank_workers
from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ErrorCode, ServiceError
from services.contract.messages import (
    ChatRequest,
    Failed,
    ModelInfo,
    RequestAdmitted,
    StreamEvent,
    WorkerReport,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.fakes import HELLO, ScriptedWorker, direct_worker, scripted_worker
from tests.fakes import report as fake_report

DEMO = ModelInfo("demo", "d1", 2048, 1000, adapters=("shout",))
TUNED = replace(DEMO, digest="d2")
OTHER = ModelInfo("other", "o1", 2048, 1000)
KEYS = [f"_.session{number}" for number in range(300)]
MODEL = ModelInfo("demo", "d1", 2048, 1000)
READY = WorkerReport("w1", "ready", slots=8, running=0, waiting=0, model=MODEL)
LOADING = WorkerReport("w2", "loading", slots=8, running=0, waiting=0, progress=0.42)
FAILED = WorkerReport("w3", "failed", slots=0, running=0, waiting=0, error="No model is there.")
PATIENT = FailoverPolicy(admission_seconds=10)
IMPATIENT = FailoverPolicy(admission_seconds=0.1)  # for workers that never reply

# --- ranking --------------------------------------------------------------------------------------


def report(worker_id: str, load: int = 0, model: ModelInfo = DEMO) -> WorkerReport:
    return WorkerReport(
        worker_id, "ready", slots=4, running=min(load, 4), waiting=max(0, load - 4),
        queue=8, model=model,
    )  # fmt: skip


def first(key: str, *reports: WorkerReport, model: str | None = None) -> str:
    return rank_workers(key, model, reports)[0]


@pytest.mark.parametrize("worker_id", ["", "a b", "w1.x", "*", "w\r\nPUB x 0", "w" * 65])
def test_report_with_a_worker_id_that_is_no_token_is_invalid(worker_id: str) -> None:
    """Requests are offered on a subject with this id."""
    workers = WorkerDirectory()
    workers.on_report(Delivery("", encode(READY), ""))
    with pytest.raises(ServiceError, match="worker_id"):
        workers.on_report(Delivery("", encode(replace(READY, worker_id=worker_id)), ""))
    assert workers.rank("s", None) == ["w1"]


def test_session_always_gets_the_same_worker() -> None:
    workers = [report(worker_id) for worker_id in "abc"]
    chosen = {key: first(key, *workers) for key in KEYS}
    assert chosen == {key: first(key, *reversed(workers)) for key in KEYS}
    assert all(count > len(KEYS) / 5 for count in Counter(chosen.values()).values())


def test_only_sessions_of_a_removed_worker_move() -> None:
    a, b, c = (report(worker_id) for worker_id in "abc")
    for key in KEYS:
        before, after = first(key, a, b, c), first(key, a, b)
        assert after == before or before == "c"


def test_ranking_contains_every_worker() -> None:
    assert sorted(rank_workers("_.s", None, [report(worker_id) for worker_id in "abc"])) == [
        "a",
        "b",
        "c",
    ]
    assert rank_workers("_.s", None, []) == []


def test_worker_with_a_free_slot_ranks_first() -> None:
    for key in KEYS:
        assert first(key, report("a", 4), report("b", 3)) == "b"
    assert {first(key, report("a", 4), report("b", 5)) for key in KEYS} == {"a", "b"}


def test_worker_with_3_more_requests_ranks_second() -> None:
    for key in KEYS:
        assert first(key, report("a", 3), report("b", 0)) == "b"
    assert {first(key, report("a", 2), report("b", 0)) for key in KEYS} == {"a", "b"}


def test_full_worker_ranks_last() -> None:
    full = report("a", 12)
    assert rank_workers("_.s", None, [full, report("b", 11), report("c", 11)])[-1] == "a"


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
def test_only_ready_workers_are_ranked(state: str) -> None:
    other = replace(report("a"), state=state)
    assert rank_workers("_.s", None, [other, report("b")]) == ["b"]


def test_named_model_ranks_only_its_workers() -> None:
    workers = [report("a"), report("b", model=OTHER), report("c", model=OTHER)]
    assert rank_workers("_.s", "demo", workers) == ["a"]
    assert rank_workers("_.s", "demo:shout", workers) == ["a"]
    assert sorted(rank_workers("_.s", "other", workers)) == ["b", "c"]
    assert rank_workers("_.s", "third", workers) == []


def test_ambiguous_model_is_that_of_most_workers() -> None:
    workers = [report("a"), report("b", model=TUNED), report("c", model=TUNED)]
    for name in (None, "demo"):
        assert sorted(rank_workers("_.s", name, workers)) == ["b", "c"]
        assert rank_workers("_.s", name, workers[:2]) == rank_workers("_.s", name, workers[1::-1])


def test_digest_ranks_only_workers_of_that_file() -> None:
    workers = [report("a"), report("b", model=TUNED), report("c", model=TUNED)]
    assert rank_workers("_.s", None, workers, digest="d1") == ["a"]
    assert rank_workers("_.s", "demo", workers, digest="d3") == []


# --- worker directory -----------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def receive(workers: WorkerDirectory, *reports: WorkerReport) -> None:
    for report in reports:
        workers.on_report(Delivery(subjects.report(report.worker_id), encode(report), ""))


def test_directory_knows_the_model_of_a_ready_worker() -> None:
    workers = WorkerDirectory()
    receive(workers, LOADING, READY)
    assert workers.ready and workers.model == MODEL
    assert workers.reports() == [LOADING, READY]


def test_unknown_name_is_the_default_of_a_single_model_only() -> None:
    workers = WorkerDirectory()
    receive(workers, replace(READY, name="demo"))
    named = ("gpt-4o", "demo", "demo:shout", "demo:nope")
    assert [workers.only_model(name) for name in named] == [None, *named[1:]]
    receive(workers, replace(READY, worker_id="w9", name="other"))
    assert workers.only_model("gpt-4o") == "gpt-4o"


def test_loading_draining_or_failed_worker_is_not_ready() -> None:
    workers = WorkerDirectory()
    receive(workers, LOADING, FAILED, replace(READY, state="draining"))
    assert not workers.ready and workers.model is None


def test_worker_without_a_report_for_3_seconds_is_gone() -> None:
    clock = Clock()
    workers = WorkerDirectory(clock)
    receive(workers, READY)
    clock.now += 2.9
    assert workers.ready
    clock.now += 0.2
    assert not workers.ready and workers.reports() == []


def test_worker_that_reports_less_often_is_gone_later() -> None:
    clock = Clock()
    workers = WorkerDirectory(clock)
    receive(workers, replace(READY, interval=2.0))
    clock.now += 5.9
    assert workers.ready
    clock.now += 0.2
    assert not workers.ready


def test_workers_are_gone_one_after_another() -> None:
    clock = Clock()
    workers = WorkerDirectory(clock)
    receive(
        workers, replace(READY, worker_id="often"), replace(READY, worker_id="rare", interval=2.0)
    )
    clock.now += 2
    receive(workers, replace(READY, worker_id="late"))

    def ids() -> set[str]:
        return {report.worker_id for report in workers.reports()}

    assert ids() == {"often", "rare", "late"}
    clock.now += 1.1
    assert ids() == {"rare", "late"}
    clock.now += 2
    assert ids() == {"rare"}
    clock.now += 1
    assert ids() == set()
    receive(workers, READY)
    clock.now += 3.1
    assert ids() == set()


def test_worker_is_gone_soon_whatever_interval_its_report_names() -> None:
    clock = Clock()
    workers = WorkerDirectory(clock)
    receive(workers, replace(READY, interval=1e300))
    clock.now += 15.1
    assert not workers.ready


def test_newest_report_of_a_worker_counts() -> None:
    workers = WorkerDirectory()
    receive(workers, READY, replace(READY, running=3))
    assert [report.running for report in workers.reports()] == [3]


def test_snapshot_gives_another_directory_the_same_reports() -> None:
    hub, other = WorkerDirectory(), WorkerDirectory()
    receive(hub, READY, LOADING)
    other.merge(hub.snapshot())
    assert other.reports() == [READY, LOADING]


def test_snapshot_is_packed_again_when_it_is_old() -> None:
    clock = Clock()
    hub, other = WorkerDirectory(clock), WorkerDirectory()
    assert hub.snapshot().sent_at == clock.now
    receive(hub, READY)
    clock.now += PACKED_SECONDS
    other.merge(hub.snapshot())
    assert other.reports() == [READY]


def test_report_from_a_hub_is_as_old_as_it_is_there() -> None:
    clock, hub_clock = Clock(), Clock()
    hub_clock.now = 7777.0  # each process has its own clock
    hub, other = WorkerDirectory(hub_clock), WorkerDirectory(clock)
    receive(hub, READY)
    hub_clock.now += 2
    other.merge(hub.snapshot())
    clock.now += 0.9
    assert other.ready
    clock.now += 0.2
    assert not other.ready


def test_report_from_a_hub_does_not_replace_a_newer_one() -> None:
    clock = Clock()
    hub, other = WorkerDirectory(clock), WorkerDirectory(clock)
    receive(hub, READY)
    receive(other, READY)
    other.on_admitted("w1", RequestAdmitted(running=2, waiting=1))
    clock.now += 0.1
    other.merge(hub.snapshot())
    assert [in_flight(report) for report in other.reports()] == [3], "the acknowledgement counts"
    clock.now += 1
    receive(hub, replace(READY, running=1))
    other.merge(hub.snapshot())
    assert [in_flight(report) for report in other.reports()] == [1]


def test_numbered_report_counts_however_soon_it_follows() -> None:
    clock = Clock()
    hub, other = WorkerDirectory(clock), WorkerDirectory(clock)
    receive(hub, replace(READY, number=7))
    other.merge(hub.snapshot())
    clock.now += PACKED_SECONDS
    receive(hub, replace(READY, state="draining", number=8))
    other.merge(hub.snapshot())
    assert [report.state for report in other.reports()] == ["draining"]
    receive(other, replace(READY, state="draining", number=9))
    clock.now += 1  # a number decides, not the time at which a hub has heard the report
    receive(hub, replace(READY, number=8))
    other.merge(hub.snapshot())
    assert [report.number for report in other.reports()] == [9]


def test_lost_worker_counts_again_with_its_next_report_only() -> None:
    clock = Clock()
    hub, other = WorkerDirectory(clock), WorkerDirectory(clock)
    receive(hub, READY)
    other.merge(hub.snapshot())
    other.remove("w1")
    clock.now += 0.5
    other.merge(hub.snapshot())
    assert other.reports() == []
    receive(hub, READY)
    clock.now += 0.5
    other.merge(hub.snapshot())
    assert other.reports() == [READY]


def test_unavailable_error_gives_the_reported_reason() -> None:
    workers = WorkerDirectory()
    assert workers.unavailable_error().code == "no_worker"
    receive(workers, FAILED)
    assert workers.unavailable_error().code == "model_unavailable"
    assert workers.unavailable_error().message == "No model is there."
    receive(workers, LOADING)
    assert workers.unavailable_error().code == "model_loading"
    assert "The model is loading (42% so far)." in workers.unavailable_error().message
    receive(workers, replace(LOADING, progress=1.0))
    assert workers.unavailable_error().message == "The model is loaded and warming up."


def test_ready_model_of_silent_workers_is_unavailable_not_unknown() -> None:
    """Workers of another version may lack the subject of a request."""
    workers = WorkerDirectory()
    receive(workers, replace(READY, name="demo", model=DEMO))
    assert workers.unavailable_error("demo").code == "no_worker"
    assert workers.unavailable_error("demo:shout").code == "no_worker"
    assert workers.unavailable_error("demo:gone").code == "model_not_found"


def test_unavailable_error_is_that_of_the_named_model() -> None:
    workers = WorkerDirectory()
    receive(workers, replace(READY, name="demo"), replace(LOADING, name="big"))
    receive(workers, replace(FAILED, name="broken", model=None))
    for model, code in (
        ("big", "model_loading"),
        ("big:shout", "model_loading"),
        ("broken", "model_unavailable"),
        ("demo:gone", "model_not_found"),
        ("other", "model_not_found"),
    ):
        assert workers.unavailable_error(model).code == code, model
    assert workers.unavailable_error("big").message == ("The model 'big' is loading (42% so far).")
    assert workers.unavailable_error("other").message.endswith("available: demo.")


def test_requests_without_a_model_wait_for_the_default() -> None:
    workers = WorkerDirectory()
    loading = replace(LOADING, name="big", default_model="big")
    receive(workers, loading, replace(READY, name="demo", default_model="big"))
    assert workers.rank("key", None) == []
    assert workers.unavailable_error().message.startswith("The model 'big' is loading")
    big = replace(MODEL, name="big", digest="b1")
    receive(workers, replace(loading, state="ready", model=big))
    assert workers.rank("key", None) == ["w2"] and workers.rank("key", "demo") == ["w1"]
    assert workers.model == workers.find_model(None) == big


def test_lost_default_is_not_replaced_by_another_model() -> None:
    workers = WorkerDirectory()
    receive(workers, replace(READY, name="demo", default_model="big"))
    assert workers.rank("key", None) == [] and workers.find_model(None) is None
    assert workers.model == MODEL
    assert workers.unavailable_error().code == "no_worker"


def test_scaled_adapter_is_served_where_the_adapter_is() -> None:
    workers = WorkerDirectory()
    receive(workers, replace(READY, model=DEMO))
    for name in ("demo:shout", "demo:shout@0.5", "demo:shout@nonsense"):  # the worker explains it
        assert workers.rank("key", name) == ["w1"]
    for name in ("demo@0.5", "demo:other@0.5", "shout@0.5"):
        assert workers.rank("key", name) == []


# --- kinds of models ------------------------------------------------------------------------------

EMBEDDER = replace(READY, worker_id="e", name="bge", model=replace(MODEL, name="bge", digest="e"))
EMBEDDER = replace(EMBEDDER, kind="embedding")
CHATTER = replace(READY, name="demo")


def test_requests_only_go_to_workers_of_their_kind() -> None:
    workers = WorkerDirectory()
    receive(workers, CHATTER, EMBEDDER)
    assert workers.rank("key", None) == ["w1"] == workers.rank("key", "demo")
    assert workers.rank("key", None, kind="embedding") == ["e"]
    assert workers.rank("key", "bge", kind="embedding") == ["e"]
    assert workers.rank("key", "bge") == workers.rank("key", None, kind="rerank") == []
    assert workers.rank("key", "demo", kind="embedding") == []


@pytest.mark.parametrize("default", ["demo", "bge"])
def test_default_model_is_that_of_its_kind_only(default: str) -> None:
    workers = WorkerDirectory()
    receive(workers, replace(CHATTER, default_model=default), EMBEDDER)
    assert workers.rank("key", None) == ["w1"]
    assert workers.rank("key", None, kind="embedding") == ["e"]


def test_unknown_name_stands_for_the_only_model_of_its_kind() -> None:
    workers = WorkerDirectory()
    receive(workers, CHATTER, EMBEDDER)
    assert workers.only_model("gpt-4o") is workers.only_model("ada", "embedding") is None
    assert workers.only_model("bge") == "bge" and workers.only_model("ada", "rerank") == "ada"


def test_wrong_kind_is_an_error_with_advice() -> None:
    workers = WorkerDirectory()
    receive(workers, CHATTER, replace(EMBEDDER, state="loading", model=None))
    error = workers.unavailable_error("bge")
    assert error.code == "invalid_request"
    assert error.message == (
        "The field `model` names 'bge', which is an embedding model: use it with POST"
        " /v1/embeddings, or name a chat model; available: demo."
    )
    error = workers.unavailable_error("demo", "embedding")
    assert error.message.endswith(
        "or add the path of a GGUF file that is an embedding model to MODEL_PATH."
    )
    assert workers.unavailable_error("bge", "embedding").code == "model_loading"
    assert workers.unavailable_error(None, "embedding").code == "model_loading"
    assert workers.unavailable_error("other", "embedding").code == "model_not_found"
    assert workers.unavailable_error(None, "rerank").code == "invalid_request"


def test_lost_chat_worker_beside_others_can_be_waited_for() -> None:
    workers = WorkerDirectory()
    receive(workers, EMBEDDER)
    assert workers.unavailable_error().code == "no_worker"
    assert workers.find_model(None) is None and workers.find_model("bge") is None
    found = workers.find_report("bge")
    assert found and found.kind == "embedding"


def test_ready_means_chats_unless_there_are_none() -> None:
    workers = WorkerDirectory()
    receive(workers, EMBEDDER)
    assert workers.ready
    receive(workers, LOADING)
    assert not workers.ready
    receive(workers, CHATTER)
    assert workers.ready


async def test_chat_with_an_embedding_model_is_rejected(bus: Bus) -> None:
    workers = WorkerDirectory()
    receive(workers, EMBEDDER)
    (failed,) = await ask(bus, workers, model="bge")
    assert isinstance(failed, Failed) and failed.code == "invalid_request"


def test_to_error_replaces_only_no_worker() -> None:
    workers = WorkerDirectory()
    receive(workers, LOADING)
    assert workers.to_error(Failed("no_worker", "nobody")).code == "model_loading"
    overloaded = workers.to_error(Failed("overloaded", "full", 2.5))
    assert (overloaded.code, overloaded.message, overloaded.retry_after) == (
        "overloaded",
        "full",
        2.5,
    )


# --- offers ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two workers in a directory; `first` is the session's."""

    workers: WorkerDirectory
    first: ScriptedWorker
    second: ScriptedWorker
    ids: list[str]


@pytest.fixture
async def pair(nats_url: str) -> AsyncIterator[Pair]:
    workers = WorkerDirectory()
    receive(workers, fake_report("one"), fake_report("two"))
    ids = workers.rank(subjects.session_key(subjects.OPEN_TENANT, "default"), None)
    async with (
        direct_worker(nats_url, ids[0], HELLO) as first,
        direct_worker(nats_url, ids[1], HELLO) as second,
    ):
        yield Pair(workers, first, second, ids)


async def ask(
    bus: Bus, workers: WorkerDirectory, policy: FailoverPolicy = PATIENT, **more: Any
) -> list[StreamEvent]:
    client = ChatClient(bus, workers=workers, policy=policy)
    async with aclosing(client.stream(ChatRequest(prompt="hi", **more))) as events:
        return [event async for event in events]


async def test_request_goes_straight_to_the_sessions_worker(bus: Bus, pair: Pair) -> None:
    assert await ask(bus, pair.workers) == list(HELLO)
    ((subject, request),) = pair.first.requests
    assert subject == subjects.worker_request(pair.ids[0], subjects.OPEN_TENANT)
    assert request.prompt == "hi" and pair.second.requests == []


async def test_acknowledged_request_counts_before_next_report(bus: Bus, pair: Pair) -> None:
    await ask(bus, pair.workers)
    running = {report.worker_id: report.running for report in pair.workers.reports()}
    assert running == {pair.ids[0]: 1, pair.ids[1]: 0}


async def test_offered_requests_count_as_in_flight(bus: Bus, pair: Pair) -> None:
    with pair.workers.offering(pair.ids[0]), pair.workers.offering(pair.ids[0]):
        with pair.workers.offering(pair.ids[0]):
            await ask(bus, pair.workers)
    assert pair.first.requests == [] and len(pair.second.requests) == 1


@pytest.mark.parametrize("code", ["overloaded", "shutting_down"])
async def test_rejected_request_is_offered_to_the_next_worker(
    bus: Bus, pair: Pair, code: ErrorCode
) -> None:
    pair.first.refuses = ServiceError(code, "no", 1)
    assert await ask(bus, pair.workers) == list(HELLO)
    assert len(pair.second.requests) == 1


async def test_rejection_by_all_returns_the_shortest_wait(bus: Bus, pair: Pair) -> None:
    pair.first.refuses = ServiceError("overloaded", "full", 7.5)
    pair.second.refuses = ServiceError("overloaded", "full", 3.5)
    assert await ask(bus, pair.workers) == [Failed("overloaded", "full", 3.5)]
    assert pair.first.cancelled.empty(), "a request that nobody admitted needs no cancel"


async def test_permanent_rejection_is_not_offered_elsewhere(bus: Bus, pair: Pair) -> None:
    pair.first.refuses = ServiceError("invalid_request", "no such grammar")
    assert await ask(bus, pair.workers) == [Failed("invalid_request", "no such grammar")]
    assert pair.second.requests == []


async def test_frozen_worker_is_skipped_and_gets_a_drop(bus: Bus, pair: Pair) -> None:
    pair.first.is_frozen = True
    assert await ask(bus, pair.workers, IMPATIENT, request_id="r1") == list(HELLO)
    async with asyncio.timeout(30):
        drop = await pair.first.dropped.get()
    assert drop.worker_id == pair.ids[0]
    assert drop.reply is not None and drop.reply.startswith("chat.reply._.r1.")


async def test_disconnected_worker_is_skipped_and_removed(bus: Bus, pair: Pair) -> None:
    receive(pair.workers, *(fake_report(f"gone-{number}") for number in range(8)))
    async with asyncio.timeout(PATIENT.admission_seconds / 2):  # none of them is waited for
        for number in range(8):
            assert (await ask(bus, pair.workers, session_id=str(number)))[-1] == HELLO[-1]
    assert len(pair.workers.reports()) < 10


async def test_without_reports_nats_picks_the_worker(bus: Bus, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        assert await ask(bus, WorkerDirectory()) == list(HELLO)
    assert [subject for subject, _ in worker.requests] == [subjects.request(subjects.OPEN_TENANT)]

"""The service on a real bus and with a real history; what the model says is scripted."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from services.client.workers import Workers
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.history import (
    Context,
    ContextRequest,
    DeleteRequest,
    Message,
    Messages,
    MessagesRequest,
)
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Empty,
    Failed,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    ModelInfo,
    Started,
    StreamEvent,
    Token,
    WorkerReport,
)
from services.history.service import start as start_history
from services.history.settings import HistorySettings
from services.inference import preparation, service
from services.inference.engine.ahead import Beginning
from services.inference.engine.template import ChatTemplate
from services.inference.models import Model
from services.inference.service import ChatService
from services.inference.settings import InferenceSettings
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Inbox, NoResponders
from tests.inference.engine.test_template import CHATML
from tests.inference.fake_backend import FakeBackend
from tests.servers import nats_server, running

ADAPTERS = ("shout", "loud")
NOBODY = "mongodb://127.0.0.1:9/"  # the discard port: no database
SCHEMA_OF_NOTHING = JsonSchemaFormat(JsonSchema("nothing", {"type": "mystery"}))
LONG = b"".join(b"%d " % number for number in range(200))[:500]  # no loop
ANSWERS = {f"{question}<|im_end|>\n<|im_start|>assistant\n": answer for question, answer in {
    "hi": b"hello", "long": LONG, "stop": b"fine\nUser: me", "emoji": "é🙂".encode(),
}.items()}  # fmt: skip


class Worker:
    """A ChatService over a scripted model, and what callers see of it."""

    def __init__(
        self,
        bus: Bus,
        url: str,
        backend: FakeBackend,
        parallel: int,
        queue: int,
        queue_bytes: int = 2**20,
        worker_id: str = "worker",
        name: str = "fake",
    ) -> None:
        self.bus = bus
        self.url = url
        self.workers = Workers()
        self.backend = backend
        self.died = asyncio.Event()
        template = ChatTemplate(CHATML, backend, bos="", eos="", adds_bos=False)
        settings = InferenceSettings(
            nats_url=url,
            model_parallel=parallel,
            model_queue=queue,
            model_queue_bytes=queue_bytes,
            chat_max_tokens=1000,
        )
        info = ModelInfo(name, f"digest of {name}", backend.context, 0)
        served = (info, *(replace(info, name=f"{name}:{adapter}") for adapter in ADAPTERS))
        model = Model(replace(info, adapters=ADAPTERS), backend, template, served)
        self.service = ChatService(bus, settings, worker_id, model, self.workers, self.died.set)
        self.report = WorkerReport(
            worker_id, "ready", parallel, 0, 0, queue, model=replace(info, adapters=ADAPTERS)
        )

    def hear(self, *reports: WorkerReport) -> None:
        for report in reports:
            subject = subjects.report(report.worker_id)
            self.workers.hear(Delivery(subject, encode(report), ""))

    async def rest_of(self, inbox: Inbox) -> list[StreamEvent]:
        """What came, and what comes until nothing has for a while."""
        events = []
        with suppress(TimeoutError):
            while True:
                events.append(read((await inbox.next(0.3)).data))
        return events

    async def events(self, request: ChatRequest) -> AsyncGenerator[StreamEvent, None]:
        async with self.bus.inbox(f"_INBOX.{id(request)}") as inbox:
            await self.bus.publish(subjects.REQUEST, request, reply=f"_INBOX.{id(request)}")
            while True:
                event = read((await inbox.next(10)).data)
                yield event
                if isinstance(event, Done | Failed):
                    return

    async def ask(self, prompt: str, session: str, **more: Any) -> list[StreamEvent]:
        request = ChatRequest(prompt=prompt, session_id=session, **more)
        return [event async for event in self.events(request)]

    async def messages(self) -> tuple[Message, ...]:
        subject = subjects.history_messages(subjects.OPEN_TENANT)
        return (await self.bus.request(subject, MessagesRequest(), Messages)).messages

    async def context(self, session: str) -> Context:
        subject = subjects.history_context(subjects.OPEN_TENANT)
        return await self.bus.request(subject, ContextRequest(session), Context)


def read(data: bytes) -> StreamEvent:
    return cast(StreamEvent, decode(data, cast(Any, StreamEvent)))


def text(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


@asynccontextmanager
async def worker(
    folder: Path,
    parallel: int = 8,
    queue: int = 16,
    queue_bytes: int = 2**20,
    step_seconds: float = 0,
    context: int = 2000,
    backend: FakeBackend | None = None,
    url: str = "",
    worker_id: str = "worker",
    name: str = "fake",
) -> AsyncIterator[Worker]:
    """On a nats-server of its own (if not that of another), since requests go to who serves."""
    async with AsyncExitStack() as stack:
        if not url:
            server = stack.enter_context(running(nats_server(folder)))
            url = f"nats://127.0.0.1:{server.port}"
        await start_history(stack, HistorySettings(nats_url=url, mongodb_uri=NOBODY))
        bus = await stack.enter_async_context(Bus.connect(url, "test"))
        backend = backend or FakeBackend(ANSWERS, context, step_seconds)
        worker = Worker(bus, url, backend, parallel, queue, queue_bytes, worker_id, name)
        await worker.service.start()
        stack.push_async_callback(worker.service.drain)
        yield worker


@pytest.fixture
async def fast(tmp_path: Path) -> AsyncIterator[Worker]:
    async with worker(tmp_path) as fast:
        yield fast


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[Worker]:
    async with worker(tmp_path, parallel=1, queue=2, step_seconds=0.01) as slow:
        yield slow


async def test_an_answer_comes_in_the_order_of_the_contract(fast: Worker) -> None:
    accepted, started, *tokens, done = await fast.ask("hi", "s", request_id="r1")
    assert accepted == Accepted("r1", "worker")
    assert isinstance(started, Started) and started.exchanges_kept == 0
    assert text(tokens) == "hello"
    assert isinstance(done, Done) and (done.finish_reason, done.stored, done.length) == (
        "stop",
        "log",
        5,
    )
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (started.prompt_tokens, 6)


async def test_the_exchange_is_in_the_context_once_done_is_seen(fast: Worker) -> None:
    await fast.ask("hi", "s")
    (turn,) = (await fast.context("s")).turns
    assert (turn.prompt, turn.response) == ("hi", "hello")
    *_, started, _ = [e for e in await fast.ask("hi", "s") if not isinstance(e, Token)]
    assert isinstance(started, Started) and started.exchanges_kept == 1


async def test_the_stop_list_of_the_settings_holds_unless_the_request_brings_its_own(
    fast: Worker,
) -> None:
    assert text(await fast.ask("stop", "a")) == "fine"
    assert text(await fast.ask("stop", "b", stop=("User",))) == "fine\n"
    assert text(await fast.ask("stop", "c", stop=())) == "fine\nUser: me"


async def test_characters_come_whole(fast: Worker) -> None:
    tokens = [e for e in await fast.ask("emoji", "s") if isinstance(e, Token)]
    assert [(t.at, t.text, len(t.ids)) for t in tokens] == [(0, "é", 2), (1, "🙂", 4)]


async def test_max_tokens_ends_an_answer_with_length(fast: Worker) -> None:
    *_, done = events = await fast.ask("hi", "s", max_tokens=3)
    assert text(events) == "hel" and isinstance(done, Done) and done.finish_reason == "length"


async def test_a_prompt_that_can_not_fit_is_refused_with_both_numbers(fast: Worker) -> None:
    *_, failed = await fast.ask("x" * 3000, "s")
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
    assert re.search(r"has 3\d\d\d tokens .* holds 2000 tokens", failed.message)


async def test_oldest_exchanges_are_dropped_and_it_is_said_how_many(tmp_path: Path) -> None:
    async with worker(tmp_path, context=700) as small:
        for _ in range(2):
            _, started, *_, done = await small.ask("long", "s", max_tokens=300)
        assert isinstance(started, Started) and isinstance(done, Done)
        assert (started.exchanges_kept, started.exchanges_dropped) == (0, 1)
        assert done.exchanges_dropped == 1


async def test_a_conversation_that_outgrows_the_window_is_read_anew_once_in_several_turns(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, context=900) as small:
        read, dropped = [], []
        for turn in range(16):
            _, started, *_ = await small.ask(f"{turn:02} hi", "s", max_tokens=300)
            assert isinstance(started, Started)
            read.append(started.prompt_tokens - started.cached_tokens)
            dropped.append(started.exchanges_dropped)
        assert max(dropped) > 0
        assert sum(tokens > 100 for tokens in read[1:]) <= 5


async def read_ahead(small: Worker, *questions: str, **more: Any) -> Started:
    """Said of the last question, before which there was a pause."""
    *first, last = questions
    for question in first:
        await small.ask(question, "s", max_tokens=300, **more)
    await asyncio.sleep(1)
    _, started, *_ = await small.ask(last, "s", max_tokens=300, **more)
    assert isinstance(started, Started)
    return started


@pytest.mark.parametrize(("turns", "last", "following"), [(7, 0, 0), (6, 80, 0), (7, 0, 80)])
async def test_a_window_that_is_cut_is_read_before_the_next_question_however_long_that_is(
    tmp_path: Path, turns: int, last: int, following: int
) -> None:
    async with worker(tmp_path, context=900) as small:
        more = [*[0] * (turns - 1), last, following]
        questions = [f"{turn:02} {'x' * more[turn]} hi" for turn in range(turns + 1)]
        started = await read_ahead(small, *questions)
        assert started.exchanges_dropped >= 3
        assert started.prompt_tokens - started.cached_tokens < 60 + following


async def test_a_turn_that_was_followed_soon_is_not_looked_behind(tmp_path: Path) -> None:
    async with worker(tmp_path, context=900) as small:
        for more in (*[0] * 6, 80):
            await small.ask(f"{more * 'x'} hi", "s", max_tokens=300)
        steps = len(small.backend.steps)
        await asyncio.sleep(1)
        assert len(small.backend.steps) == steps


class Recurrent(FakeBackend):
    """Of a sequence it keeps all or nothing."""

    def cut(self, slot: int, length: int) -> bool:
        is_whole = length == self.length(slot)
        return super().cut(slot, length if is_whole else 0) and is_whole


async def test_what_was_read_ahead_is_of_use_to_a_model_that_keeps_all_or_nothing(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, backend=Recurrent(ANSWERS, 900)) as small:
        started = await read_ahead(small, *(f"{turn:02} hi" for turn in range(8)))
        assert started.exchanges_dropped == 3
        assert started.prompt_tokens - started.cached_tokens < 60


async def test_nothing_is_read_ahead_of_a_session_that_goes_on_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = threading.Event()

    def ahead(*_: object) -> Beginning:
        looking.set()
        time.sleep(0.5)
        return Beginning([1] * 100, 0, "open.s")

    monkeypatch.setattr(preparation, "ahead", ahead)
    async with worker(tmp_path) as fast:
        await fast.ask("hi", "s")
        await asyncio.to_thread(looking.wait)
        monkeypatch.setattr(preparation, "ahead", lambda *_: None)
        await fast.ask("hi", "s")
        await asyncio.sleep(1.2)
        assert not any(chunk.tokens[0] == 1 for (chunk,) in fast.backend.steps)


async def test_nothing_is_read_ahead_for_who_names_a_seed(tmp_path: Path) -> None:
    """It would be read in another way, and be of no use."""
    async with worker(tmp_path, context=900) as small:
        for turn in range(7):
            await small.ask(f"{turn:02} hi", "s", max_tokens=300, seed=1)
        steps = len(small.backend.steps)
        await asyncio.sleep(1)
        assert len(small.backend.steps) == steps


async def test_a_window_that_stays_is_not_looked_at_again(fast: Worker) -> None:
    await fast.ask("hi", "s")
    steps = len(fast.backend.steps)
    await asyncio.sleep(1)
    assert len(fast.backend.steps) == steps


class Foreign(FakeBackend):
    """Says its answers in tokens that tokenizing their text would never give."""

    def piece(self, token: int) -> bytes:
        return super().piece(token - 1000 if token >= 1000 else token)

    def _answer_to(self, prompt: bytes) -> list[int]:
        return [1000 + byte for byte in super()._answer_to(prompt)]


async def test_the_next_turn_goes_on_from_the_tokens_that_were_said(tmp_path: Path) -> None:
    async with worker(tmp_path, backend=Foreign(ANSWERS)) as warm:
        held = 0  # of the first prompt, nothing
        for prompt, said in (("hi", "hello"), ("stop", "fine"), ("hi", "hello")):
            _, started, *events = await warm.ask(prompt, "s", max_tokens=50)
            assert isinstance(started, Started)
            assert started.cached_tokens == held
            assert text(events) == said
            held = started.prompt_tokens + len(said)


async def test_bad_requests_are_refused_and_say_why(fast: Worker) -> None:
    for prompt, code in (("", "invalid_request"), ("  \n", "invalid_request")):
        (failed,) = await fast.ask(prompt, "s")
        assert isinstance(failed, Failed) and failed.code == code
    (failed,) = await fast.ask("x" * 70_000, "s")
    assert isinstance(failed, Failed) and failed.code == "payload_too_large"
    (failed,) = await fast.ask("hi", "s", temperature=-1)
    assert isinstance(failed, Failed) and "temperature" in failed.message


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            {"grammar": "root ::= ("},
            "The field `grammar` can't be used: a parenthesis is not closed.",
        ),
        ({"grammar": 'root ::= root "a"'}, "left-recursive"),
        ({"response_format": SCHEMA_OF_NOTHING}, "The field `response_format` can't be used"),
        ({"grammar": 'root ::= "a"', "response_format": JsonObjectFormat()}, "leave one of them"),
        ({"logit_bias": {"257": 1.0}}, "`logit_bias` names the token 257"),
        ({"logit_bias": {"hello": 1.0}}, "logit_bias"),
        ({"min_p": 2.0}, "min_p"),
    ],
    ids=str,
)
async def test_what_can_not_be_asked_of_an_answer_is_refused_before_it_has_a_slot(
    fast: Worker, more: dict[str, Any], why: str
) -> None:
    *before, failed = await fast.ask("hi", "s", **more)
    assert isinstance(failed, Failed) and failed.code == "invalid_request"
    assert why in failed.message
    assert not any(isinstance(event, Started) for event in before)
    assert fast.backend.steps == []


async def test_an_answer_that_its_grammar_leaves_no_way_fails_alone(fast: Worker) -> None:
    broken, right = await asyncio.gather(
        fast.ask("hi", "a", grammar='root ::= "hell" [0-9]'),
        fast.ask("hi", "b", grammar='root ::= "hello"'),
    )
    assert isinstance(broken[-1], Failed) and broken[-1].code == "invalid_request"
    assert isinstance(right[-1], Done) and right[-1].finish_reason == "stop"
    assert (text(broken), text(right)) == ("hell", "hello")


async def test_talk_s_stop_strings_do_not_cut_what_has_a_form(fast: Worker) -> None:
    events = await fast.ask("stop", "s", grammar="root ::= .{0,30}")
    assert text(events) == "fine\nUser: me"


async def test_a_request_that_names_no_inbox_makes_the_worker_publish_nowhere(
    fast: Worker,
) -> None:
    await fast.ask("hi", "s")
    purge = "$JS.API.STREAM.PURGE.HISTORY"
    await fast.bus.publish(subjects.REQUEST, ChatRequest(prompt="hi"), reply=purge)
    await fast.bus.publish(subjects.REQUEST, ChatRequest(prompt="hi"))
    await fast.ask("hi", "other")
    assert len((await fast.context("s")).turns) == 1


async def test_a_cancel_ends_the_answer_and_what_was_said_is_kept(slow: Worker) -> None:
    request = ChatRequest(prompt="long", session_id="s", request_id="r1")
    events = []
    async for event in slow.events(request):
        events.append(event)
        if isinstance(event, Token):
            await slow.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r1"), Empty())
    done = events[-1]
    assert isinstance(done, Done) and done.finish_reason == "cancelled" and done.stored == "log"
    (turn,) = (await slow.context("s")).turns
    assert turn.response == text(events) and len(turn.response) < 500


async def test_an_answer_whose_session_is_erased_meanwhile_is_not_kept_and_its_end_says_so(
    slow: Worker,
) -> None:
    erased = subjects.history_delete(subjects.OPEN_TENANT)
    events: list[StreamEvent] = []
    async for event in slow.events(ChatRequest(prompt="long", session_id="s", max_tokens=50)):
        if isinstance(event, Token) and not any(isinstance(e, Token) for e in events):
            await slow.bus.request(erased, DeleteRequest("s"), Empty)
        events.append(event)
    done = events[-1]
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("length", "none")
    assert (await slow.context("s")).turns == () and await slow.messages() == ()
    *_, done = await slow.ask("hi", "s")
    assert isinstance(done, Done) and done.stored == "log"
    assert [turn.response for turn in (await slow.context("s")).turns] == ["hello"]


async def test_a_cancel_in_the_queue_ends_it_before_it_has_a_slot(slow: Worker) -> None:
    first = asyncio.create_task(slow.ask("long", "a", request_id="r1"))
    while slow.service.running != 1:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(slow.ask("hi", "b", request_id="r2"))
    while slow.service.waiting != 1:
        await asyncio.sleep(0.01)
    await slow.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r2"), Empty())
    *_, done = await second
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "log")
    await slow.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r1"), Empty())
    await first
    assert (await slow.context("b")).turns == ()


async def test_draining_finishes_what_was_begun_and_takes_no_more(slow: Worker) -> None:
    asks = [asyncio.create_task(slow.ask("hi", str(i))) for i in range(3)]
    while slow.service.running + slow.service.waiting != 3:
        await asyncio.sleep(0.01)
    await slow.service.drain()
    for events in await asyncio.gather(*asks):
        assert text(events) == "hello" and isinstance(events[-1], Done)
    assert slow.backend.closed
    with pytest.raises(NoResponders):
        await slow.ask("hi", "s")


async def test_draining_fails_what_can_not_be_finished_in_time(
    slow: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FINISH_DEADLINE", 0.2)
    ask = asyncio.create_task(slow.ask("long", "s"))
    while slow.service.running != 1:
        await asyncio.sleep(0.01)
    await slow.service.drain()
    *_, failed = await ask
    assert isinstance(failed, Failed) and failed.code == "shutting_down"


async def test_without_history_a_request_fails_and_is_not_answered_as_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.sessions.TRIES", (0.1, 0.1))
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with Bus.connect(url, "test") as bus:
            alone = Worker(bus, url, FakeBackend(ANSWERS), 1, 1)
            await alone.service.start()
            *_, failed = await alone.ask("hi", "s")
            await alone.service.drain()
    assert isinstance(failed, Failed) and failed.code == "history_unavailable"


async def test_a_step_that_fails_fails_its_answers_and_the_next_one_is_right(
    fast: Worker,
) -> None:
    fast.backend.fails = True
    *_, failed = await fast.ask("hi", "s")
    assert isinstance(failed, Failed) and failed.code == "internal"
    assert text(await fast.ask("hi", "s")) == "hello"


async def test_the_death_of_the_engine_fails_its_answers_and_is_reported(fast: Worker) -> None:
    *_, failed = await fast.ask("not in the script", "s")  # raises StopIteration in the engine
    assert isinstance(failed, Failed) and failed.code == "internal"
    await asyncio.wait_for(fast.died.wait(), 5)
    (refused,) = await fast.ask("hi", "s")
    assert isinstance(refused, Failed) and refused.code == "shutting_down"


async def test_turns_of_one_session_at_once_are_all_kept(fast: Worker) -> None:
    answers = await asyncio.gather(*(fast.ask("hi", "s") for _ in range(8)))
    assert all(isinstance(e[-1], Done) and e[-1].stored == "log" for e in answers)
    assert len((await fast.context("s")).turns) == 8

"""Serves chat requests with one model: admission, one answer each, cancels, replays and drain."""

import asyncio
import base64
import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from services.client.routing import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.answer import Answer, after_offset
from services.contract.codec import decode, encode
from services.contract.conversation import Tool
from services.contract.errors import ServiceError, shutting_down
from services.contract.history import Context, Exchange
from services.contract.messages import (
    Accepted,
    AnswerEvent,
    Cancel,
    ChatRequest,
    Done,
    Failed,
    ModelInfo,
    Replay,
    ReplayRequest,
    RequestAdmitted,
    SessionErased,
    Started,
    Timings,
    Token,
    ToolCallDelta,
    Usage,
)
from services.contract.subjects import ANY
from services.inference import spans
from services.inference.adapters import AdapterFolder, Adapters
from services.inference.engine.backend import ComputeFailure, ConstraintFailure
from services.inference.engine.engine import Engine, Finished, Output, PrefillStarted
from services.inference.engine.kv_cache.slots import session_of
from services.inference.engine.output.generated_answer import AnswerChunk
from services.inference.engine.output.parts import (
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    ReasoningDelta,
)
from services.inference.engine.scheduling.prefill_budget import Throughput
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.history_client import AppendResult, HistoryClient
from services.inference.in_flight import (
    InFlightRequest,
    InFlightRequests,
    RecentCancels,
    StopReason,
)
from services.inference.limits import InferenceLimits
from services.inference.models import LoadedModel
from services.inference.pool import Pool
from services.inference.prompt_builder import PreparedPrompt, PromptBuilder
from services.inference.replay import ReplayStore
from services.inference.report_hub import ReportHub
from services.inference.router import Router
from services.inference.settings import InferenceSettings
from services.inference.state_folder import KeptCache, TakenStates
from services.runtime import logs, trace_context, tracing
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.supervised import Fail, SupervisedLoop
from services.runtime.tasks import Stopped

MAX_TIMEOUT_SECONDS = 86_400.0  # no answer takes a day
DRAIN_POLL_SECONDS = 0.02
CALL_ID_LENGTH = 9
ENGINE_STOPPED = ComputeFailure("The engine stopped. Send the request again.")
DISCONNECTED = Failed("worker_lost", "The worker was disconnected for too long: try again.", 1)

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ChatService:
    """
    Serves chat requests. The life of a request, method by method:

    1. `_admit`: the router asks for a slot or a place in the queue.
    2. `_serve`: runs the other steps, and ends the request in exactly one Done or Failed.
    3. `_prepare`: reads the session's context from the cache or from history, builds the prompt in
       a thread, and submits it to the engine.
    4. `_generate`: sends the engine's outputs as events.
    5. `_finish`: appends the exchange to the log, then sends Done.
    6. `_prefill_next_prompt`: an idle worker prefills what it knows of the session's next prompt.

    `fail` ends the process, for example if the engine dies.
    """

    bus: Bus
    settings: InferenceSettings
    limits: InferenceLimits
    worker_id: str
    model: LoadedModel
    workers: WorkerDirectory
    reports: ReportHub
    fail: Fail
    on_adapters_changed: Callable[[], object] = lambda: None
    taken: TakenStates | None = None
    """Cached prompts of the worker that served before this one."""

    def __post_init__(self) -> None:
        settings, limits, model = self.settings, self.limits, self.model
        self.flights = InFlightRequests(settings, limits)
        self._cancels = RecentCancels(limits)
        self._replays = ReplayStore(limits)
        self._history = HistoryClient(self.bus, limits)
        self._prompts = PromptBuilder(
            model, settings.chat_system_prompt, limits.max_cached_answer_tokens
        )
        self._pool = Pool("preparing", limits.preparing_threads)
        self._router = Router(
            self.bus, self.worker_id, self.workers, self.reports, limits, self._admit
        )
        self._connection = ConnectionWatch(self.bus, self._on_disconnected, limits)
        self._idle_prefill = asyncio.Lock()
        self._loops = AsyncExitStack()
        self._admissions = 0
        self._is_dead = False
        self._is_draining = False
        self.kept: KeptCache | None = None
        """What was cached at the end of `drain`."""
        in_loop: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        self._engine = Engine(
            model.backend,
            settings.model_parallel,
            min(settings.model_cache * 2**20, model.max_host_cache),
            emit=partial(in_loop, self._dispatch),
            on_death=partial(in_loop, self._on_engine_death),
            public_prefixes=model.public_prefixes(settings.chat_system_prompt.strip()),
            limits=limits.scheduler,
        )
        stored_info = replace(model.info, changed=0, trained_context=0)
        self.adapters = Adapters(stored_info, self._engine.free_adapter)
        self._folder = AdapterFolder(
            model.path,
            self.adapters,
            self._engine,
            limits.adapter_poll_seconds,
            self.on_adapters_changed,
        )

    @property
    def model_info(self) -> ModelInfo:
        """The model with the adapters that requests can name now."""
        return replace(self.model.info, adapters=self.adapters.names)

    @property
    def adapter_faults(self) -> tuple[str, ...]:
        """Why files in the adapters' folders are not used."""
        return self._folder.faults

    @property
    def running(self) -> int:
        return self.flights.running

    @property
    def waiting(self) -> int:
        return self.flights.waiting

    @property
    def queued_tokens(self) -> int:
        return self.flights.queued_tokens

    @property
    def dimensions(self) -> int:
        """Those of its embeddings: a chat model gives none."""
        return 0

    @property
    def throughput(self) -> Throughput:
        return self._engine.throughput

    async def start(self) -> None:
        self._engine.start()
        await self._folder.step()
        for name, step in (
            ("keep-alive", self._keep_alive),
            ("connection", self._connection.step),
            ("adapters", self._folder.step),
        ):
            loop = SupervisedLoop(name, step, self.fail)
            await self._loops.enter_async_context(loop.running(is_cancelled=True))
        for subject, handler in (
            (subjects.cancel(ANY, ANY), self._on_cancel),
            (subjects.replay(ANY, ANY), self._on_replay),
            (subjects.worker_replay(self.worker_id, ANY, ANY), self._on_direct_replay),
            (subjects.erased(ANY), self._on_erased),
            (subjects.undelivered_any(self.worker_id), self._on_undelivered),
        ):
            await self.bus.subscribe(subject, handler)
        if self.taken:
            self._take_over(self.taken)
        await self._router.start(f"answers chat requests with {self.model.info.name}")

    async def drain(self) -> None:
        """Accept no more requests, finish those in flight, and fail the rest after a deadline."""
        await self.bus.stop_serving()
        self._is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_seconds):
                await self._until_idle()
        for flight in list(self.flights.values()):
            await flight.fail(shutting_down())
            self._interrupt(flight, "cancelled")
        await self._until_idle()  # threads may still be about to use the model
        await self._loops.aclose()
        async with self._idle_prefill:  # which uses the model in a thread, too
            await self._pool.close()
            await asyncio.to_thread(self._engine.close)
            if self.settings.model_cache_folder and not self._is_dead:
                await self._keep_cache()
            self.model.backend.close()

    async def _until_idle(self) -> None:
        while self.flights:
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    # --- the cache over a restart -----------------------------------------------------------------

    async def _keep_cache(self) -> None:
        try:
            states = await asyncio.to_thread(self._engine.save_all)
        except Exception:  # for lack of memory, say: it must not keep the worker from ending well
            log.exception("cached prompts not kept")
        else:
            self.kept = KeptCache(self._binding, self._prompts.kept_answers(), states)

    @property
    def _binding(self) -> str:
        """What cached prompts depend on, beside their tokens."""
        return f"model {self.model.info.digest}, {self.model.backend.state_format}"

    def _take_over(self, taken: TakenStates) -> None:
        if taken.binding == self._binding:
            self._prompts.take_over(taken.answers)
            self.bus.spawn(self._adopt(taken))
        else:
            log.info("cached prompts not used found=%r wanted=%r", taken.binding, self._binding)
            taken.close()

    async def _adopt(self, taken: TakenStates) -> None:
        """
        Take over cached prompts while requests are served already, and drop those of sessions that
        were erased while this worker was away. In this order: a session that is erased from now on
        is forgotten anyway.
        """
        states, adopted, dropped = taken.read(self.model.backend.state), 0, 0
        unchecked = {answer.session_key for answer in taken.answers}
        while not self._is_draining and (saved := await asyncio.to_thread(next, states, None)):
            self._engine.adopt(saved)
            adopted += 1
            unchecked.discard(session_of(saved.owner))
            dropped += await self._drop_if_erased(session_of(saved.owner))
        for session in unchecked:
            await self._drop_if_erased(session)
        log.info("cached prompts taken over states=%d of_erased_sessions=%d", adopted, dropped)

    async def _drop_if_erased(self, session_key: str) -> bool:
        """Return whether history has forgotten the session, or has erased it at any time."""
        if not session_key or prompts.is_stateless_key(session_key):
            return False
        tenant, session_id = subjects.session_of_key(session_key)
        while not self._is_draining:
            try:
                context = await self._history.stored_context(tenant, session_id)
            except ServiceError:  # history is away, too: this worker may be the first one back
                await asyncio.sleep(self.limits.append_retry_seconds)
                continue
            if context.erased == 0 < context.applied_seq:
                return False
            break
        self._prompts.forget_session(session_key)
        self._engine.forget_session(session_key)
        return True

    # --- one request ------------------------------------------------------------------------------

    def _admit(self, tenant: str, request: ChatRequest, reply: str) -> RequestAdmitted:
        """Admit a request by counts and bytes alone, before any work. Raises ServiceError."""
        sampling = self.settings.fill_in(request, self.model.sampling)
        variant = self.adapters.find(request.model)
        self._prompts.check_length(request)
        self._admissions += 1
        admission = self._admissions
        flight = InFlightRequest(
            self.bus,
            self.limits,
            self.worker_id,
            admission,
            tenant,
            request,
            reply,
            sampling,
            variant,
        )
        if flight.key in self.flights:
            message = f"Request {flight.request_id} is already being answered."
            raise ServiceError("conflict", message)
        if self._is_dead or self._is_draining:
            raise shutting_down()
        self.flights.check_room(flight, self.throughput.tokens_per_second)
        self.flights[flight.key] = flight
        self.adapters.lease(variant)  # until `_serve` ends
        for cancel in self._cancels.of(flight.key):  # which overtook the request
            self._cancel(flight, cancel)
        self._replays.begin(flight.key, flight.recording)
        self.bus.spawn(self._serve(flight))
        return RequestAdmitted(self.flights.running, self.flights.waiting)

    async def _serve(self, flight: InFlightRequest) -> None:
        logs.request_id.set(flight.request_id)
        with spans.serving(flight):
            await self._run(flight)

    async def _run(self, flight: InFlightRequest) -> None:
        timeout = flight.request.timeout_s or MAX_TIMEOUT_SECONDS
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout, self._interrupt, flight, "timeout")
        try:
            await flight.send(Accepted(flight.request_id, self.worker_id))
            await self._answer(flight)
        except Stopped:
            if flight.stop_reason == "timeout":
                await flight.fail(_timed_out())
            await flight.send(Done("cancelled", Usage(0, 0, 0), Timings(0, 0, 0), 0, "none", 0))
        except ServiceError as error:
            log.warning("request failed code=%s message=%r", error.code, error.message)
            await flight.fail(error)
        except Exception:
            log.exception("request failed code=internal")
            message = f"Internal worker error. Search the worker's log for {flight.request_id}."
            await flight.fail(ServiceError("internal", message))
        finally:
            timer.cancel()
            flight.stop("cancelled")  # if a thread still builds its prompt
            del self.flights[flight.key]
            self._replays.end(flight.key)
            self._engine.cancel(flight.sequence_key)  # if it is still there
            self.adapters.release(flight.variant)

    async def _answer(self, flight: InFlightRequest) -> None:
        prompt, sequence = await self._prepare(flight)
        try:
            finished = await self._generate(flight, prompt)
        except ServiceError:
            flight.computed_at = time.monotonic()
            failed = Finished("failed", sequence.usage, sequence.timings)
            await self._store(flight, prompt, failed)
            raise
        if not (sequence.is_withdrawn or flight.is_erased):
            self._prompts.remember(flight, prompt, sequence.answer)
        flight.computed_at = time.monotonic()
        await self._finish(flight, prompt, finished)
        if not prompts.is_stateless(flight.request):
            self.bus.spawn(self._prefill_next_prompt(flight))

    async def _prepare(self, flight: InFlightRequest) -> tuple[PreparedPrompt, Sequence]:
        """
        Return the prompt and its sequence, already submitted to the engine. Raises ServiceError, or
        Stopped if the request is stopped; but a resumed answer is always prepared: its text so far
        must still be stored.
        """
        request, context = flight.request, Context()
        session_id = prompts.stored_session(request)
        if not request.resume and session_id is not None:
            # that of a response has no turns, but shows that it can be stored, and where
            reading = self._history.context(flight.tenant, session_id)
            with tracing.span("context", "client"):
                context = await flight.unless_stopped(reading)
            flight.epoch = context.epoch
            self._cancel_if_erased(flight)  # the message may have come before the context
        preparing = self._pool.run(flight.tenant, self._build_and_submit, flight, context)
        return await (preparing if request.resume else flight.unless_stopped(preparing))

    def _build_and_submit(
        self, flight: InFlightRequest, context: Context
    ) -> tuple[PreparedPrompt, Sequence]:
        """Runs in the pool's thread: going back through the event loop first would cost 0.3 ms."""
        prompt = self._prompts.build(flight, context)
        sequence = self._prompts.sequence(flight, prompt)
        flight.submitted_at, flight.sequence = time.monotonic(), sequence
        if flight.stop_reason:  # stopped before; a later `_interrupt` finds the sequence
            sequence.withdraw()
        self._engine.submit(sequence)
        return prompt, sequence

    async def _generate(self, flight: InFlightRequest, prompt: PreparedPrompt) -> Finished:
        """Forward the engine's outputs as events. Raises ServiceError."""
        while True:
            output = await flight.outputs.get()
            await self._connection.confirm()
            match output:
                case PrefillStarted(prompt_tokens, cached_tokens):
                    state = prompt.resume_state
                    kept, dropped = state.exchanges_kept, state.exchanges_dropped
                    fits = len(prompt.tokens) <= self.limits.max_resume_tokens
                    sent = state if fits else None
                    await flight.send(Started(prompt_tokens, cached_tokens, kept, dropped, sent))
                case AnswerChunk() as chunk:
                    await flight.send(_event(chunk, flight))
                case ConstraintFailure(message):
                    raise ServiceError("invalid_request", message)
                case ComputeFailure(message):
                    raise ServiceError("internal", message)
                case Finished() as finished:
                    return finished

    async def _finish(
        self, flight: InFlightRequest, prompt: PreparedPrompt, finished: Finished
    ) -> None:
        """Store the exchange, then send Done: so the session's next request sees the exchange."""
        if finished.reason == "cancelled" and flight.stop_reason:
            finished = finished._replace(reason=flight.stop_reason)
        self.flights.on_finished(finished.usage.completion_tokens)
        stored, other = await self._store(flight, prompt, finished)
        if other and _continues(flight, other):
            known = flight.answer.length
            for event in other.events():
                if rest := after_offset(event, known):
                    await flight.send(rest)
            finished = Finished(other.finish_reason, other.usage, other.timings, other.stop_string)
        elif other and not _is_same(flight, other):
            log.error("the log has another exchange of this request: the answer is not stored")
            stored = "failed"
        reason, usage, timings, stop_string = finished
        if reason == "timeout" and not flight.answer.length:
            raise _timed_out()
        log.info(
            "request finished reason=%s stop_string=%r prompt_tokens=%d completion_tokens=%d"
            " drafted_tokens=%d accepted_tokens=%d",
            reason,
            stop_string,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.drafted_tokens,
            usage.accepted_tokens,
        )
        dropped, length = prompt.resume_state.exchanges_dropped, flight.answer.length
        await flight.send(Done(reason, usage, timings, dropped, stored, length, stop_string))

    async def _store(
        self, flight: InFlightRequest, prompt: PreparedPrompt, finished: Finished
    ) -> AppendResult:
        """Append the exchange to the log, however it ended."""
        await self._connection.confirm()
        request, answer, state = flight.request, flight.answer, prompt.resume_state
        if flight.has_ended or flight.is_erased or not flight.session_key:
            return AppendResult("none")
        asked, results = prompts.asked(request)
        exchange = Exchange(
            previous=state.applied_seq,
            request_id=flight.request_id,
            attempt=subjects.attempt_of_reply(flight.reply),
            retry_of=request.retry_of,
            epoch=state.epoch,
            prompt=asked,
            response=request.prefix + answer.content if answer.length else "",
            asked_at=state.asked_at,
            answered_at=datetime.now(UTC),
            finish_reason=finished.reason,
            model=flight.variant.info,
            sampling=prompt.sampling,
            usage=finished.usage,
            timings=finished.timings,
            stop_string=finished.stop_string,
            reasoning=answer.reasoning,
            tool_calls=tuple(answer.tool_calls),
            tool_results=results,
            order=answer.order,
            prefix_length=len(request.prefix) if answer.length else 0,
            turn=request.turn,
            tools=self._stored_tools(request),
        )
        with tracing.span("append", "client"):
            return await self._history.append(
                flight.session_key, exchange, lambda: not flight.has_ended
            )

    def _stored_tools(self, request: ChatRequest) -> tuple[Tool, ...]:
        """Return the tools for the exchange's record; the turn of a response has its own."""
        tools = () if request.turn or request.tools is None else request.tools
        size = sum(len(encode(tool)) for tool in tools)
        return tools if size <= self.limits.max_stored_tools_bytes else ()

    async def _prefill_next_prompt(self, flight: InFlightRequest) -> None:
        """
        Prefill the session's next prompt, as far as it is known, once the worker is idle. The next
        request reports any error.
        """
        trace_context.current.set(None)  # the answer does not wait for it
        await asyncio.sleep(self.limits.idle_prefill_delay_seconds)
        async with self._idle_prefill:
            if self.flights or self._is_draining:
                return
            newest = self._admissions
            with suppress(ServiceError, TimeoutError):
                async with asyncio.timeout(self.limits.idle_context_timeout_seconds):
                    session_id = flight.request.session_id
                    context = await self._history.context(flight.tenant, session_id)
                idle_prompt = self._prompts.idle_prompt
                prompt = await self._pool.run(flight.tenant, idle_prompt, flight, context)
                is_newest = newest == self._admissions  # no request came meanwhile
                if prompt and is_newest and self.adapters.is_loaded(flight.variant):
                    self._engine.prefill_when_idle(prompt)

    # --- cancels ----------------------------------------------------------------------------------

    def _on_cancel(self, delivery: Delivery) -> None:
        key = ".".join(subjects.target_of(delivery.subject))
        cancel = decode(delivery.data or b"{}", Cancel)
        if cancel.worker_id not in (None, self.worker_id):
            return
        self._cancels.add(key, cancel)
        if flight := self.flights.get(key):
            self._cancel(flight, cancel)

    def _cancel(self, flight: InFlightRequest, cancel: Cancel) -> None:
        if cancel.reply not in (None, flight.reply):
            return
        if cancel != Cancel():
            flight.drop()
        self._interrupt(flight, "cancelled")

    def _interrupt(self, flight: InFlightRequest, reason: StopReason) -> None:
        """
        Stop a request before the engine's next step, or at once while it waits for a slot, since a
        step may take long. Runs in the event loop's thread.
        """
        flight.stop(reason)  # before looking for the sequence: see `_build_and_submit`
        if (sequence := flight.sequence) and sequence.withdraw():
            flight.outputs.put_nowait(Finished("cancelled", sequence.usage, sequence.timings))
        self._engine.cancel(flight.sequence_key)

    def _on_disconnected(self) -> None:
        """Drop all requests without storing anything: other workers may have resumed them."""
        if self.flights:
            log.warning("disconnected from NATS dropped_requests=%d", len(self.flights))
        for flight in self.flights.values():
            self.bus.spawn(self.bus.publish(flight.reply, DISCONNECTED))
            self._cancel(flight, Cancel(reply=flight.reply))

    def _on_erased(self, delivery: Delivery) -> None:
        """Cancel the session's answers, which are not stored, and drop what is kept of it."""
        erased = decode(delivery.data, SessionErased)
        tenant = subjects.tenant_of(delivery.subject)
        session_key = subjects.session_key(tenant, erased.session_id)
        self._replays.forget_session(tenant, erased.session_id)
        for flight in self.flights.values():
            if flight.session_key == session_key:
                flight.erased_epoch = max(flight.erased_epoch, erased.epoch)
                self._cancel_if_erased(flight)
        self._history.forget_session(session_key)
        self._prompts.forget_session(session_key)
        self._engine.forget_session(session_key)

    def _cancel_if_erased(self, flight: InFlightRequest) -> None:
        if flight.is_erased:
            self._history.forget_session(flight.session_key)
            self._interrupt(flight, "cancelled")

    # --- readers ----------------------------------------------------------------------------------

    def _on_replay(self, delivery: Delivery) -> None:
        """All workers are asked, and one that does not have the request stays silent."""
        if self.bus.has_reply_inbox(delivery) and (replay := self._replay(delivery)):
            self.bus.spawn(self.bus.publish(delivery.reply, replay))

    def _on_direct_replay(self, delivery: Delivery) -> None:
        self.bus.respond(delivery, self._replay_or_raise)

    async def _replay_or_raise(self, delivery: Delivery) -> Replay:
        if replay := self._replay(delivery):
            return replay
        raise ServiceError("not_found", "This worker does not have the request.")

    def _replay(self, delivery: Delivery) -> Replay | None:
        key = ".".join(subjects.target_of(delivery.subject))
        offset = decode(delivery.data or b"{}", ReplayRequest).offset
        if flight := self.flights.get(key):
            if flight.has_ended and not flight.recording.is_final:
                return None  # another worker resumes it
            flight.listeners.on_replay()
        return self._replays.get(key, offset)

    def _on_undelivered(self, delivery: Delivery) -> None:
        if delivery.headers.get("Status") != "503":
            return
        key, admission, number = subjects.undelivered_event(delivery.subject)
        flight = self.flights.get(key)
        if flight and flight.admission == admission:
            flight.listeners.on_missed(number)

    # --- engine and loops -------------------------------------------------------------------------

    def _dispatch(self, outputs: list[tuple[str, Output]]) -> None:
        for sequence_key, output in outputs:
            flight = self.flights.get(sequence_key.rpartition(".")[0])
            if flight and flight.sequence_key == sequence_key:
                flight.outputs.put_nowait(output)

    def _on_engine_death(self) -> None:
        for flight in self.flights.values():
            flight.outputs.put_nowait(ENGINE_STOPPED)
        self._is_dead = True
        self.fail("the engine died")

    async def _keep_alive(self) -> float:
        """Send Progress where it is due, and cancel requests without listeners."""
        interval = self.limits.keep_alive_seconds
        tick = interval / 4
        self._replays.evict()
        flights = list(self.flights.values())
        last = max((flight.queue_position for flight in flights), default=0)
        for flight in flights:
            if flight.listeners.are_gone:
                self._cancel(flight, Cancel())
            position = flight.queue_position
            if not position and flight.is_waiting:  # its prompt is still being prepared
                position = last = last + 1
            await flight.keep_alive(position, interval - tick)  # the next tick would be too late
        return tick


class Connection(Protocol):
    """What `ConnectionWatch` asks a Bus."""

    @property
    def confirmed_at(self) -> float: ...

    @property
    def seconds_since_reconnect(self) -> float: ...

    async def is_responsive(self) -> bool: ...


@dataclass(eq=False)
class ConnectionWatch:
    """
    Call `on_disconnected` when readers may have given up without this worker having heard it.

    A reader gives up after a silence, and cancels its attempt. So after a silence of more than
    `disconnected_seconds`, nothing may be sent or stored for a request before a new ping was
    answered over the same connection: then all cancels have come, and the silence was the worker's
    own. It was busy, or suspended (SIGSTOP, VM pause). Else the worker was disconnected.
    """

    bus: Connection
    on_disconnected: Callable[[], None]
    limits: InferenceLimits
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._heard_at = self.clock()
        self._asking = asyncio.Lock()

    async def step(self) -> float:
        """Check the connection. Return the seconds until the next check (SupervisedLoop)."""
        await self.bus.is_responsive()
        await self.confirm()
        return self.limits.connection_check_interval_seconds

    async def confirm(self) -> None:
        """Return at once; after a silence, once it is known whose it was."""
        if self._is_silent or self._asking.locked():
            async with self._asking:
                if self._is_silent:
                    await self._ask()
        self._heard_at = max(self._heard_at, self.bus.confirmed_at)

    @property
    def _is_silent(self) -> bool:
        """Whether NATS was silent for too long, up to now or to the last reconnect."""
        now = self.clock()
        reconnected_at = now - self.bus.seconds_since_reconnect
        heard_at = max(self._heard_at, self.bus.confirmed_at)
        silence = max(now - heard_at, reconnected_at - self._heard_at)
        return silence > self.limits.disconnected_seconds

    async def _ask(self) -> None:
        silent_since, asked_at = self._heard_at, self.clock()
        await self.bus.is_responsive()
        self._heard_at = self.clock()
        is_same = self.bus.seconds_since_reconnect > self._heard_at - silent_since
        if self.bus.confirmed_at < asked_at or not is_same:
            self.on_disconnected()


def _event(chunk: AnswerChunk, flight: InFlightRequest) -> AnswerEvent:
    offset, part, ids, logprobs, mu = chunk
    calls = len(flight.answer.tool_calls)
    match part:
        case ContentDelta(text):
            return Token(offset, text, ids, logprobs, mirostat_mu=mu)
        case ReasoningDelta(text):
            return Token(offset, text, ids, logprobs, "reasoning", mu)
        case CallStart(name, call_id):
            call_id = call_id or _call_id(flight.request_id, calls)
            return ToolCallDelta(
                offset, calls, ids, call_id, name, logprobs=logprobs, mirostat_mu=mu
            )
        case ArgumentsDelta(text):
            return ToolCallDelta(
                offset, calls - 1, ids, arguments=text, logprobs=logprobs, mirostat_mu=mu
            )


def _call_id(request_id: str, index: int) -> str:
    """
    Return the id of a tool call: the same in each attempt at the answer, and of nine letters and
    digits, as the templates of Mistral's models demand.
    """
    digest = hashlib.sha256(f"{request_id}.{index}".encode()).digest()
    return base64.b32encode(digest).decode()[:CALL_ID_LENGTH].lower()


def _is_same(flight: InFlightRequest, exchange: Exchange) -> bool:
    """Return whether a stored exchange has the request's prompt and its answer so far."""
    return _is_asked(flight, exchange) and Answer.of(exchange.events()) == flight.answer


def _continues(flight: InFlightRequest, exchange: Exchange) -> bool:
    """Return whether a stored exchange is the same answer, of the same or greater length."""
    is_answer = _is_asked(flight, exchange) and exchange.finish_reason != "failed"
    return is_answer and Answer.of(exchange.events()).starts_with(flight.answer)


def _is_asked(flight: InFlightRequest, exchange: Exchange) -> bool:
    return (exchange.prompt, exchange.tool_results) == prompts.asked(flight.request)


def _timed_out() -> ServiceError:
    return ServiceError("timeout", "The request timed out before its answer began: try again.")

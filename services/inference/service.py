"""
Chat requests from the bus: admission, one answer each, cancel, drain. Knows no HTTP and no Mongo.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Literal

from msgspec.structs import replace

from services.client.routing import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import (
    Accepted,
    Cancel,
    ChatRequest,
    Done,
    Failed,
    RequestAdmitted,
    ResumeState,
    Started,
    Timings,
    Token,
    Usage,
)
from services.inference import exchanges, origins, preparation
from services.inference.admission import Admission
from services.inference.calls import InFlightRequest, Stopped
from services.inference.cancels import Cancels
from services.inference.contact import NatsWatch
from services.inference.conversations import Conversations
from services.inference.engine.backend import ComputeFailure, ConstraintFailure
from services.inference.engine.engine import Engine, Finished, Output, PrefillStarted
from services.inference.engine.output.generated_text import TextChunk
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.models import LoadedModel
from services.inference.pool import Pool
from services.inference.readers import Readers
from services.inference.reception import Reception
from services.inference.sessions import HistoryClient, Kept
from services.inference.settings import InferenceSettings
from services.runtime import logs
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.supervised import Fail, SupervisedLoop

KEEP_ALIVE = 1.0  # seconds without an event after which a caller is sent a Progress
FINISH_DEADLINE = 22.0  # seconds that a draining worker gives to the answers it has begun
PREPARING = 2  # threads; they run in parallel only while a text is tokenized
AHEAD_AFTER = 0.2  # seconds after an answer without a request
NEVER = 86_400.0  # seconds; no answer takes a day
OUT_OF_TOUCH = Failed("worker_lost", "The worker was out of touch for too long: ask again.", 1)

log = logging.getLogger(__name__)


class ChatService:
    """Serves one model. `fail` ends the process, for example if the engine dies."""

    def __init__(
        self,
        bus: Bus,
        settings: InferenceSettings,
        worker_id: str,
        model: LoadedModel,
        workers: WorkerDirectory,
        fail: Fail,
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._worker_id = worker_id
        self._model = model
        self._sessions = HistoryClient(bus)
        places = settings.model_parallel + settings.model_queue
        self._pool = Pool("preparing", PREPARING, places)
        system = settings.chat_system_prompt
        self._conversations = Conversations(self._sessions, model, system, self._pool)
        self._calls: dict[str, InFlightRequest] = {}
        self._cancels = Cancels()
        self._attempts = 0
        self._admission = Admission(settings)
        self._reception = Reception(bus, worker_id, workers, self._admit)
        self._readers = Readers(bus, worker_id, self._calls)
        self._contact = NatsWatch(bus.is_responsive, self._lose_all)
        self._looking_ahead = asyncio.Lock()
        self._fail = fail
        self._loops = AsyncExitStack()
        self._dead = False
        self._draining = False
        loop = asyncio.get_running_loop()
        self._engine = Engine(
            model.backend,
            settings.model_parallel,
            settings.model_cache * 2**20,
            emit=lambda outputs: _from_thread(loop, self._hand_out, outputs),
            on_death=lambda: _from_thread(loop, self._die),
            public_prefixes=model.template.shared_prefixes(settings.chat_system_prompt.strip()),
        )

    @property
    def running(self) -> int:
        return sum(call.has_slot for call in self._calls.values())

    @property
    def waiting(self) -> int:
        return len(self._calls) - self.running

    @property
    def queued_tokens(self) -> int:
        return self._admission.work(self._calls.values())

    @property
    def tokens_per_second(self) -> float:
        return self._engine.tokens_per_second

    async def start(self) -> None:
        self._engine.start()
        for name, step in (("keep-alive", self._keep_alive), ("contact", self._contact.look)):
            loop = SupervisedLoop(name, step, self._fail)
            await self._loops.enter_async_context(loop.running(is_cancelled=True))
        await self._bus.subscribe(subjects.cancel(subjects.ANY, subjects.ANY), self._cancel)
        await self._readers.open()
        await self._reception.open(f"answers chat requests with {self._model.info.name}")

    async def drain(self) -> None:
        """Takes no more, finishes what it has begun, fails what can't be finished in time."""
        await self._bus.stop_serving()
        self._draining = True
        deadline = asyncio.get_running_loop().time() + FINISH_DEADLINE
        while self._calls and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for call in list(self._calls.values()):
            await call.fail(_shutting_down())
            self._interrupt(call, "cancelled")
        while self._calls:  # some may be about to use the model in a thread
            await asyncio.sleep(0.02)
        await self._loops.aclose()
        async with self._looking_ahead:  # which uses the model in a thread, too
            await self._pool.close()
            await asyncio.to_thread(self._engine.close)
            self._model.backend.close()

    def _admit(self, tenant: str, request: ChatRequest, reply: str) -> RequestAdmitted:
        """Decides by counts and bytes alone, before any work. Raises ServiceError."""
        sampling = self._settings.fill_in(request)
        sampling = replace(sampling, seed=origins.seed(request))
        adapter = self._model.adapter(request.model)
        preparation.check_counts(self._model, request)
        self._attempts += 1
        call = InFlightRequest(
            self._bus, tenant, request, sampling, adapter, reply, self._worker_id, self._attempts
        )
        if call.key in self._calls:
            raise ServiceError("conflict", f"Request {call.request_id} is being answered already.")
        if self._dead or self._draining:
            raise _shutting_down()
        self._admission.check(call, self._calls.values(), self._engine.tokens_per_second)
        self._calls[call.key] = call
        for cancel in self._cancels.of(call.key):  # it has overtaken its request
            self._stop(call, cancel)
        self._readers.begin(call)
        self._bus.spawn(self._answer(call))
        return RequestAdmitted(self.running, self.waiting)

    async def _answer(self, call: InFlightRequest) -> None:
        logs.request_id.set(call.request_id)
        deadline = self._deadline(call)
        try:
            await call.send(Accepted(call.request_id, self._worker_id))
            await self._converse(call)
        except Stopped:
            await self._end_unsaid(call)
        except ServiceError as error:
            log.warning("failed: %s", error)
            await call.fail(error)
        except Exception:
            log.exception("failed")
            await call.fail(ServiceError("internal", "The worker failed; its log says why."))
        finally:
            deadline.cancel()
            del self._calls[call.key]
            self._readers.end(call)
            self._engine.cancel(call.sequence_key)  # if it is still there

    async def _converse(self, call: InFlightRequest) -> None:
        resume = call.request.resume
        origin = resume.state if resume else await self._conversations.begin(call)
        sequence = await self._sequence(call, origin)
        if call.stop_reason:
            sequence.sampler.close()
            finished = Finished("cancelled", sequence.usage, sequence.timings)
        else:
            try:
                finished = await self._generate(call, origin, sequence)
            except ServiceError:
                await self._store(call, origin, exchanges.unfinished(call))
                raise
            self._conversations.remember(call, sequence.generated)
        await self._finish(call, origin, finished)
        if not prompts.is_stateless(call.request):
            self._bus.spawn(self._read_ahead(call))

    async def _sequence(self, call: InFlightRequest, origin: ResumeState) -> Sequence:
        """Raises ServiceError, or Stopped unless the answer is a resumed one."""
        preparing = self._pool.run(
            preparation.sequence, self._model, call, origin, discard=lambda s: s.sampler.close()
        )
        return await (preparing if call.request.resume else call.unless_stopped(preparing))

    async def _generate(
        self, call: InFlightRequest, origin: ResumeState, sequence: Sequence
    ) -> Finished:
        call.sequence = sequence
        self._engine.submit(call.sequence)
        while True:
            match await call.outputs.get():
                case PrefillStarted(prompt_tokens, cached_tokens):
                    await call.send(
                        Started(
                            prompt_tokens,
                            cached_tokens,
                            origin.exchanges_kept,
                            origin.exchanges_dropped,
                            origins.told(origin),
                        )
                    )
                case TextChunk(at, text, ids, logprobs):
                    await call.send(Token(at, text, ids, logprobs))
                case ConstraintFailure(message):
                    raise ServiceError("invalid_request", message)
                case ComputeFailure(message):
                    raise ServiceError("internal", f"The model failed: {message} Try again.")
                case Finished() as finished:
                    return finished

    async def _read_ahead(self, call: InFlightRequest) -> None:
        """A cut window, while nobody asks: it would have to be read before the next answer."""
        await asyncio.sleep(AHEAD_AFTER)
        async with self._looking_ahead:
            if self._calls or self._draining:
                return
            newest = self._attempts
            beginning = await self._conversations.ahead(call)
            if beginning and newest == self._attempts:  # else the conversation may have gone on
                self._engine.prefill_when_idle(beginning)

    async def _finish(self, call: InFlightRequest, origin: ResumeState, finished: Finished) -> None:
        """
        The exchange is in the log before the caller hears Done: so the next question finds
        it.
        """
        if finished.reason == "cancelled" and call.stop_reason:
            finished = finished._replace(reason=call.stop_reason)
        self._admission.has_ended(finished.usage.completion_tokens)
        stored, other = await self._store(call, origin, finished)
        if other and exchanges.goes_on(call, other):
            if rest := other.response[len(call.text) :]:
                await call.send(Token(len(call.text), rest, ()))  # nobody goes on after it
            finished = exchanges.end(other)
        elif other and not exchanges.is_same(call, other):
            log.error("the log has an exchange of this request that its caller has not heard")
            stored = "failed"
        reason, usage, timings, stop_string = finished
        if reason == "timeout" and not call.text:
            raise _too_late()
        log.info(
            "request finished reason=%s stop_string=%r prompt_tokens=%d completion_tokens=%d",
            reason,
            stop_string,
            usage.prompt_tokens,
            usage.completion_tokens,
        )
        dropped = origin.exchanges_dropped
        await call.send(Done(reason, usage, timings, dropped, stored, len(call.text), stop_string))

    async def _store(self, call: InFlightRequest, origin: ResumeState, finished: Finished) -> Kept:
        self._contact.check()
        if call.ended or prompts.is_stateless(call.request):
            return Kept("none")
        exchange = exchanges.of(call, origin, finished, self._model.served[call.adapter])
        return await self._sessions.append(call.session_key, exchange, lambda: not call.ended)

    async def _end_unsaid(self, call: InFlightRequest) -> None:
        if call.stop_reason == "timeout":
            await call.fail(_too_late())
        else:
            nothing = Usage(0, 0, 0)
            await call.send(Done("cancelled", nothing, Timings(0, 0, 0), 0, "none", 0))

    def _cancel(self, delivery: Delivery) -> None:
        key = ".".join(subjects.target_of(delivery.subject))
        cancel = decode(delivery.data or b"{}", Cancel)
        if cancel.worker_id not in (None, self._worker_id):
            return
        self._cancels.remember(key, cancel)
        if call := self._calls.get(key):
            self._stop(call, cancel)

    def _stop(self, call: InFlightRequest, cancel: Cancel) -> None:
        if cancel.reply not in (None, call.reply):
            return
        if cancel != Cancel():
            call.drop()
        self._interrupt(call, "cancelled")

    def _interrupt(self, call: InFlightRequest, reason: Literal["cancelled", "timeout"]) -> None:
        """Before the engine's next step; at once while it waits, since a step may take long."""
        call.stop(reason)
        if call.sequence and not call.has_slot:
            usage, timings = call.sequence.usage, call.sequence.timings
            call.outputs.put_nowait(Finished("cancelled", usage, timings))
        self._engine.cancel(call.sequence_key)

    def _deadline(self, call: InFlightRequest) -> asyncio.TimerHandle:
        seconds = call.request.timeout_s or NEVER
        return asyncio.get_running_loop().call_later(seconds, self._interrupt, call, "timeout")

    def _lose_all(self) -> None:
        """Others may have gone on with what is held here: nothing of it is said or stored now."""
        if self._calls:
            log.warning("was out of touch with NATS: drops %d answers", len(self._calls))
        for call in self._calls.values():
            self._bus.spawn(self._bus.publish(call.reply, OUT_OF_TOUCH))
            self._stop(call, Cancel(reply=call.reply))

    def _hand_out(self, outputs: list[tuple[str, Output]]) -> None:
        self._contact.check()
        for sequence_key, output in outputs:
            call = self._calls.get(sequence_key.rpartition(".")[0])
            if call and call.sequence_key == sequence_key:
                call.outputs.put_nowait(output)

    def _die(self) -> None:
        for call in self._calls.values():
            call.outputs.put_nowait(ComputeFailure("its engine died."))
        self._dead = True
        self._fail("the engine died")

    async def _keep_alive(self) -> float:
        tick = KEEP_ALIVE / 4
        self._readers.forget_old()
        calls = list(self._calls.values())
        last = max((call.place for call in calls), default=0)
        for call in calls:
            if call.audience.is_gone:
                self._stop(call, Cancel())
            place = call.place
            if not place and not call.has_slot:  # its prompt is still being prepared
                place = last = last + 1
            await call.keep_alive(place, KEEP_ALIVE - tick)  # the next round would be too late
        return tick


def _too_late() -> ServiceError:
    return ServiceError("timeout", "The answer had not begun when the request's time was over.", 1)


def _shutting_down() -> ServiceError:
    return ServiceError("shutting_down", "The worker is shutting down: ask again.", 1)


def _from_thread(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object
) -> None:
    loop.call_soon_threadsafe(callback, *arguments)

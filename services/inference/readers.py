"""
Who reads the answers: what they lack is said again, and it is noticed when nobody is left. Gives
no answer itself.
"""

from collections.abc import Mapping

from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import Replay, ReplayRequest, SessionErased
from services.inference.calls import InFlightRequest
from services.inference.replays import Replays
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery


class Readers:
    """`calls` are the worker's own, by key."""

    def __init__(self, bus: Bus, worker_id: str, calls: Mapping[str, InFlightRequest]) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._calls = calls
        self._replays = Replays()

    async def open(self) -> None:
        await self._bus.subscribe(subjects.replay(subjects.ANY, subjects.ANY), self._hear_replay)
        mine = subjects.worker_replay(self._worker_id, "*", "*")
        await self._bus.subscribe(mine, self._hear_direct_replay)
        await self._bus.subscribe(subjects.erased(subjects.ANY), self._hear_erased)
        await self._bus.subscribe(subjects.undelivered_any(self._worker_id), self._hear_unheard)

    def begin(self, call: InFlightRequest) -> None:
        self._replays.begin(call.key, call.recording)

    def end(self, call: InFlightRequest) -> None:
        """What others go on with, or nobody wants any more, is not kept."""
        if call.recording.is_whole:
            self._replays.end(call.key)
        else:
            self._replays.forget(call.key)

    def forget_old(self) -> None:
        self._replays.forget_old()

    def _hear_replay(self, delivery: Delivery) -> None:
        """All workers are asked: who does not know of it says nothing."""
        if self._bus.has_reply_inbox(delivery) and (replay := self._replay(delivery)):
            self._bus.spawn(self._bus.publish(delivery.reply, replay))

    def _hear_direct_replay(self, delivery: Delivery) -> None:
        self._bus.respond(delivery, self._replay_or_raise)

    async def _replay_or_raise(self, delivery: Delivery) -> Replay:
        if replay := self._replay(delivery):
            return replay
        raise ServiceError("not_found", "This worker does not know of the request.")

    def _replay(self, delivery: Delivery) -> Replay | None:
        key = ".".join(subjects.target_of(delivery.subject))
        at = decode(delivery.data or b"{}", ReplayRequest).offset
        if call := self._calls.get(key):
            if call.ended and not call.recording.is_whole:
                return None  # another's by now; here it is about to be forgotten
            call.audience.came()
        return self._replays.of(key, at)

    def _hear_erased(self, delivery: Delivery) -> None:
        erased = decode(delivery.data, SessionErased)
        self._replays.forget_session(subjects.tenant_of(delivery.subject), erased.session_id)

    def _hear_unheard(self, delivery: Delivery) -> None:
        if delivery.headers.get("Status") != "503":
            return
        key, attempt, number = subjects.undelivered_event(delivery.subject)
        call = self._calls.get(key)
        if call and call.attempt == attempt:
            call.audience.missed(number)

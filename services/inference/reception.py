"""Where requests arrive at a worker, and where they go: taken, passed on, or refused."""

from collections.abc import Callable
from uuid import uuid4

import msgspec

from services.client.routing import WorkerDirectory, offer, offer_in_turn
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, Failed, RequestAdmitted
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Endpoint

FORWARD_TIMEOUT = 0.1  # seconds that another worker has to take a request

Admit = Callable[[str, ChatRequest, str], RequestAdmitted]
"""Of (tenant, request, reply subject). Decides at once; raises ServiceError."""


class Reception:
    """
    A request that NATS picked this worker for may be another's to answer: it is passed on, once.
    What this worker alone was asked it takes or refuses.
    """

    def __init__(self, bus: Bus, worker_id: str, workers: WorkerDirectory, admit: Admit) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._workers = workers
        self._admit = admit

    async def open(self, description: str) -> None:
        await self._bus.subscribe(
            subjects.worker_request(self._worker_id, subjects.ANY), self._hear_direct
        )
        await self._bus.serve(
            "inference",
            description,
            [
                Endpoint("chat", subjects.request(subjects.OPEN_TENANT), self._receive),
                Endpoint("tenant-chat", subjects.request(subjects.ANY), self._receive),
            ],
        )

    async def _receive(self, delivery: Delivery) -> None:
        if not self._bus.has_reply_inbox(delivery):
            return
        try:
            tenant = subjects.tenant_of_request(delivery.subject)
            request = _read(tenant, delivery.data)
            order = self._order(tenant, request)
            if order[0] == self._worker_id:
                self._admit(tenant, request, delivery.reply)
            else:
                self._bus.spawn(self._find_taker(order, tenant, request, delivery.reply))
        except ServiceError as error:
            await self._refuse(delivery.reply, error)

    def _hear_direct(self, delivery: Delivery) -> None:
        self._bus.respond(delivery, self._take)

    async def _take(self, delivery: Delivery) -> RequestAdmitted:
        tenant = subjects.tenant_of(delivery.subject)
        reply = delivery.headers.get(subjects.REPLY_HEADER, "")
        if not subjects.is_reply(reply):
            raise ServiceError(
                "invalid_request", f"The header {subjects.REPLY_HEADER} must name an inbox."
            )
        return self._admit(tenant, _read(tenant, delivery.data), reply)

    def _order(self, tenant: str, request: ChatRequest) -> list[str]:
        """Raises ServiceError(model_not_found). This worker alone, if no report says otherwise."""
        key = prompts.routing_key(tenant, request)
        order = self._workers.rank(key, request.model)
        if not order and request.model and (names := self._workers.model_names()):
            raise ServiceError(
                "model_not_found",
                f"There is no model {request.model!r}; there is {', '.join(names)}.",
            )
        return order or [self._worker_id]

    async def _find_taker(
        self, order: list[str], tenant: str, request: ChatRequest, reply: str
    ) -> None:
        async def offering(worker_id: str) -> None:
            if worker_id == self._worker_id:
                self._admit(tenant, request, reply)
                return
            await offer(
                self._bus, self._workers, worker_id, tenant, request, reply, FORWARD_TIMEOUT
            )

        try:
            if await offer_in_turn(order, offering) is None:
                self._admit(tenant, request, reply)
        except ServiceError as error:
            await self._refuse(reply, error)

    async def _refuse(self, reply: str, error: ServiceError) -> None:
        await self._bus.publish(reply, Failed(error.code, error.message, error.retry_after))


def _read(tenant: str, data: bytes) -> ChatRequest:
    """With an id. Raises ServiceError."""
    if not subjects.is_id(tenant):
        raise ServiceError("invalid_request", f"{tenant!r} is not a valid tenant.")
    request = decode(data, ChatRequest)
    prompts.check(request)
    return msgspec.structs.replace(request, request_id=request.request_id or uuid4().hex)

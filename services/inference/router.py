"""Routes chat requests: accepts them here, forwards them to another worker, or rejects them."""

from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from msgspec.structs import replace

from services.client.routing import WorkerDirectory, offer, offer_in_turn
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, Failed, RequestAdmitted
from services.inference.limits import InferenceLimits
from services.inference.report_hub import ReportHub
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Endpoint

Admit = Callable[[str, ChatRequest, str], RequestAdmitted]
"""Admit (tenant, request, reply subject) at once, or raise ServiceError."""


@dataclass(eq=False)
class Router:
    """
    NATS hands a request to any worker of the queue group. That worker forwards it once, to the
    worker that has the session's prefix cached, as far as it knows from the workers' reports, which
    it may have to ask for. A request to this worker alone is never forwarded.
    """

    bus: Bus
    worker_id: str
    workers: WorkerDirectory
    reports: ReportHub
    limits: InferenceLimits
    admit: Admit

    async def start(self, description: str) -> None:
        await self.bus.subscribe(
            subjects.worker_request(self.worker_id, subjects.ANY),
            lambda delivery: self.bus.respond(delivery, self._admit_direct),
        )
        endpoints = [
            Endpoint("chat", subjects.request(subjects.OPEN_TENANT), self._route),
            Endpoint("tenant-chat", subjects.request(subjects.ANY), self._route),
        ]
        await self.bus.serve("inference", description, endpoints)

    async def _route(self, delivery: Delivery) -> None:
        if not self.bus.has_reply_inbox(delivery):
            return
        tenant = subjects.tenant_of_request(delivery.subject)
        try:
            request = _decode(tenant, delivery.data)
        except ServiceError as error:
            await self._reject(delivery.reply, error)
            return
        if self.reports.is_current:
            await self._assign(tenant, request, delivery.reply)
        else:
            self.bus.spawn(self._refresh_and_assign(tenant, request, delivery.reply))

    async def _refresh_and_assign(self, tenant: str, request: ChatRequest, reply: str) -> None:
        is_complete = await self.reports.refresh()
        await self._assign(tenant, request, reply, is_complete)

    async def _assign(
        self, tenant: str, request: ChatRequest, reply: str, is_complete: bool = True
    ) -> None:
        """`is_complete`: whether all workers are known."""
        try:
            candidates = self._candidates(tenant, request, is_complete)
            if candidates[0] == self.worker_id:
                self.admit(tenant, request, reply)
            else:
                self.bus.spawn(self._forward(candidates, tenant, request, reply))
        except ServiceError as error:
            is_unknown = error.code == "model_not_found" and not is_complete
            await self._reject(reply, _not_known_yet(request.model) if is_unknown else error)

    async def _admit_direct(self, delivery: Delivery) -> RequestAdmitted:
        tenant = subjects.tenant_of(delivery.subject)
        reply = delivery.headers.get(subjects.REPLY_HEADER, "")
        if not subjects.may_reply(tenant, reply):
            raise ServiceError(
                "invalid_request",
                f"The header {subjects.REPLY_HEADER} must name an inbox, and no other tenant's.",
            )
        return self.admit(tenant, _decode(tenant, delivery.data), reply)

    def _candidates(self, tenant: str, request: ChatRequest, is_complete: bool) -> list[str]:
        """
        Return the workers to try, best first; this one if no ready worker has reported, or if none
        of those that are known serves the model. Raises ServiceError if all are known and serve
        other models only, or the model is not ready.
        """
        candidates = self.workers.rank(prompts.routing_key(tenant, request), request.model)
        if not candidates and is_complete and self.workers.ready:
            raise self.workers.unavailable_error(request.model)
        return candidates or [self.worker_id]

    async def _forward(
        self, candidates: list[str], tenant: str, request: ChatRequest, reply: str
    ) -> None:
        timeout = self.limits.forward_timeout_seconds

        async def offer_to(worker_id: str) -> None:
            if worker_id == self.worker_id:
                self.admit(tenant, request, reply)
            else:
                await offer(self.bus, self.workers, worker_id, tenant, request, reply, timeout)

        try:
            if await offer_in_turn(candidates, offer_to) is None:
                self.admit(tenant, request, reply)
        except ServiceError as error:
            await self._reject(reply, error)

    async def _reject(self, reply: str, error: ServiceError) -> None:
        await self.bus.publish(reply, Failed(error.code, error.message, error.retry_after))


def _not_known_yet(model: str | None) -> ServiceError:
    message = f"No worker with the model {model!r} is known yet. Send the request again."
    return ServiceError("no_worker", message)


def _decode(tenant: str, data: bytes) -> ChatRequest:
    """Return the request, with a request id. Raises ServiceError."""
    if not subjects.is_id(tenant):
        raise ServiceError("invalid_request", f"{tenant!r} is not a valid tenant.")
    request = decode(data, ChatRequest)
    prompts.check(request)
    return replace(request, request_id=request.request_id or uuid4().hex)

"""Offers a request to workers, one after another, until one takes it. Reads no answer."""

from collections.abc import Awaitable, Callable, Iterable

from services.client.workers import WorkerDirectory
from services.contract import subjects
from services.contract.errors import ErrorCode, ServiceError
from services.contract.messages import Cancel, ChatRequest, RequestAdmitted
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders

ANOTHER_MAY: tuple[ErrorCode, ...] = ("overloaded", "shutting_down")
"""What one worker refuses with and another may not."""


class Unanswered(Exception):
    """The worker is gone, or said nothing in time."""


async def offer(
    bus: Bus,
    workers: WorkerDirectory,
    worker_id: str,
    tenant: str,
    request: ChatRequest,
    reply: str,
    timeout: float,
) -> None:
    """
    Returns once the worker has taken the request: its events go to `reply`. Raises ServiceError as
    it refuses, or Unanswered; should it come to itself later, it drops the request then.
    """
    assert request.request_id is not None
    subject = subjects.worker_request(worker_id, tenant)
    with workers.asked(worker_id):
        try:
            taken = await bus.request(
                subject, request, RequestAdmitted, timeout, {subjects.REPLY_HEADER: reply}
            )
        except NoResponders as error:
            workers.forget(worker_id)
            raise Unanswered from error
        except TimeoutError as error:
            cancel = subjects.cancel(tenant, request.request_id)
            await bus.publish(cancel, Cancel(worker_id, reply))
            raise Unanswered from error
    workers.taken(worker_id, taken)


async def first_to_take(
    order: Iterable[str], offering: Callable[[str], Awaitable[None]]
) -> str | None:
    """
    The id of the worker that took it, None if none answered. Raises ServiceError: one that every
    worker would refuse with, or, if all refused, that which asks for the shortest wait.
    """
    refusals = []
    for worker_id in order:
        try:
            await offering(worker_id)
            return worker_id
        except Unanswered:
            continue
        except ServiceError as error:
            if error.code not in ANOTHER_MAY:
                raise
            refusals.append(error)
    if refusals:
        raise min(refusals, key=lambda error: error.retry_after or 0)
    return None

"""
Asks a worker over NATS and reads its answer. Knows no HTTP, and nothing of what a worker does.

    async with Bus.connect("nats://127.0.0.1:4222", "my-service") as bus:
        client = ChatClient(bus)
        async with contextlib.aclosing(client.stream(ChatRequest(prompt="Hello"))) as events:
            async for event in events:
                match event:
                    case Token(text=text):
                        print(text, end="", flush=True)
                    case Failed(message=message):
                        print(message)
"""

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from uuid import UUID

from msgspec.structs import replace

from services.client.reader import JOIN_TIMEOUT, Reader, bus_unavailable
from services.client.replays import replay
from services.client.workers import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.messages import Cancel, ChatRequest, Done, Failed, Replay, StreamEvent
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders

log = logging.getLogger(__name__)


def new_request_id() -> str:
    """A uuid7 (Python has one from 3.14 on): ids sort by the time they were made."""
    milliseconds = time.time_ns() // 1_000_000
    bits = milliseconds << 80 | 0x7 << 76 | secrets.randbits(12) << 64
    return str(UUID(int=bits | 0b10 << 62 | secrets.randbits(62)))


class ChatClient:
    """
    Any number of requests at once, all of one tenant. The worker that a session's computed prompts
    are with is asked directly, as far as `workers` has heard reports; without any, NATS picks one,
    which passes the request on.
    """

    def __init__(
        self, bus: Bus, tenant: str = subjects.OPEN_TENANT, workers: WorkerDirectory | None = None
    ) -> None:
        self._bus = bus
        self._tenant = tenant
        self._workers = workers or WorkerDirectory()

    def stream(self, request: ChatRequest) -> AsyncGenerator[StreamEvent, None]:
        """
        The events of the answer. The last one is a Done or a Failed, whatever happens; nothing is
        raised. A worker that is lost is replaced by another, which goes on with the answer.

        Who leaves earlier (break, cancelled task, closed generator) ends the generation at once,
        or, with a grace, once nobody has come back by `resume` in that time. Iterate inside
        `contextlib.aclosing`, so that leaving closes the generator.
        """
        request = replace(request, request_id=request.request_id or new_request_id())

        async def ask(reader: Reader) -> None:
            _check(request)
            await reader.ask(request)

        return self._read(str(request.request_id), ask, is_cancelled=not request.grace_s)

    def resume(self, request_id: str, at: int = 0) -> AsyncGenerator[StreamEvent, None]:
        """
        The same of an answer that somebody asked for, from character `at` on: while it is given,
        and for a minute after its end. Failed(not_found), if no worker knows of it.
        """

        async def join(reader: Reader) -> None:
            _check_id(request_id)
            await reader.join()

        return self._read(request_id, join, is_cancelled=False, told=at)

    async def holder(self, request_id: str) -> Replay | None:
        """
        Return the replay of an answer that a worker generates, or finished in the last minute.
        Raises ServiceError.
        """
        _check_id(request_id)
        subject = subjects.replay(self._tenant, request_id)
        try:
            return await replay(self._bus, subject, 0, JOIN_TIMEOUT)
        except (NoResponders, TimeoutError):
            return None

    async def cancel(self, request_id: str) -> None:
        """
        Cancel a request of this tenant, whoever sent it; a finished one stays as it is. Raises
        ServiceError(not_found) for an invalid id.
        """
        _check_id(request_id)
        await self._bus.publish(subjects.cancel(self._tenant, request_id), Cancel())

    async def _read(
        self,
        request_id: str,
        begin: Callable[[Reader], Awaitable[None]],
        is_cancelled: bool,
        told: int = 0,
    ) -> AsyncGenerator[StreamEvent, None]:
        """`is_cancelled`: by who leaves before the end."""
        reader = Reader(self._bus, self._workers, self._tenant, request_id, told)
        ended = False
        try:
            if not self._bus.connected:
                raise bus_unavailable()
            await begin(reader)
            while not ended:
                event = await reader.next()
                ended = isinstance(event, Done | Failed)
                yield event
        except Exception as error:
            ended = True
            if not reader.has_joined:
                reader.abandon()
            yield _failed(request_id, error)
        finally:
            await reader.leave()
            if not ended and is_cancelled:
                # handed over: whoever is cancelled can't await anything here
                self._bus.spawn(self.cancel(request_id))


def _failed(request_id: str, error: Exception) -> Failed:
    if isinstance(error, ServiceError):
        return Failed(error.code, error.message, error.retry_after)
    log.error("reading the answer to %s failed", request_id, exc_info=error)
    return Failed("internal", "Reading the answer failed. See the log of this process.")


def _check_id(request_id: str) -> None:
    """Raises ServiceError. A space or line break in a subject would break the connection."""
    if not subjects.is_id(request_id):
        raise ServiceError("not_found", "There is no such request: the request id is invalid.")


def _check(request: ChatRequest) -> None:
    """
    Raises ServiceError if it could not even be sent. A Struct checks its fields only when it is
    decoded.
    """
    try:
        prompts.check(decode(encode(request), ChatRequest))
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ServiceError("invalid_request", "The prompt has characters that are none.") from error

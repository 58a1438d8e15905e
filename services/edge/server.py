"""uvicorn inside our own process: it serves and drains, and leaves the signals alone."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from litestar.types import ASGIApp

from services.runtime.bus import TASKS_DEADLINE
from services.runtime.process import DRAIN_DEADLINE
from services.runtime.settings import BadSetting
from services.runtime.supervised import Fail

# All in seconds. What is left of the drain is for the bus.
LEAVE_AFTER = (
    1.0  # in which it still serves, and says that it leaves: who routes can look elsewhere
)
STREAMS_DEADLINE = DRAIN_DEADLINE - TASKS_DEADLINE - LEAVE_AFTER - 2

KEEP_ALIVE = 75  # seconds; longer than proxies keep theirs, so that none asks on a closed one


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # runtime.process owns them


def bind(host: str, port: int) -> socket.socket:
    """Takes the address before anything else is started; nobody is let in yet."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise BadSetting(_why(host, port, error)) from error
        stack.pop_all()  # the caller's from here on
    return listener


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is taken, perhaps by another `just up`: end that one, or"
            f" choose another port with EDGE_PORT."
        )
    return f"EDGE_HOST={host!r} with EDGE_PORT={port} can't be used: {error.strerror}."


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp, listener: socket.socket, leaving: asyncio.Event, fail: Fail
) -> AsyncIterator[None]:
    """
    Serves until the body ends; calls `fail` if the server ends earlier. At the end it first says
    that it leaves (`leaving` is set), then closes the door, and waits for the streams that are
    open; those that take too long are cancelled.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(STREAMS_DEADLINE),
    )
    server = Server(config)
    listener.listen(config.backlog)
    serving = asyncio.create_task(server.serve([listener]))

    def ended(_: asyncio.Task[None]) -> None:
        if not server.should_exit:
            fail("the HTTP server ended")

    serving.add_done_callback(ended)
    try:
        yield
    finally:
        leaving.set()
        await asyncio.sleep(LEAVE_AFTER)
        server.should_exit = True
        await serving
        if late := server.server_state.tasks:  # cancelled, and now telling their workers so
            await asyncio.wait(late, timeout=1)

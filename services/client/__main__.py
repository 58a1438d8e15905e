"""
`just chat`: a chat in the terminal, over NATS.

The terminal is read by the main thread, and each answer gets an event loop and a connection of its
own: so Ctrl-C ends whatever is going on, and nothing has to be kept alive at the prompt.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator
from uuid import uuid4

import uvloop

from services.client.chat_client import ChatClient, new_request_id
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.messages import ChatRequest, Done, Failed, StreamEvent, Token
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.nats_url import parse_servers
from services.runtime.settings import InvalidSetting, ServiceSettings, load

with contextlib.suppress(ImportError):
    import readline  # arrow keys and prompt history

    # a paste of several lines is one prompt; Python disables this by default
    readline.parse_and_bind("set enable-bracketed-paste on")

CONNECT_TIMEOUT = 3.0  # seconds
REPORT_TIMEOUT = 1.5  # seconds; a worker reports once a second
INTERRUPTED = 128 + signal.SIGINT  # the exit code of shells
GRACE = 10.0  # seconds in which a connection that was lost may be there again


def main() -> None:
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    logging.getLogger("services.runtime").setLevel(logging.ERROR)  # said here in a sentence
    parser = argparse.ArgumentParser(prog="chat", description="Chat with the model, over NATS.")
    session_help = "the session to continue (default: a new one)"
    default = f"terminal {uuid4().hex[:8]}"
    parser.add_argument("--session", metavar="NAME", default=default, help=session_help)
    session_id = parser.parse_args().session
    answered = True
    try:
        url = load(ServiceSettings).nats_url
        print(uvloop.run(_greeting(url)))
        print(f"Session {session_id!r}. Ctrl-C stops an answer, Ctrl-D leaves.")
        answered = _converse(url, session_id)
    except (InvalidSetting, ConnectionError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print()
        sys.exit(INTERRUPTED)
    sys.exit(0 if answered else 1)


def _converse(url: str, session_id: str) -> bool:
    """Answer prompts until the input ends. Return whether every prompt got an answer."""
    all_answered = True
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return all_answered
        if not prompt.strip():
            continue
        try:
            request = ChatRequest(
                prompt=prompt, session_id=session_id, request_id=new_request_id(), grace_s=GRACE
            )
            all_answered &= uvloop.run(_answer(url, request))
        except KeyboardInterrupt:
            all_answered = False
            print("\n[stopped]")


async def _answer(url: str, request: ChatRequest) -> bool:
    """Print the answer. Return False if it failed or is incomplete."""
    answered = True
    async with _connect(url) as bus:
        client = ChatClient(bus)
        try:
            async with contextlib.aclosing(client.stream(request)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        answered, event = False, await _with_reason(bus, event)
                    _show(event)
        except asyncio.CancelledError:  # by Ctrl-C: nobody comes back within the grace
            bus.spawn(client.cancel(str(request.request_id)))
            raise
    print()
    return answered


async def _with_reason(bus: Bus, failed: Failed) -> Failed:
    """Replace `no_worker` by the reason that the workers report."""
    if failed.code != "no_worker":
        return failed
    reason = (await _heard(bus)).to_error(failed)
    return Failed(reason.code, reason.message)


async def _greeting(url: str) -> str:
    """Return a sentence that names the model, or says why there is none. Raises ConnectionError."""
    async with _connect(url) as bus:
        workers = await _heard(bus)
    return f"Model {workers.model.name}." if workers.model else workers.unavailable_error().message


async def _heard(bus: Bus) -> WorkerDirectory:
    """Return the workers once a ready one has reported, or after REPORT_TIMEOUT."""
    workers, ready = WorkerDirectory(), asyncio.Event()

    def hear(delivery: Delivery) -> None:
        workers.on_report(delivery)
        if workers.ready:
            ready.set()

    await bus.subscribe(subjects.report(subjects.ANY), hear)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REPORT_TIMEOUT):
            await ready.wait()
    return workers


def _show(event: StreamEvent) -> None:
    match event:
        case Token(text=text):
            print(text, end="", flush=True)
        case Failed(message=message):
            print(f"[{message}]", end="", flush=True)
        case Done() if note := cut_note(event):
            print(f"\n[{note}]", end="", flush=True)


def cut_note(done: Done) -> str | None:
    """Return what cut the answer, and the setting behind it; None if the model ended it."""
    match done.finish_reason:
        case "length":
            return f"cut off after {done.usage.completion_tokens} tokens (CHAT_MAX_TOKENS)"
        case "stop" if done.stop_string is not None:
            return f"stopped at {json.dumps(done.stop_string, ensure_ascii=False)} (CHAT_STOP)"
        case "loop":
            return "stopped because it repeated itself (CHAT_REPEAT_PENALTY)"
        case "timeout":
            return "stopped because its time was up (timeout_s)"
        case "cancelled":
            return "cancelled"
    return None


@contextlib.asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Bus]:
    """Raises ConnectionError, as Bus.connect would wait for ever."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                bus = await stack.enter_async_context(Bus.connect(url, "chat"))
        except TimeoutError as error:
            raise ConnectionError(
                f"NATS at {parse_servers(url)} can't be reached: start it with `just up`, or set"
                " NATS_URL or NATS_PORT."
            ) from error
        yield bus


if __name__ == "__main__":
    main()

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
import sys
from collections.abc import AsyncIterator
from uuid import uuid4

import uvloop

from services.client.chat import ChatClient, new_request_id
from services.contract.messages import ChatRequest, Done, Failed, StreamEvent, Token
from services.runtime.bus import Bus
from services.runtime.nats_url import parse_servers
from services.runtime.settings import BadSetting, BusSettings, load

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # arrow keys and a history at the prompt

CONNECT_TIMEOUT = 3.0  # seconds
GRACE = 10.0  # seconds in which a connection that was lost may be there again


def main() -> None:
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    logging.getLogger("services.runtime").setLevel(logging.ERROR)  # said here in a sentence
    parser = argparse.ArgumentParser(prog="chat", description="Chat with the model, over NATS.")
    parser.add_argument("--session", default=f"terminal {uuid4().hex[:8]}", help="one to go on")
    session_id = parser.parse_args().session
    try:
        url = load(BusSettings).nats_url
        uvloop.run(_check(url))
        print(f"Session {session_id!r}. Ctrl-C stops an answer, Ctrl-D leaves.")
        _converse(url, session_id)
    except (BadSetting, ConnectionError) as error:
        sys.exit(str(error))
    except (KeyboardInterrupt, EOFError):
        print()


def _converse(url: str, session_id: str) -> None:
    while True:
        prompt = input("> ")
        if not prompt.strip():
            continue
        try:
            request = ChatRequest(
                prompt=prompt, session_id=session_id, request_id=new_request_id(), grace_s=GRACE
            )
            uvloop.run(_answer(url, request))
        except KeyboardInterrupt:
            print("\n[stopped]")


async def _answer(url: str, request: ChatRequest) -> None:
    async with _connect(url) as bus:
        client = ChatClient(bus)
        try:
            async with contextlib.aclosing(client.stream(request)) as events:
                async for event in events:
                    _show(event)
        except asyncio.CancelledError:  # by Ctrl-C: nobody comes back within the grace
            bus.spawn(client.cancel(str(request.request_id)))
            raise
    print()


def _show(event: StreamEvent) -> None:
    match event:
        case Token(text=text):
            print(text, end="", flush=True)
        case Failed(message=message):
            print(f"[{message}]", end="", flush=True)
        case Done() if note := cut_note(event):
            print(f"\n[{note}]", end="", flush=True)


def cut_note(done: Done) -> str | None:
    """Return what cut the answer, and which setting changes that; None if the model ended it."""
    match done.finish_reason:
        case "length":
            return f"cut off after {done.usage.completion_tokens} tokens: CHAT_MAX_TOKENS"
        case "stop" if done.stop_string is not None:
            return f"stopped at {json.dumps(done.stop_string, ensure_ascii=False)}: CHAT_STOP"
        case "loop":
            return "stopped, because it repeated itself: CHAT_REPEAT_PENALTY"
        case "timeout":
            return "stopped, because its time was up: timeout_s"
        case "cancelled":
            return "cancelled"
    return None


async def _check(url: str) -> None:
    async with _connect(url):
        pass


@contextlib.asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Bus]:
    """Raises ConnectionError, as Bus.connect would wait for ever."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                bus = await stack.enter_async_context(Bus.connect(url, "chat"))
        except TimeoutError as error:
            raise ConnectionError(
                f"NATS at {parse_servers(url)} can't be reached:"
                " `just up` starts everything, NATS_URL names it."
            ) from error
        yield bus


if __name__ == "__main__":
    main()

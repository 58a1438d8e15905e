"""
`just chat`: chat with the model in the terminal, over NATS.

The main thread reads the terminal. Each answer gets an event loop and a NATS connection of its own,
so that Ctrl-C ends whatever is running and nothing needs to be kept alive at the prompt.
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
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.nats_url import parse_servers
from services.runtime.settings import InvalidSetting, ServiceSettings, load

with contextlib.suppress(ImportError):
    import readline  # arrow keys and prompt history

    # a paste of several lines is one prompt; Python disables this by default
    readline.parse_and_bind("set enable-bracketed-paste on")

CONNECT_SECONDS = 3.0
REPORT_SECONDS = 1.5  # workers report once a second
RECONNECT_SECONDS = 10.0  # an answer continues while its reader is disconnected
DIM, NORMAL = "\x1b[2m", "\x1b[22m"  # ANSI escape sequences
INTERRUPTED = 128 + signal.SIGINT  # a shell's exit code


def main() -> None:
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    # connection problems are reported here, in one sentence
    logging.getLogger("services.runtime").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(prog="chat", description="Chat with the model over NATS.")
    session_help = "the session to continue (default: a new one)"
    new_session = f"terminal-{uuid4().hex[:8]}"
    parser.add_argument("--session", metavar="NAME", default=new_session, help=session_help)
    session_id = parser.parse_args().session
    try:
        url = load(ServiceSettings).nats_url
        print(uvloop.run(_greeting(url)))
        print(f"Session {session_id} (continue it with --session).")
        print("Ctrl-C stops an answer, Ctrl-D exits.")
        sys.exit(0 if _converse(url, session_id) else 1)
    except (InvalidSetting, ConnectionError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print()
        sys.exit(INTERRUPTED)


def _converse(url: str, session_id: str) -> bool:
    """Answer prompts until the input ends. Return whether every prompt was answered."""
    all_answered = True
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return all_answered
        if not prompt.strip():
            continue
        request = ChatRequest(
            prompt=prompt,
            session_id=session_id,
            request_id=new_request_id(),
            grace_s=RECONNECT_SECONDS,
        )
        try:
            all_answered &= uvloop.run(_answer(url, request))
        except KeyboardInterrupt:
            all_answered = False
            print("\n[stopped]")


async def _answer(url: str, request: ChatRequest) -> bool:
    """Print the answer. Return False if it failed."""
    is_answered, printer = True, AnswerPrinter(sys.stdout.isatty())
    async with _connect(url) as bus:
        client = ChatClient(bus)
        try:
            async with contextlib.aclosing(client.stream(request)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        is_answered, event = False, await _explain(bus, event)
                    printer.show(event)
        except asyncio.CancelledError:  # by Ctrl-C: nobody will resume the answer
            bus.spawn(client.cancel(str(request.request_id)))
            raise
    print()
    return is_answered


async def _explain(bus: Bus, failed: Failed) -> Failed:
    """Replace `no_worker` by the reason that the workers report."""
    if failed.code != "no_worker":
        return failed
    reason = (await _wait_for_reports(bus)).unavailable_error()
    return Failed(reason.code, reason.message)


async def _greeting(url: str) -> str:
    """Return a sentence that names the model, or the reason why none is ready."""
    async with _connect(url) as bus:
        workers = await _wait_for_reports(bus)
    return f"Model {workers.model.name}." if workers.model else workers.unavailable_error().message


async def _wait_for_reports(bus: Bus) -> WorkerDirectory:
    """Return the workers once a ready one has reported, or after REPORT_SECONDS."""
    workers, is_ready = WorkerDirectory(), asyncio.Event()

    def on_report(delivery: Delivery) -> None:
        workers.on_report(delivery)
        if workers.ready:
            is_ready.set()

    await bus.subscribe(subjects.report(subjects.ANY), on_report)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(is_ready.wait(), REPORT_SECONDS)
    return workers


class AnswerPrinter:
    """
    Prints an answer while it is generated. Its reasoning is dimmed, and only shown on a terminal:
    piped output is the answer. Each tool call has a line of its own.
    """

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._section = ""  # content, reasoning, note, or the call with this index

    def show(self, event: StreamEvent) -> None:
        match event:
            case Token(channel="reasoning", text=text):
                if self._is_terminal:
                    self._print("reasoning", f"{DIM}{text}{NORMAL}")
            case Token(text=text):
                self._print("content", text)
            case ToolCallDelta(index=index, name=name, arguments=arguments):
                begin = f"[{name} " if name else ""
                self._print(f"call {index}", begin + arguments)
            case Failed(message=message):
                self._print("content", f"[{message}]")
            case Done():
                if note := cut_note(event):
                    self._print("note", f"[{note}]")
                self._close()

    def _print(self, section: str, text: str) -> None:
        if self._section not in ("", section):
            self._close()
            print()
        self._section = section
        print(text, end="", flush=True)

    def _close(self) -> None:
        if self._section.startswith("call"):
            print("]", end="", flush=True)


def cut_note(done: Done) -> str | None:
    """Return why the answer was cut and the setting that cuts it; None if the model ended it."""
    match done.finish_reason:
        case "length":
            tokens = done.usage.completion_tokens
            return f"cut off after {tokens} tokens (CHAT_MAX_TOKENS or MODEL_CONTEXT)"
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
    """Connect to NATS. Raises ConnectionError, where Bus.connect would wait forever."""
    async with contextlib.AsyncExitStack() as stack:
        connecting = stack.enter_async_context(Bus.connect(url, "chat"))
        try:
            bus = await asyncio.wait_for(connecting, CONNECT_SECONDS)
        except TimeoutError as error:
            raise ConnectionError(
                f"NATS at {parse_servers(url)} can't be reached: start it with `just up`, or set"
                " NATS_URL or NATS_PORT."
            ) from error
        yield bus


if __name__ == "__main__":
    main()

"""
`just chat`: chat with the model in the terminal, over NATS.

One event loop and one NATS connection last for the whole chat, so the reports of workers are known
at any time. Ctrl-C is a key at the prompt, and a signal else.

Exit codes: 0; 1 if an answer, or the connection, failed; 2 for invalid arguments; 130 if stopped.
"""

import signal

if __name__ == "__main__":  # until `run` is connected, Ctrl-C ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import termios
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import NoReturn

import uvloop

from services.contract.errors import ServiceError
from services.contract.version import COMMAND
from services.runtime.access import NatsAccess
from services.runtime.settings import InvalidSetting, ServiceSettings, load
from services.terminal.chat import (
    Chat,
    Outcome,
    Server,
    check_session_id,
    check_system_prompt,
    connect,
    new_session_id,
)
from services.terminal.commands import Commands, LeaveChat
from services.terminal.lines import LinePrompt
from services.terminal.output import AnswerView, Notes, is_dumb_terminal
from services.terminal.safe_text import clean_line

EXIT_CODES: dict[Outcome, int] = {"answered": 0, "failed": 1, "stopped": 128 + signal.SIGINT}
LOCAL_MODES = 3  # index in what termios.tcgetattr returns
READER_GONE = 128 + signal.SIGPIPE
EXITS = ("exit", "quit")
"""What a person types to leave, as at other prompts. With a space before it, it is a prompt."""


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """
    Have the terminal not show what is typed during an answer, which would tear the answer apart. It
    is the next prompt's, which also gets its keys: a terminal that waits for lines keeps no Ctrl-D.
    """
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[LOCAL_MODES] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class Turns:
    """Runs one answer or command at a time, which Ctrl-C stops."""

    def __init__(self, chat: Chat, whole_chat: asyncio.Task[int]) -> None:
        self._chat = chat
        self._whole_chat = whole_chat
        self._turn: asyncio.Task[Outcome] | None = None

    async def run(self, work: Coroutine[None, None, Outcome]) -> Outcome:
        self._turn = asyncio.create_task(work)
        try:
            with without_echo():
                await asyncio.wait({self._turn})
            return "stopped" if self._turn.cancelled() else self._turn.result()
        finally:
            self._turn = None

    def interrupt(self) -> None:
        """End an answer with its text so far; at a second time, or anything else, at once."""
        if not self._turn:
            self._whole_chat.cancel()
        elif not self._chat.stop_answer():
            self._turn.cancel()


def main() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # not all are UTF-8
    # connection problems are reported here, in one sentence
    logging.getLogger("services.runtime").setLevel(logging.ERROR)
    options = read_options(sys.argv[1:])
    try:
        settings = load(ServiceSettings)
        server = Server(settings.nats_url, NatsAccess.of(settings))
        sys.exit(uvloop.run(run(options, server)))
    except BrokenPipeError:
        _drop_output()
        sys.exit(READER_GONE)
    except (InvalidSetting, ConnectionError) as error:
        sys.exit(str(error))
    except OSError as error:
        _drop_output()
        sys.exit(f"The answer can't be written: {error.strerror}.")


def _drop_output() -> None:
    """Have the last flush, when Python exits, not fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Exits with 2 if they are invalid."""
    parser = argparse.ArgumentParser(
        prog=f"{COMMAND} chat",
        description="Chat with the model over NATS. With a question: answer it, and exit.",
    )
    parser.add_argument("question", nargs="*", help="ask only this")
    session_help = "the session to continue (default: a new one)"
    parser.add_argument("--session", metavar="NAME", default=new_session_id(), help=session_help)
    parser.add_argument("--model", metavar="NAME", help="the model, or an adapter: demo:pirate")
    parser.add_argument("--system", metavar="TEXT", help="set the session's system prompt")
    options = parser.parse_args(arguments)
    options.question = " ".join(options.question) if options.question else None
    for name in ("question", "session", "model"):
        if getattr(options, name) is not None and not getattr(options, name).strip():
            parser.error(f"the {name} is empty")
    try:
        check_session_id(options.session)
        check_system_prompt(options.system or "")
    except ServiceError as error:
        parser.error(error.message)
    return options


async def run(options: argparse.Namespace, server: Server) -> int:
    """Chat, and return the exit code. Raises ConnectionError."""
    notes = Notes(sys.stderr)
    whole_chat = asyncio.current_task()
    assert whole_chat
    try:
        async with connect(server) as bus:
            chat = Chat(bus, AnswerView(sys.stdout, notes), options.session, options.model)
            turns = Turns(chat, whole_chat)
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, turns.interrupt)
            await chat.listen()
            return await _chat(chat, turns, notes, options)
    except ServiceError as error:
        raise ConnectionError(error.message) from error
    except asyncio.CancelledError:
        notes.write()
        return EXIT_CODES["stopped"]


async def _chat(chat: Chat, turns: Turns, notes: Notes, options: argparse.Namespace) -> int:
    if options.system is not None:
        await chat.set_system_prompt(options.system)
    if options.question is not None:
        return EXIT_CODES[await turns.run(chat.ask(options.question))]
    return await _converse(chat, turns, notes)


async def _converse(chat: Chat, turns: Turns, notes: Notes) -> int:
    """
    Answer prompts until the input ends. A program that sends them gets the worst exit code; a
    person has seen all errors.
    """
    await _greet(chat, notes)
    commands, is_person, code = Commands(chat, notes), sys.stdin.isatty(), 0
    read = _reader(commands, notes)
    while True:
        try:
            line = await read()
            if not line.strip():
                continue
            if is_person and line.rstrip() in EXITS:
                return code
            outcome = await turns.run(commands.run(line))
        except (EOFError, LeaveChat):
            return code
        if is_person:
            continue
        if outcome == "stopped":
            return EXIT_CODES[outcome]
        code = max(code, EXIT_CODES[outcome])


def _reader(commands: Commands, notes: Notes) -> Callable[[], Awaitable[str]]:
    """Return what reads the next prompt. Raises EOFError at the end of the input."""
    if not sys.stdin.isatty():
        return LinePrompt(sys.stdin.fileno()).read
    if is_dumb_terminal():
        return LinePrompt(sys.stdin.fileno(), begin=notes.ask).read
    from services.terminal.prompt import TerminalPrompt, open_history  # takes 0.3 s to import

    return TerminalPrompt(commands.complete, open_history(notes)).read


async def _greet(chat: Chat, notes: Notes) -> None:
    """Name the model, or say why none answers."""
    try:
        notes.write(f"Model {clean_line(await chat.model_in_use())}.")
    except ServiceError as error:
        notes.write(error.message)
    notes.write(f"Session {clean_line(chat.session_id)} (continue it with --session).")
    notes.write("Ctrl-C stops an answer, Ctrl-D exits, /help lists commands.")


if __name__ == "__main__":
    main()

"""
What the terminal shows: answers on stdout, all else on stderr.

With styles only where the stream is a terminal, and NO_COLOR (https://no-color.org) is not set.
"""

import json
import math
import os
from collections.abc import Iterator
from typing import Protocol, TextIO

from rich.console import Console

from services.contract.messages import Done, Failed, Progress, StreamEvent, Token, ToolCallDelta
from services.terminal.markdown import THEME, MarkdownWriter
from services.terminal.safe_text import clean

BOLD, DIM, NORMAL = "\x1b[1m", "\x1b[2m", "\x1b[22m"
CLEAR_LINE = "\r\x1b[K"


class TextWriter(Protocol):
    def write(self, text: str) -> None:
        """Show more text."""

    def close(self) -> None:
        """End the line, if one has begun."""


class PlainWriter:
    """Writes text as it arrives, in one style."""

    def __init__(self, stream: TextIO, begin: str = "", end: str = "") -> None:
        self._stream = stream
        self._begin, self._end = begin, end
        self._is_in_line = False

    def write(self, text: str) -> None:
        if shown := clean(text):
            self._stream.write(f"{self._begin}{shown}{self._end}")
            self._stream.flush()
            self._is_in_line = not shown.endswith("\n")

    def close(self) -> None:
        if self._is_in_line:
            self._stream.write("\n")
            self._stream.flush()
        self._is_in_line = False


class Notes:
    """Everything that is no answer. On a terminal, a line about progress makes room for more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._is_styled = has_styles(stream)
        self._has_progress = False

    def write(self, text: str = "", is_strong: bool = False) -> None:
        """Write lines. Nothing in the text is a control sequence."""
        self.end_progress()
        begin, end = (BOLD, NORMAL) if self._is_styled and is_strong else ("", "")
        print(f"{begin}{clean(text)}{end}", file=self._stream, flush=True)

    def ask(self, prompt: str) -> None:
        """Show what a person types behind."""
        print(prompt, end="", file=self._stream, flush=True)

    def progress(self, text: str) -> None:
        """Show a line until something else is shown; only on a terminal with styles."""
        if self._is_styled:
            width = os.get_terminal_size(self._stream.fileno()).columns - 1
            shown = clean(text)[:width]
            print(f"{CLEAR_LINE}{DIM}{shown}{NORMAL}", end="", file=self._stream, flush=True)
            self._has_progress = True

    def end_progress(self) -> None:
        if self._has_progress:
            print(CLEAR_LINE, end="", file=self._stream, flush=True)
        self._has_progress = False

    def dimmed(self) -> PlainWriter:
        return PlainWriter(self._stream, *((DIM, NORMAL) if self._is_styled else ()))


def is_dumb_terminal() -> bool:
    """Return whether a terminal knows no control sequences, as in Emacs."""
    return os.environ.get("TERM") == "dumb"


def has_styles(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and not is_dumb_terminal()


class AnswerView:
    """
    Shows the events of one answer after the other. Reasoning is only shown to a reader at a
    terminal. Each tool call has a line of its own.
    """

    def __init__(self, stdout: TextIO, notes: Notes) -> None:
        self._notes = notes
        self._content: TextWriter = PlainWriter(stdout)
        if has_styles(stdout):
            console = Console(file=stdout, force_terminal=True, theme=THEME, highlight=False)
            self._content = MarkdownWriter(console)
        self._calls = PlainWriter(stdout)
        self._reasoning = notes.dimmed()
        self._section = ""  # content, reasoning, or the call with this index
        self._writer: TextWriter | None = None  # of the section

    def show(self, event: StreamEvent) -> None:
        match event:
            case Progress():
                self._show_progress(event)
            case Token(channel="reasoning", text=text):
                if self._notes.is_terminal:
                    self._write("reasoning", self._reasoning, text)
            case Token(text=text):
                self._write("content", self._content, text)
            case ToolCallDelta(index=index, name=name, arguments=arguments):
                begin = f"[{name} " if name else ""
                self._write(f"call {index}", self._calls, begin + arguments)
            case Failed(code="overloaded", message=message, retry_after=float(seconds)):
                self.note(f"{message} Expected wait: {math.ceil(seconds)} s.")
            case Failed(message=message):
                self.note(message)
            case Done():
                self.end()
                for note in end_notes(event):
                    self.note(note)

    def note(self, text: str) -> None:
        """End the section, and show a line about the answer."""
        self.end()
        self._notes.write(f"[{text}]", is_strong=True)

    def end(self) -> None:
        """End the section, and with it the line."""
        self._notes.end_progress()
        if self._section.startswith("call"):
            self._calls.write("]")
        if self._writer:
            self._writer.close()
        self._section, self._writer = "", None

    def _write(self, section: str, writer: TextWriter, text: str) -> None:
        if self._section != section:
            self.end()
        self._section, self._writer = section, writer
        writer.write(text)

    def _show_progress(self, progress: Progress) -> None:
        """Say what a request waits for; once text has arrived there is nothing to wait for."""
        if self._section:
            return
        if progress.queue_position:
            self._notes.progress(f"waiting: number {progress.queue_position} in the queue")
        elif progress.prefilled_tokens:
            share = progress.prefilled_tokens / progress.prompt_tokens
            self._notes.progress(
                f"reading the prompt: {share:.0%} of {progress.prompt_tokens} tokens"
            )


def end_notes(done: Done) -> Iterator[str]:
    """Yield what a reader should know about the end of an answer."""
    if note := cut_note(done):
        yield note
    if done.stored == "failed":
        yield "not stored: the session continues without this answer"


def cut_note(done: Done) -> str | None:
    """
    Return why the answer ends where it does, and the setting that cuts it; None if the model ended
    it with text.
    """
    match done.finish_reason:
        case "length":
            tokens = done.usage.completion_tokens
            return f"cut off after {tokens} tokens (CHAT_MAX_TOKENS or MODEL_CONTEXT)"
        case "stop" if done.stop_string is not None:
            return f"stopped at {json.dumps(done.stop_string, ensure_ascii=False)} (CHAT_STOP)"
        case "stop" if done.length == 0:
            return "the answer is empty: the model ended it at once"
        case "loop":
            return "stopped because it repeated itself (CHAT_REPEAT_PENALTY)"
        case "timeout":
            return "stopped because its time was up (timeout_s)"
        case "cancelled":
            return "stopped"
    return None

"""Prompts that a person types at a terminal, with prompt_toolkit."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from services.terminal.lines import CONTINUATION, PROMPT, is_open, unquoted
from services.terminal.output import Notes


class TerminalPrompt:
    """Reads prompts at a terminal. Enter sends; Alt-Enter, a paste and `\"\"\"` make lines."""

    def __init__(self, complete: Callable[[str], list[str]], history: History) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=history,
            multiline=True,
            prompt_continuation=CONTINUATION,
            key_bindings=_keys(),
            completer=_CommandCompleter(complete),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would move the prompt up
            enable_suspend=True,
            output=create_output(always_prefer_tty=True),  # stdout may be a pipe
        )

    async def read(self) -> str:
        """Return the next prompt; "" if the line was cleared. Raises EOFError."""
        try:
            # Ctrl-C is a key here; a signal is for the whole program
            return unquoted(await self._session.prompt_async(PROMPT, handle_sigint=False))
        except KeyboardInterrupt:
            return ""


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # typed during an answer, while the terminal turns \r into \n
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class _CommandCompleter(Completer):
    def __init__(self, complete: Callable[[str], list[str]]) -> None:
        self._complete = complete

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/"):
            _, space, argument = text.partition(" ")
            begin = argument if space else text
            for each in self._complete(text):
                yield Completion(each, start_position=-len(begin))


def open_history(notes: Notes) -> History:
    """
    Return the prompts of earlier chats, from a file that only the user can read:
    `finetunellm/chat-history` in the folder for states of programs
    (https://specifications.freedesktop.org/basedir-spec/latest/).
    """
    folder = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(folder).expanduser() / "finetunellm" / "chat-history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.read_bytes()
    except OSError as error:
        notes.write(f"Prompts are not kept: {path} can't be used: {error.strerror}.")
        return InMemoryHistory()
    return FileHistory(path)

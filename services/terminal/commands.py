"""The commands of the terminal: `/name argument`."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from msgspec import ValidationError

from services.contract.errors import ServiceError
from services.contract.history import Session
from services.terminal.chat import (
    Chat,
    Outcome,
    check_session_id,
    check_system_prompt,
    new_session_id,
)
from services.terminal.output import Notes
from services.terminal.safe_text import clean, clean_line

MAX_TITLE = 50  # characters
MAX_PREVIEW = 200
EXIT_NAMES = ("quit", "bye")  # of `/exit` in other programs
_COMMAND = re.compile(r"/([^/\s]+)(?:\s+(.*))?", re.DOTALL)  # not a path such as /usr/bin


class LeaveChat(Exception):
    """The user has said `/exit`."""


class Command(NamedTuple):
    argument: str
    help: str
    run: Callable[[str], Awaitable[Outcome | None]]


class Commands:
    """Runs commands, and completes them."""

    def __init__(self, chat: Chat, notes: Notes) -> None:
        self._chat = chat
        self._notes = notes
        self._listed: list[Session] = []
        self._table = {
            "sessions": Command(
                "[NUMBER or NAME]", "list the sessions, or continue one", self._sessions
            ),
            "new": Command("", "begin a new session", self._new),
            "model": Command("[NAME]", "list the models, or choose one", self._model),
            "system": Command(
                "[TEXT]",
                "set the system prompt; without TEXT: the server's",
                self._system,
            ),
            "retry": Command("", "replace the last answer by another one", self._retry),
            "good": Command("", "rate the last answer up", self._good),
            "bad": Command("[REASON]", "rate it down, and say why", self._bad),
            "correct": Command("TEXT", "say what it should have been", self._correct),
            "export": Command("FILE", "write the session to a file, as JSON Lines", self._export),
            "help": Command("", "show this list", self._help),
            "exit": Command("", "leave; so does Ctrl-D", self._exit),
        }

    async def run(self, line: str) -> Outcome:
        """Run a command, or answer a prompt. Raises LeaveChat."""
        command = _COMMAND.fullmatch(line.rstrip())
        try:
            if command is None:
                return await self._chat.ask(line)
            return await self._run(command[1], (command[2] or "").strip()) or "answered"
        except ServiceError as error:
            self._notes.write(f"[{error.message}]", is_strong=True)
            return "failed"

    async def _run(self, name: str, argument: str) -> Outcome | None:
        command = self._table.get("exit" if name in EXIT_NAMES else name)
        if command is None:
            text = f"No command /{name}: /help lists them, and a space before it sends it."
            raise ServiceError("invalid_request", text)
        if argument and not command.argument:
            raise ServiceError("invalid_request", f"/{name} takes no argument.")
        return await command.run(argument)

    def complete(self, text: str) -> list[str]:
        """Return the commands, or their arguments, that begin with the text."""
        name, space, argument = text.partition(" ")
        if not space:
            names = (
                f"/{each} " if row.argument else f"/{each}" for each, row in self._table.items()
            )
            return [each for each in names if each.startswith(name)]
        known: dict[str, list[str]] = {
            "/model": self._chat.model_names(),
            "/sessions": [session.id for session in self._listed],
        }
        # a name with unsafe characters would be typed into the line
        return [
            each
            for each in known.get(name, [])
            if each.startswith(argument) and clean(each) == each
        ]

    async def _sessions(self, argument: str) -> None:
        if not argument:
            return await self._list_sessions()
        await self._switch(self._session_named(argument))

    async def _list_sessions(self) -> None:
        page = await self._chat.sessions()
        self._listed = list(page.sessions)
        if not page.sessions:
            return self._notes.write("There are no sessions yet.")
        self._notes.write(f"      {'last activity':16}  prompts  session")
        for number, session in enumerate(page.sessions, 1):
            mark = "*" if session.id == self._chat.session_id else " "
            title = clean_line(session.title)[:MAX_TITLE]
            when = session.last_activity.astimezone().strftime("%Y-%m-%d %H:%M")
            name = clean_line(session.id)
            self._notes.write(f"{mark}{number:3}  {when}  {session.exchanges:7}  {name}  {title}")
        if page.next:
            self._notes.write("Older ones can be continued by name.")

    def _session_named(self, argument: str) -> str:
        if argument.isdecimal() and 0 < int(argument) <= len(self._listed):
            return self._listed[int(argument) - 1].id
        check_session_id(argument)
        return argument

    async def _switch(self, session_id: str) -> None:
        self._chat.switch(session_id)
        last = await self._chat.last_exchange()
        self._notes.write(f"Session {clean_line(session_id)}" + ("." if last else ", a new one."))
        if last:
            self._notes.write(f"> {clean_line(last.user_prompt)[:MAX_PREVIEW]}")
            self._notes.write(clean_line(last.model_response)[:MAX_PREVIEW])

    async def _new(self, argument: str) -> None:
        await self._switch(new_session_id())

    async def _model(self, argument: str) -> None:
        if argument:
            await self._chat.choose_model(argument)
            return self._notes.write(f"Model {clean_line(argument)}.")
        in_use = await self._chat.model_in_use()
        for name in self._chat.model_names():
            self._notes.write(f"{'*' if name == in_use else ' '} {clean_line(name)}")

    async def _system(self, argument: str) -> None:
        check_system_prompt(argument)
        await self._chat.set_system_prompt(argument or None)
        self._notes.write(f"The {'session' if argument else 'server'}'s system prompt applies.")

    async def _retry(self, argument: str) -> Outcome:
        return await self._chat.retry()

    async def _good(self, argument: str) -> None:
        await self._give_feedback(rating="up")

    async def _bad(self, argument: str) -> None:
        await self._give_feedback(rating="down", **({"reason": argument} if argument else {}))

    async def _correct(self, argument: str) -> None:
        if not argument:
            raise ServiceError("invalid_request", "Give the text: /correct Hello!")
        await self._give_feedback(correction=argument)

    async def _give_feedback(self, **fields: str) -> None:
        try:
            await self._chat.give_feedback(**fields)
        except ValidationError as error:
            raise ServiceError("invalid_request", f"It is too long: {error}.") from error
        self._notes.write("The feedback is stored.")

    async def _export(self, argument: str) -> None:
        if not argument:
            raise ServiceError("invalid_request", "Name a file: /export chat.jsonl.")
        path = Path(argument).expanduser()
        try:
            count = await self._chat.export(path)
        except FileExistsError as error:
            message = f"{path} exists: choose another name."
            raise ServiceError("conflict", message) from error
        except OSError as error:
            message = f"{path} can't be written: {error.strerror}."
            raise ServiceError("invalid_request", message) from error
        self._notes.write(f"{count} exchanges in {clean_line(str(path))}.")

    async def _help(self, argument: str) -> None:
        for name, command in self._table.items():
            self._notes.write(f"  {f'/{name} {command.argument}':26} {command.help}")
        self._notes.write('Alt-Enter begins a line, as does Enter after """ until the next """.')
        self._notes.write("Ctrl-C stops an answer, or clears the line.")

    async def _exit(self, argument: str) -> None:
        raise LeaveChat

"""Commands on a scripted worker and a scripted history."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec import Struct
from msgspec.structs import replace

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import (
    DescribeRequest,
    Exchange,
    ExchangePage,
    ExchangeView,
    ExportPage,
    ExportRequest,
    MessagesRequest,
    Session,
    SessionPage,
    SessionsRequest,
)
from services.contract.messages import Failed, ModelInfo, Progress, Sampling, Timings, Token, Usage
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Endpoint
from services.terminal.chat import Chat
from services.terminal.commands import Commands, LeaveChat
from services.terminal.output import AnswerView, Notes
from tests.fakes import (
    ACCEPTED,
    DONE,
    HELLO,
    Script,
    direct_worker,
    report,
    reporting,
    scripted_worker,
)

NOW = datetime.now(UTC)
USAGE, TIMINGS = Usage(1, 1, 0), Timings(0, 0, 0)
VIEW = ExchangeView("r1", "s", "hi\n", "Hello \x1b[2J", NOW, "stop", "demo", USAGE)
EXCHANGE = Exchange(
    previous=0,
    request_id="r1",
    epoch=0,
    prompt="hi",
    response="Hello",
    asked_at=NOW,
    answered_at=NOW,
    finish_reason="stop",
    model=None,
    sampling=Sampling(),
    usage=USAGE,
    timings=TIMINGS,
)
SESSIONS = (
    Session("s1", "Über \x1b]0;t\x07 uns", None, 2, NOW),
    Session("two words", "x" * 200, None, 1, NOW),
)


class FakeHistory:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.last: ExchangeView | None = VIEW
        self.exports: list[ExportPage | ServiceError] = []
        self.described: list[DescribeRequest] = []

    async def serve(self) -> None:
        add = self._bus.endpoint
        endpoints = [
            add("messages", subjects.history("messages", "_"), MessagesRequest, self._messages),
            add("sessions", subjects.history("sessions", "_"), SessionsRequest, self._sessions),
            add("export", subjects.history("export", "_"), ExportRequest, self._export),
            add("describe", subjects.history("describe", "_"), DescribeRequest, self._describe),
        ]
        await self._bus.serve("history", "scripted", endpoints)

    async def _messages(self, subject: str, request: Struct) -> ExchangePage:
        return ExchangePage((self.last,) if self.last else ())

    async def _sessions(self, subject: str, request: Struct) -> SessionPage:
        return SessionPage(SESSIONS, "1-1")

    async def _export(self, subject: str, request: Struct) -> ExportPage:
        page = self.exports.pop(0)
        if isinstance(page, ServiceError):
            raise page
        return page

    async def _describe(self, subject: str, request: DescribeRequest) -> Session:
        self.described.append(request)
        return SESSIONS[0]


class Setup:
    """The commands of a chat, and what they show."""

    def __init__(self, bus: Bus) -> None:
        self.answers, self.errors = io.StringIO(), io.StringIO()
        self.history = FakeHistory(bus)
        notes = Notes(self.errors)
        self.chat = Chat(bus, AnswerView(self.answers, notes), "s", None)
        self.commands = Commands(self.chat, notes)

    async def run(self, line: str) -> str:
        """Return the outcome, and what was written to stderr."""
        self.errors.truncate(0)
        self.errors.seek(0)
        outcome = await self.commands.run(line)
        return f"{outcome}: {self.errors.getvalue()}"


@asynccontextmanager
async def setup(nats_url: str) -> AsyncIterator[Setup]:
    async with Bus.connect(nats_url, "chat") as bus:
        made = Setup(bus)
        await made.history.serve()
        await made.chat.listen()
        yield made


async def test_sessions_are_listed_and_continued(nats_url: str) -> None:
    async with setup(nats_url) as made:
        listed = await made.run("/sessions")
        assert (
            "prompts  session\n   1  " in listed
            and "s1  Über ␛]0;t␇ uns" in listed
            and "\x1b" not in listed
        )
        assert "two words  " + "x" * 50 + "\n" in listed and "Older ones" in listed
        assert made.commands.complete("/sessions t") == ["two words"]
        switched = await made.run("/sessions 2")
        assert switched == "answered: Session two words.\n> hi\nHello ␛[2J\n"
        assert made.chat.session_id == "two words"
        made.history.last = None
        assert "Session 7, a new one." in await made.run("/sessions 7"), "a name"
        assert "at most 128" in await made.run(f"/sessions {'x' * 129}")
        await made.run("/new")
        assert made.chat.session_id.startswith("terminal-")


async def test_system_prompt_is_set_and_reset(nats_url: str) -> None:
    async with setup(nats_url) as made:
        await made.run("/system Be\nshort.")
        await made.run("/system")
        prompts = [each.description.system_prompt for each in made.history.described]
        assert prompts == ["Be\nshort.", None]
        assert "at most 16,384" in await made.run(f"/system {'x' * 16_385}")


async def test_retry_replaces_the_last_answer(nats_url: str) -> None:
    async with setup(nats_url) as made, scripted_worker(nats_url, HELLO) as worker:
        assert await made.run("/retry") == "answered: "
        ((_, request),) = worker.requests
        assert (request.prompt, request.retry_of) == ("hi\n", "r1")
        made.history.last = None
        assert "no answer to retry" in await made.run("/retry")


@pytest.mark.parametrize(
    "script",
    [(Failed("overloaded", "Full."),), (ACCEPTED, replace(DONE, stored="failed"))],
    ids=["failed", "not stored"],
)
async def test_retry_asks_an_unstored_prompt_anew(nats_url: str, script: Script) -> None:
    async with setup(nats_url) as made, scripted_worker(nats_url, script) as worker:
        await made.run("first")
        await made.run("/retry")
        (_, first), (_, second) = worker.requests
        assert (second.prompt, second.retry_of) == ("first", None)
        assert first.request_id != second.request_id
        made.history.last = replace(VIEW, id=str(second.request_id))  # it was stored after all
        await made.run("/retry")
        assert worker.requests[-1][1].retry_of == second.request_id


async def test_stop_that_no_worker_confirms_ends_the_answer(bus: Bus, nats_url: str) -> None:
    async def count(reply: str) -> None:
        for event in (ACCEPTED, Token(0, "one", (1,)), *[Progress(0, 1, 1)] * 20):
            await bus.publish(reply, event)
            await asyncio.sleep(0.2)

    requested = asyncio.Event()

    async def on_request(delivery: Delivery) -> None:
        bus.spawn(count(delivery.reply))
        requested.set()

    async with setup(nats_url) as made:
        await bus.serve("inference", "deaf", [Endpoint("c", subjects.request("_"), on_request)])
        running = asyncio.create_task(made.run("count"))
        await requested.wait()
        assert made.chat.stop_answer()
        assert await running == "stopped: [stopped, but no worker confirms it]\n"


async def test_model_is_chosen_from_those_of_workers(bus: Bus, nats_url: str) -> None:
    model = ModelInfo("demo", "digest", 2048, 1000, ("pirate", "\x1b]0;t\x07"))
    async with (
        setup(nats_url) as made,
        direct_worker(nats_url, "w", HELLO) as worker,
        reporting(bus, report("w", model)),
    ):
        listed = await made.run("/model")
        assert "* demo\n" in listed and "demo:pirate\n" in listed and "demo:␛]0;t␇" in listed
        assert made.commands.complete("/model ") == ["demo", "demo:pirate"], "unsafe ones are not"
        assert await made.run("/model demo:pirate@0.5") == "answered: Model demo:pirate@0.5.\n"
        await made.run("hi")
        assert worker.requests[-1][1].model == "demo:pirate@0.5"
        refused = await made.run("/model other")
        assert refused.startswith("failed: [") and "'other'" in refused and "demo" in refused
        assert made.chat.model == "demo:pirate@0.5"


async def test_export_writes_a_new_private_file(nats_url: str, tmp_path: Path) -> None:
    async with setup(nats_url) as made:
        made.history.exports = [ExportPage((EXCHANGE,), "1-1"), ExportPage((EXCHANGE, EXCHANGE))]
        path = tmp_path / "a b.jsonl"
        assert await made.run(f"/export {path}") == f"answered: 3 exchanges in {path}.\n"
        assert path.read_text().count('"request_id":"r1"') == 3 and path.stat().st_mode & 0o77 == 0
        assert "exists: choose another name" in await made.run(f"/export {path}")
        assert "can't be written" in await made.run(f"/export {tmp_path}/no/x")
        made.history.exports = [ExportPage((EXCHANGE,), "1-1"), ServiceError("internal", "Away.")]
        assert await made.run(f"/export {tmp_path}/half") == "failed: [Away.]\n"
        assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/nothing", "No command /nothing: /help lists them"),
        ("/export", "Name a file"),
        ("/retry now", "/retry takes no argument"),
        ("/\x1b]0;t\x07", "No command /␛]0;t␇"),
    ],
)
async def test_invalid_command_is_explained(nats_url: str, line: str, shown: str) -> None:
    async with setup(nats_url) as made:
        result = await made.run(line)
        assert result.startswith("failed: [") and shown in result


@pytest.mark.parametrize("line", [" /help", "/usr/bin is what?", "// x", "say /help"])
async def test_slash_elsewhere_is_a_prompt(nats_url: str, line: str) -> None:
    async with setup(nats_url) as made, scripted_worker(nats_url, HELLO) as worker:
        assert await made.run(line) == "answered: "
        assert worker.requests[0][1].prompt == line and made.answers.getvalue() == "Grüß dich\n"


async def test_help_and_completion_know_every_command(nats_url: str) -> None:
    async with setup(nats_url) as made:
        shown = await made.run("/help")
        names = [name.strip() for name in made.commands.complete("/")]
        assert len(names) == 11 and all(f"  {name} " in shown for name in names)
        assert made.commands.complete("/se") == ["/sessions "]
        for name in ("/exit", "/quit", "/bye"):
            with pytest.raises(LeaveChat):
                await made.run(name)


async def test_history_that_is_away_is_an_error(nats_url: str) -> None:
    async with Bus.connect(nats_url, "chat") as bus:
        made = Setup(bus)
        assert "history service does not reply" in await made.run("/sessions")

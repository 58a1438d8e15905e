"""The terminal chat as a process, in a pipe and on a terminal, on fake workers."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from services.contract import subjects
from services.contract.messages import Failed, ModelInfo, WorkerReport
from services.runtime.bus import Bus
from services.terminal.__main__ import read_options
from tests.fakes import (
    ACCEPTED,
    DONE,
    HELLO,
    Script,
    ScriptedWorker,
    answer_script,
    direct_worker,
    report,
    scripted_worker,
)
from tests.servers import ROOT
from tests.terminal.screen import (
    ALT_ENTER,
    BACKSPACE,
    CTRL_C,
    CTRL_D,
    ENTER,
    TAB,
    UP,
    Screen,
    on_terminal,
)

CHAT = ("-m", "services.terminal")
SLOW = (*answer_script(("content", "one "))[:-1], 30.0, DONE)
"""Begins an answer; a scripted worker looks for a cancel between two events only."""


class Ended(NamedTuple):
    code: int
    answer: str
    notes: str


async def start(
    nats_url: str, *options: str, stdout: IO[bytes] | None = None, **environ: str
) -> asyncio.subprocess.Process:
    """Start the chat; its output goes to a file, or else to a pipe."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *CHAT,
        *options,
        cwd=ROOT,
        env=os.environ | {"NATS_URL": nats_url} | environ,
        stdin=asyncio.subprocess.PIPE,
        stdout=stdout or asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(nats_url: str, *options: str, typed: str = "", encoding: str = "utf-8") -> Ended:
    process = await start(nats_url, *options, PYTHONIOENCODING=encoding)
    async with asyncio.timeout(30):
        answer, notes = await process.communicate(typed.encode())
    assert process.returncode is not None
    return Ended(process.returncode, answer.decode(), notes.decode())


async def send_reports(bus: Bus, worker: WorkerReport) -> None:
    while True:
        await bus.publish(subjects.report(worker.worker_id), worker)
        await asyncio.sleep(0.1)


# --- in a pipe ------------------------------------------------------------------------------------


async def test_pipe_gets_the_answer_and_stderr_the_rest(bus: Bus, nats_url: str) -> None:
    reports = bus.spawn(send_reports(bus, report("unreachable")))
    async with scripted_worker(nats_url, HELLO):
        ended = await run(nats_url, "--session", "s", typed="hi\n\n/help\nagain")
    reports.cancel()
    assert (ended.code, ended.answer) == (0, "Grüß dich\nGrüß dich\n")
    assert ended.notes.startswith("Model demo.\nSession s (continue") and "/retry" in ended.notes


async def test_one_question_gets_the_answer_alone(nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        ended = await run(nats_url, "--model", "demo:pirate", "say", "hi", typed="not read")
    ((_, request),) = worker.requests
    assert ended == (0, "Grüß dich\n", "")
    assert (request.prompt, request.model) == ("say hi", "demo:pirate")


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (WorkerReport("w", "failed", 8, 0, 0, error="x.gguf is empty."), "x.gguf is empty."),
        (WorkerReport("w", "loading", 8, 0, 0, name="m"), "The model 'm' is loading (0% so far)."),
        (None, "No inference worker answers"),
    ],
)
async def test_chat_without_a_worker_prints_the_reason(
    bus: Bus, nats_url: str, worker: WorkerReport | None, reason: str
) -> None:
    reports = bus.spawn(send_reports(bus, worker)) if worker else None
    ended = await run(nats_url, typed="hi\n/help\n")
    if reports:
        reports.cancel()
    assert ended.code == 1 and not ended.answer
    assert ended.notes.count(reason) == 2, "at the start, and as the answer to the prompt"


@pytest.mark.parametrize(
    "options",
    [
        ("--nonsense",),
        ("",),
        (" ", ""),
        ("--session",),
        ("--session", ""),
        ("--session", "x" * 129),
        ("--model", ""),
        ("--system", "x" * 16_385),
    ],
)
def test_invalid_arguments_exit_with_2(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_options(options)
    assert ended.value.code == 2 and "usage: just chat" in capsys.readouterr().err


async def test_interrupted_question_is_cancelled_and_exits_with_130(nats_url: str) -> None:
    async with scripted_worker(nats_url, SLOW) as worker:
        process = await start(nats_url, "count")
        async with asyncio.timeout(30):
            assert process.stdout
            await process.stdout.readexactly(4)
            process.send_signal(signal.SIGINT)
            _, request_id = await worker.cancelled.get()
            assert request_id == worker.requests[0][1].request_id
            process.send_signal(signal.SIGINT)  # the worker does not react: at once
            assert await process.wait() == 130


async def test_interrupt_while_waiting_for_a_line_exits_with_130(nats_url: str) -> None:
    process = await start(nats_url)
    async with asyncio.timeout(30):
        assert process.stderr
        while b"/help" not in await process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130


@pytest.mark.parametrize(("options", "typed"), [(("hi",), ""), ((), "hi\nand\nmore\n")])
async def test_reader_that_has_gone_ends_the_chat_quietly(
    nats_url: str, options: tuple[str, ...], typed: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        process = await start(nats_url, *options)
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        async with asyncio.timeout(30):
            notes = (await process.communicate(typed.encode()))[1].decode()
        assert process.returncode == 128 + signal.SIGPIPE
        assert "[" not in notes, "no error"
        assert len(worker.requests) == 1
        await asyncio.wait_for(worker.cancelled.get(), 30)


async def test_full_disk_is_one_sentence(nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        with open("/dev/full", "wb") as full:
            process = await start(nats_url, "hi", stdout=full)
        async with asyncio.timeout(30):
            notes = (await process.communicate())[1]
    assert notes == b"The answer can't be written: No space left on device.\n"
    assert process.returncode == 1


async def test_output_without_unicode_replaces_characters(nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        ended = await run(nats_url, "hi", encoding="ascii")
    assert ended == (0, "Gr?? dich\n", "")


async def test_interrupt_while_connecting_prints_no_traceback(nats_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        process = await start(f"nats://127.0.0.1:{silent.getsockname()[1]}")
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(30):
                notes = (await process.communicate())[1]
    assert (process.returncode, notes) == (-signal.SIGINT, b""), "130 in a shell"


async def test_client_imports_neither_library() -> None:
    program = "import services.client.chat_client, sys; print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    names = (await process.communicate())[0].decode().split()
    assert "nats" in names and not {"prompt_toolkit", "rich"} & set(names)


# --- on a terminal --------------------------------------------------------------------------------

Use = Callable[[Screen], None]


async def at_terminal(
    nats_url: str, script: Script, use: Use, folder: Path, **environ: str
) -> ScriptedWorker:
    """Use a chat on a terminal, with a worker that sends the script. Return the worker."""
    async with Bus.connect(nats_url, "w") as bus, scripted_worker(nats_url, script) as worker:
        reports = bus.spawn(send_reports(bus, report("unreachable")))  # else the chat waits for one
        await use_terminal(nats_url, use, folder, **environ)
        reports.cancel()
    return worker


async def use_terminal(nats_url: str, use: Use, folder: Path, **environ: str) -> None:
    """Start the chat on a terminal, and use it in a thread."""

    def in_thread() -> None:
        with on_terminal(CHAT, {"NATS_URL": nats_url, **environ}, folder) as screen:
            screen.wait_for("/help lists")
            screen.wait_for("\n>")
            use(screen)

    await asyncio.to_thread(in_thread)


def wait_for_history(screen: Screen) -> None:
    """A prompt is shown a moment before prompt_toolkit has loaded earlier ones."""
    screen.type("x")
    screen.wait_for("\n> x")
    screen.type(BACKSPACE)


def test_prompts_are_edited_and_come_back(nats_url: str, tmp_path: Path) -> None:
    def first(screen: Screen) -> None:
        screen.type(f"\x1b[200~one\ntwo\x1b[201~{ENTER}")
        screen.wait_for("Grüß dich")
        screen.type(f"three{ALT_ENTER}four{ENTER}")
        screen.wait_for("four\nGrüß dich\n>")
        screen.type(f'"""five{ENTER}')
        screen.wait_for("…")
        screen.type(f'six"""{ENTER}')
        screen.wait_for('six"""\nGrüß dich\n>')
        wait_for_history(screen)
        screen.type(f"{UP}{UP}{UP}")  # to the first line, and to the prompt before
        screen.wait_for("> three\n… four", 30)
        screen.type(CTRL_C)
        screen.wait_for("four\n>")
        screen.type(f"/mo{TAB}demo:pi{TAB}")
        screen.wait_for("> /model demo:pirate")
        screen.type(ENTER)
        screen.wait_for("Model demo:pirate.\n>")
        screen.type(CTRL_D)
        assert screen.wait_for_end() == 0

    def second(screen: Screen) -> None:
        wait_for_history(screen)
        screen.type(UP)
        screen.wait_for("> /model demo:pirate")
        screen.type(UP + UP)
        screen.wait_for('> """five')
        screen.type(f"{CTRL_C}/exit{ENTER}")
        assert screen.wait_for_end() == 0

    async def use_both() -> ScriptedWorker:
        async with Bus.connect(nats_url, "w") as bus, direct_worker(nats_url, "w", HELLO) as worker:
            model = ModelInfo("demo", "digest", 2048, 1000, ("pirate", "poet"))
            reports = bus.spawn(send_reports(bus, report("w", model)))
            await use_terminal(nats_url, first, tmp_path)
            await use_terminal(nats_url, second, tmp_path)
            reports.cancel()
            return worker

    worker = asyncio.run(use_both())
    prompts = [request.prompt for _, request in worker.requests]
    assert prompts == ["one\ntwo", "three\nfour", "five\nsix"]


def test_ctrl_c_stops_the_answer(nats_url: str, tmp_path: Path) -> None:
    def use(screen: Screen) -> None:
        screen.type(f"count{ENTER}")
        screen.wait_for("one")
        screen.type("torn")  # is not shown; Ctrl-C drops it, as in a shell
        screen.type(CTRL_C)
        screen.wait_for("> count\none\n[stopped]\n>")
        screen.type(CTRL_D)
        assert screen.wait_for_end() == 0, "stopping is no failure"

    accepted, one, done = answer_script(("content", "one"))
    worker = asyncio.run(at_terminal(nats_url, (accepted, one, *[0.05] * 200, done), use, tmp_path))
    assert [request.prompt for _, request in worker.requests] == ["count"]


@pytest.mark.parametrize("word", ["exit", "quit"])
def test_word_of_other_prompts_leaves(nats_url: str, tmp_path: Path, word: str) -> None:
    def use(screen: Screen) -> None:
        screen.type(f" exit{ENTER}")
        screen.wait_for(">  exit\nGrüß dich\n>")
        screen.type(f"{word}{ENTER}")
        assert screen.wait_for_end() == 0

    worker = asyncio.run(at_terminal(nats_url, HELLO, use, tmp_path))
    assert len(worker.requests) == 1, "the one with a space"


def test_dumb_terminal_gets_no_sequences(nats_url: str, tmp_path: Path) -> None:
    def use(screen: Screen) -> None:
        screen.type("hi\n")
        screen.wait_for("> hi\nGrüß dich\n>")
        screen.type('"""one\n')
        screen.wait_for("\n…")
        screen.type('two"""\n')
        screen.wait_for('… two"""\nGrüß dich\n>')
        screen.type(CTRL_D)
        assert screen.wait_for_end() == 0
        assert b"\x1b" not in screen.raw

    worker = asyncio.run(at_terminal(nats_url, HELLO, use, tmp_path, TERM="dumb"))
    assert [request.prompt for _, request in worker.requests] == ["hi", "one\ntwo"]


def test_keys_typed_during_an_answer_are_the_next_prompts(nats_url: str, tmp_path: Path) -> None:
    def use(screen: Screen) -> None:
        screen.type(f"count{ENTER}")
        screen.wait_for("\none")
        screen.type(f"twp{BACKSPACE}o{ENTER}")
        screen.wait_for("> two\none")
        screen.type(CTRL_D)
        assert screen.wait_for_end() == 0
        assert "twp" not in screen.text

    accepted, one, done = answer_script(("content", "one"))
    worker = asyncio.run(at_terminal(nats_url, (accepted, one, *[0.05] * 20, done), use, tmp_path))
    assert [request.prompt for _, request in worker.requests] == ["count", "two"]


HOSTILE = (
    "a\x1b[2J\x1b[H\x1b]0;owned\x07\x1b]52;c;cm0=\x07\x9b2J\x9d0;owned\x9c"
    "\u202egnp.exe\x1b[8mhidden"
)


@pytest.mark.parametrize("no_color", ["", "1"], ids=["Markdown", "plain"])
def test_hostile_answer_does_nothing_to_the_terminal(
    nats_url: str, tmp_path: Path, no_color: str
) -> None:
    """Reasoning is dimmed, content is Markdown, if there are styles."""
    pieces = [("reasoning", "thinking" + HOSTILE), ("content", "**bold** `code`\n\n- a\n- b")]
    pieces += [("content", character) for character in HOSTILE]
    script = (*answer_script(*pieces)[:-1], Failed("internal", HOSTILE))

    def use(screen: Screen) -> None:
        screen.type(f"hi{ENTER}")
        screen.wait_for("]\n>")
        assert "/help lists" in screen.text, "nothing was cleared"
        assert screen.text.count("hidden") == 3 and not screen.title
        for sequence in ("\x1b]", "\x9b", "\x9d", "\u202e", "\x1b[2J", "\x1b[8m"):
            assert sequence.encode() not in screen.raw
        assert ("bold code\n\n • a\n • ba␛" in screen.text) == (not no_color)
        assert screen.style_of("bold").bold == (not no_color)
        assert (b"\x1b[2mthinking" in screen.raw) == (not no_color)

    asyncio.run(at_terminal(nats_url, script, use, tmp_path, NO_COLOR=no_color))


def test_long_answer_scrolls_and_is_whole(nats_url: str, tmp_path: Path) -> None:
    """In a window that becomes narrower meanwhile."""
    lines = [f"{number} words in line number {number}" for number in range(300)]
    source = "\n\n".join(lines)
    pieces = [("content", source[at : at + 40]) for at in range(0, len(source), 40)]
    events = answer_script(*pieces)
    paused = [step for event in events[1:-1] for step in (event, 0.002)]

    def use(screen: Screen) -> None:
        screen.type(f"hi{ENTER}")
        screen.wait_for("100 words", is_whole=True)
        screen.resize(24, 60)
        screen.wait_for("299 words in line number 299\n>")
        shown = [line for line in screen.whole.splitlines() if "words" in line]
        assert shown == lines

    asyncio.run(at_terminal(nats_url, (ACCEPTED, *paused, events[-1]), use, tmp_path))


def test_piped_answer_of_a_typed_prompt(nats_url: str, tmp_path: Path) -> None:
    """`just chat | tee log`: the prompt is on the terminal, the answer in the pipe."""
    log = tmp_path / "log"
    program = (
        "import os, sys; os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 1);"
        "os.execv(sys.executable, [sys.executable, '-m', 'services.terminal'])"
    )

    def in_thread() -> None:
        environ = {"NATS_URL": nats_url}
        with on_terminal(["-c", program, str(log)], environ, tmp_path) as screen:
            screen.wait_for("\n>")
            screen.type(f"hi{ENTER}{CTRL_D}")
            assert screen.wait_for_end() == 0

    async def with_worker() -> None:
        async with scripted_worker(nats_url, HELLO):
            await asyncio.to_thread(in_thread)

    asyncio.run(with_worker())
    assert log.read_text() == "Grüß dich\n"

"""The terminal chat and the examples, as processes on fake workers."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.client.__main__ import AnswerPrinter, cut_note
from services.contract import subjects
from services.contract.messages import Done, FinishReason, Timings, Usage, WorkerReport
from services.runtime.bus import Bus
from tests.fakes import HELLO, answer_script, report, scripted_worker
from tests.servers import ROOT, free_port, nats_server, running

CHAT = ("-m", "services.client")
EXAMPLES = [("examples/client.py",), ("-m", "examples.client"), ("examples/native.py",)]


async def run(nats_url: str, *command: str, typed: str = "", **environ: str) -> tuple[int, str]:
    """Return the exit code and the output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=ROOT,
        env=os.environ | {"NATS_URL": nats_url} | environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate(typed.encode())
    assert process.returncode is not None
    return process.returncode, output.decode()


async def send_reports(bus: Bus, worker: WorkerReport) -> None:
    while True:
        await bus.publish(subjects.report(worker.worker_id), worker)
        await asyncio.sleep(0.3)


async def test_chat_names_the_model_and_prints_answers(bus: Bus, nats_url: str) -> None:
    reports = bus.spawn(send_reports(bus, report("unreachable")))
    async with scripted_worker(nats_url, HELLO):
        code, output = await run(nats_url, *CHAT, "--session", "s", typed="hi\n")
    reports.cancel()
    assert code == 0
    assert output.startswith("Model demo.\nSession s (continue") and "> Grüß dich\n> \n" in output


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (WorkerReport("w", "failed", 8, 0, 0, error="x.gguf is empty."), "x.gguf is empty."),
        (None, "No inference worker answers"),
    ],
)
async def test_chat_without_a_worker_prints_the_reason(
    bus: Bus, nats_url: str, worker: WorkerReport | None, reason: str
) -> None:
    reports = bus.spawn(send_reports(bus, worker)) if worker else None
    code, output = await run(nats_url, *CHAT, typed="hi\n")
    if reports:
        reports.cancel()
    assert code == 1
    assert output.count(reason) == 2, "at the start, and as the answer to the prompt"


async def test_pasted_lines_are_one_prompt(nats_url: str) -> None:
    terminal, chat_side = os.openpty()
    async with scripted_worker(nats_url, HELLO) as worker:
        chat = await asyncio.create_subprocess_exec(
            sys.executable,
            *CHAT,
            cwd=ROOT,
            env=os.environ | {"NATS_URL": nats_url, "TERM": "xterm"},
            stdin=chat_side,
            stdout=chat_side,
            stderr=chat_side,
        )
        async with asyncio.timeout(30):
            await asyncio.to_thread(_read_until, terminal, b"> ")
            os.write(terminal, b"\x1b[200~one\ntwo\x1b[201~\r")
            await asyncio.to_thread(_read_until, terminal, b"dich", b"> ")
            os.write(terminal, b"\x04")
            await chat.wait()
    os.close(terminal)
    os.close(chat_side)
    assert [request.prompt for _, request in worker.requests] == ["one\ntwo"]
    assert chat.returncode == 0


def _read_until(terminal: int, *texts: bytes) -> None:
    """Read until each of the texts has arrived, in this order."""
    received = b""
    for text in texts:
        while text not in received:
            received += os.read(terminal, 1024)
        received = received.partition(text)[2]


PARTS = (
    ("reasoning", "Hm"),
    ("content", "Well"),
    ("call", "go"),
    ("arguments", '{"to":'),
    ("arguments", "1}"),
    ("call", "stop"),
)
PLAIN = 'Well\n[go {"to":1}]\n[stop ]'


@pytest.mark.parametrize(
    ("is_terminal", "shown"), [(True, f"\x1b[2mHm\x1b[22m\n{PLAIN}"), (False, PLAIN)]
)
def test_reasoning_is_dimmed_and_only_on_a_terminal(
    capsys: pytest.CaptureFixture[str], is_terminal: bool, shown: str
) -> None:
    printer = AnswerPrinter(is_terminal)
    for event in answer_script(*PARTS, finish_reason="tool_calls"):
        assert not isinstance(event, float)
        printer.show(event)
    assert capsys.readouterr().out == shown


def test_answer_cut_in_a_call_ends_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    printer = AnswerPrinter(is_terminal=False)
    for event in answer_script(("call", "go"), ("arguments", "{"), finish_reason="timeout"):
        assert not isinstance(event, float)
        printer.show(event)
    assert capsys.readouterr().out.startswith("[go {]\n[stopped because its time was up")


async def test_piped_chat_prints_calls_and_no_reasoning(nats_url: str) -> None:
    async with scripted_worker(nats_url, answer_script(*PARTS)):
        code, output = await run(nats_url, *CHAT, typed="hi\n")
    assert code == 0 and f"> {PLAIN}\n> \n" in output


async def test_examples_run_from_the_project_folder(nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        results = await asyncio.gather(*(run(nats_url, *example, "hi") for example in EXAMPLES))
    for example, (code, output) in zip(EXAMPLES, results, strict=True):
        assert code == 0 and "Grüß dich" in output, example


async def test_nats_port_setting_applies_to_all_commands(tmp_path: Path) -> None:
    commands = [*EXAMPLES, CHAT]
    with running(nats_server(tmp_path)) as server:
        port = str(server.port)
        async with scripted_worker(f"nats://127.0.0.1:{port}", HELLO):
            results = await asyncio.gather(
                *(run("", *command, typed="hi\n", NATS_PORT=port) for command in commands)
            )
        server.stop(signal.SIGKILL)
    for command, (code, output) in zip(commands, results, strict=True):
        assert code == 0 and "Grüß dich" in output, command


async def test_commands_without_nats_exit_with_a_message() -> None:
    commands, url = [*EXAMPLES, CHAT], f"nats://127.0.0.1:{free_port()}"
    results = await asyncio.gather(*(run(url, *command) for command in commands))
    for command, (code, output) in zip(commands, results, strict=True):
        assert code == 1, command
        assert "can't be reached" in output.splitlines()[-1] and "Traceback" not in output, command


@pytest.mark.parametrize(
    ("reason", "stop_string", "note"),
    [
        ("stop", None, None),
        ("stop", "\nQuestion:", 'stopped at "\\nQuestion:" (CHAT_STOP)'),
        ("stop", "用户：", 'stopped at "用户：" (CHAT_STOP)'),
        ("length", None, "cut off after 150 tokens (CHAT_MAX_TOKENS or MODEL_CONTEXT)"),
        ("loop", None, "stopped because it repeated itself (CHAT_REPEAT_PENALTY)"),
        ("timeout", None, "stopped because its time was up (timeout_s)"),
        ("cancelled", None, "cancelled"),
    ],
)
def test_cut_note_names_the_reason_and_the_setting(
    reason: FinishReason, stop_string: str | None, note: str | None
) -> None:
    done = Done(reason, Usage(7, 150, 0), Timings(0, 0, 0), 0, "log", 9, stop_string)
    assert cut_note(done) == note

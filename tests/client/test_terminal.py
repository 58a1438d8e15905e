"""`just chat` and the examples as processes, on a scripted worker."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.contract import subjects
from services.contract.messages import WorkerReport
from services.runtime.bus import Bus
from tests.fakes import HELLO, report, scripted_worker
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
        said, _ = await process.communicate(typed.encode())
    assert process.returncode is not None
    return process.returncode, said.decode()


async def reporting(bus: Bus, worker: WorkerReport) -> None:
    while True:
        await bus.publish(subjects.report(worker.worker_id), worker)
        await asyncio.sleep(0.3)


async def test_the_model_is_named_and_answers(bus: Bus, nats_url: str) -> None:
    reports = bus.spawn(reporting(bus, report("nobody")))
    async with scripted_worker(nats_url, HELLO):
        code, said = await run(nats_url, *CHAT, "--session", "s", typed="hi\n")
    reports.cancel()
    assert code == 0
    assert said.startswith("Model demo.\nSession 's'.") and "> Grüß dich\n> \n" in said


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (WorkerReport("w", "loading", 8, 0, 0, progress=0.42), "being loaded (42% so far)"),
        (
            WorkerReport("w", "loading", 8, 0, 0, progress=1.0),
            "The model is loaded and warming up.",
        ),
        (WorkerReport("w", "failed", 8, 0, 0, error="x.gguf is empty."), "x.gguf is empty."),
        (None, "No inference worker answers"),
    ],
)
async def test_missing_worker_is_explained_and_exits_with_1(
    bus: Bus, nats_url: str, worker: WorkerReport | None, reason: str
) -> None:
    reports = bus.spawn(reporting(bus, worker)) if worker else None
    code, said = await run(nats_url, *CHAT, typed="hi\n")
    if reports:
        reports.cancel()
    assert code == 1
    assert said.count(reason) == 2  # at the start, and as the answer to the prompt


async def test_lines_that_are_pasted_are_one_prompt(nats_url: str) -> None:
    ours, theirs = os.openpty()
    async with scripted_worker(nats_url, HELLO) as worker:
        chat = await asyncio.create_subprocess_exec(
            sys.executable,
            *CHAT,
            cwd=ROOT,
            env=os.environ | {"NATS_URL": nats_url, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        async with asyncio.timeout(30):
            await asyncio.to_thread(_read_until, ours, b"> ")
            os.write(ours, b"\x1b[200~one\ntwo\x1b[201~\r")
            await asyncio.to_thread(_read_until, ours, b"dich", b"> ")
            os.write(ours, b"\x04")
            await chat.wait()
    os.close(ours)
    os.close(theirs)
    assert [request.prompt for _, request in worker.requests] == ["one\ntwo"]
    assert chat.returncode == 0


def _read_until(terminal: int, *texts: bytes) -> None:
    """Read until all of the texts have come, in this order."""
    read = b""
    for text in texts:
        while text not in read:
            read += os.read(terminal, 1024)
        read = read.partition(text)[2]


@pytest.mark.parametrize("example", EXAMPLES)
async def test_an_example_runs_from_the_project_s_folder(
    nats_url: str, example: tuple[str, ...]
) -> None:
    async with scripted_worker(nats_url, HELLO):
        code, said = await run(nats_url, *example, "hi")
    assert code == 0 and "Grüß dich" in said


async def test_nats_port_moves_all_of_them(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with scripted_worker(url, HELLO):
            for command in (*EXAMPLES, CHAT):
                code, said = await run("", *command, typed="hi\n", NATS_PORT=str(server.port))
                assert code == 0 and "Grüß dich" in said
        server.stop(signal.SIGKILL)


@pytest.mark.parametrize("command", [*EXAMPLES, CHAT])
async def test_example_without_nats_exits_soon_with_a_message(command: tuple[str, ...]) -> None:
    code, said = await run(f"nats://127.0.0.1:{free_port()}", *command)
    assert code == 1
    assert "can't be reached" in said.splitlines()[-1] and "Traceback" not in said

"""The examples, and the terminal chat that shares their settings, as processes on fake workers."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.fakes import HELLO, scripted_worker
from tests.servers import ROOT, free_port, nats_server, running

CHAT = ("-m", "services.terminal")
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

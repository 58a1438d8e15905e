"""Signals, invalid settings and failures, with real processes."""

import json
import os
import signal
import subprocess
import sys

PROGRAM = """
import asyncio
from services.runtime.process import run
from services.runtime.settings import InvalidSetting, ServiceSettings

async def drain():
    print("draining", flush=True)
    await asyncio.sleep(0.3)
    print("drained", flush=True)

async def serve(process, settings):
    process.stack.push_async_callback(drain)
    {body}
    print("up", flush=True)

run("test", ServiceSettings, serve)
"""


def start(body: str = "pass", **environ: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
    )
    assert process.stdout is not None
    if body == "pass" and not environ:
        assert process.stdout.readline() == "up\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=10)
    return process.returncode, out, err


def test_signal_drains_and_exits_with_0() -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = start()
        process.send_signal(signum)
        code, out, err = end(process)
        assert (code, out) == (0, "draining\ndrained\n")
        assert "Traceback" not in err


def test_second_signal_exits_at_once() -> None:
    process = start()
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "draining\n"
    process.send_signal(signal.SIGTERM)
    code, out, _ = end(process)
    assert (code != 0, out) == (True, "")


def test_signal_during_startup_exits() -> None:
    process = start("print('starting', flush=True); await asyncio.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGTERM)
    code, out, _ = end(process)
    assert (code, out) == (0, "draining\ndrained\n")


def test_startup_that_swallows_cancellation_is_drained() -> None:
    process = start(
        "print('starting', flush=True)\n"
        "    try: await asyncio.sleep(60)\n"
        "    except asyncio.CancelledError: pass"
    )
    assert process.stdout is not None and process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGTERM)
    assert end(process)[:2] == (0, "up\ndraining\ndrained\n")


def test_invalid_setting_exits_with_2_and_one_line() -> None:
    code, _, err = end(start("raise InvalidSetting('MODEL_CONTEXT is wrong')"))
    assert code == 2
    assert "MODEL_CONTEXT is wrong" in err and "Traceback" not in err


def test_failed_startup_drains_and_exits_with_1() -> None:
    code, out, err = end(start("raise RuntimeError('no luck')"))
    assert (code, out) == (1, "draining\ndrained\n")
    assert "no luck" in err


def test_failed_process_drains_and_exits_with_1() -> None:
    code, out, err = end(start("process.fail('the engine died')"))
    assert (code, out) == (1, "up\ndraining\ndrained\n")
    assert "the engine died" in err


def test_failed_startup_is_logged_as_json() -> None:
    code, _, err = end(start("raise RuntimeError('no\\nluck')", LOG_FORMAT="json"))
    lines = [json.loads(line) for line in err.splitlines()]
    assert code == 1 and {line["service"] for line in lines} == {"test"}
    assert "RuntimeError: no\nluck" in lines[0]["exception"]


def test_invalid_log_format_aborts_and_names_the_variable() -> None:
    code, out, err = end(start(LOG_FORMAT="xml"))
    assert (code, out) == (2, "")
    assert "LOG_FORMAT='xml' can't be used: it must be text or json." in err


def test_crash_within_a_library_is_in_the_log() -> None:
    process = start("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    code, _, err = end(process)
    assert code == -signal.SIGILL
    assert "Fatal Python error: Illegal instruction" in err and "in serve" in err

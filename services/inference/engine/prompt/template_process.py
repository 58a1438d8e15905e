"""Starts the processes that render chat templates (`template_sandbox.py`), and speaks with them."""

import atexit
import json
import marshal
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from signal import SIGKILL, SIGPROF, Signals
from typing import IO, Any

from services.inference.engine.child_path import child_path
from services.inference.engine.prompt.template_sandbox import (
    FAILED,
    LENGTH,
    MAX_REASON_CHARS,
    RENDERED,
    REPLY,
    TOO_LARGE,
)

ENVIRONMENT = ("LANG", "LC_ALL", "PATH", "PYTHONHOME", "PYTHONSAFEPATH", "TZ")
"""Variables that a process gets; others may be secrets."""


class RenderFailure(Exception):
    """The template raised an exception. The message is a clause with its text."""


class TemplateLimitError(Exception):
    """The template used more than it may. The message is a clause that says what."""


@dataclass(frozen=True)
class TemplateLimits:
    """
    What one rendering may use: CPU seconds, bytes of its process, and characters. All renderings
    that try a template while it is loaded may take `trying_seconds` together.
    """

    cpu_seconds: float = 2.0
    trying_seconds: float = 20.0
    max_bytes: int = 2**29
    max_chars: int = 2**23


DEFAULT_LIMITS = TemplateLimits()


def render(source: str, variables: Mapping[str, Any], limits: TemplateLimits) -> str:
    """
    Return the rendered text. The variables are JSON. The GIL is free meanwhile. Raises
    RenderFailure, or TemplateLimitError.
    """
    return _processes(limits).ask(source, dict(variables))


@lru_cache
def variables_of(source: str, limits: TemplateLimits = DEFAULT_LIMITS) -> frozenset[str]:
    """
    Return the variables that a template reads. Raises RenderFailure if it can't be parsed, or
    TemplateLimitError.
    """
    return frozenset(json.loads(_processes(limits).ask(source, None)))


class _Died(Exception):
    """The process has ended; `code` is its return code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Process:
    def __init__(self, limits: TemplateLimits) -> None:
        """Raises OSError."""
        self._max_reply = 4 * max(limits.max_chars, MAX_REASON_CHARS)  # bytes of UTF-8
        own = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self._popen = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "services.inference.engine.prompt.template_sandbox",
                str(limits.max_bytes),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=own | {"PYTHONPATH": child_path()},
        )

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Return the status and the text of the reply. Raises _Died."""
        requests, replies = self._popen.stdin, self._popen.stdout
        assert requests and replies
        try:
            requests.write(LENGTH.pack(len(request)) + request)
            requests.flush()
        except BrokenPipeError:
            raise _Died(self._popen.wait()) from None
        status, length = REPLY.unpack(self._read(replies, REPLY.size))
        if length > self._max_reply:
            raise TemplateLimitError("its process sent a longer text than it may")
        return status, self._read(replies, length)

    def _read(self, replies: IO[bytes], length: int) -> bytes:
        data = replies.read(length)
        if len(data) < length:
            raise _Died(self._popen.wait())
        return data

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with suppress(BrokenPipeError):  # what is left of a request
                if pipe:
                    pipe.close()


class _Processes:
    """As many processes as there are renderings at once. They are started when they are needed."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        atexit.register(self._close)

    def ask(self, source: str, variables: dict[str, Any] | None) -> str:
        """Raises RenderFailure or TemplateLimitError."""
        limits = self._limits
        request = marshal.dumps((source, variables, limits.max_chars, limits.cpu_seconds))
        try:
            return self._ask(request)
        except _Died as error:
            if error.code != -SIGKILL:
                raise TemplateLimitError(self._why_dead(error.code)) from None
        try:  # once more: the kernel, short of memory, or an operator has killed it
            return self._ask(request)
        except _Died as error:
            raise TemplateLimitError(self._why_dead(error.code)) from None

    def _ask(self, request: bytes) -> str:
        """Do what `ask` does, with one process. Raises _Died, too."""
        process = self._take()
        try:
            status, data = process.ask(request)
        except BaseException:
            process.close()
            raise
        return self._result(process, status, data.decode(errors="surrogatepass"))

    def _take(self) -> _Process:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.is_alive:
                    return process
                process.close()
        try:
            return _Process(self._limits)
        except OSError as error:
            raise TemplateLimitError(f"no process can be started for it: {error}") from error

    def _result(self, process: _Process, status: int, text: str) -> str:
        if status not in (RENDERED, FAILED):  # it has grown
            process.close()
            raise TemplateLimitError(text if status == TOO_LARGE else "its process is broken")
        with self._lock:
            self._idle.append(process)
        if status == FAILED:
            raise RenderFailure(text)
        return text

    def _why_dead(self, code: int) -> str:
        if code == -SIGPROF:
            return f"it runs for more than {self._limits.cpu_seconds:g} seconds"
        how = Signals(-code).name if code < 0 else f"code {code}"
        return f"the process that renders it ended with {how}"

    def _close(self) -> None:
        for process in self._idle:
            process.close()


@cache
def _processes(limits: TemplateLimits) -> _Processes:
    return _Processes(limits)

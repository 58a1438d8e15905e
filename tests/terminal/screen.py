"""A terminal without a window: a program runs on a pseudo terminal, and pyte draws its screen."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyte

from tests.servers import ROOT

ENTER, ALT_ENTER, TAB, BACKSPACE, UP = "\r", "\x1b\r", "\t", "\x7f", "\x1b[A"
CTRL_C, CTRL_D = "\x03", "\x04"


class _AnsweringScreen(pyte.HistoryScreen):
    """Replies to requests for the cursor's position, as a terminal does."""

    def __init__(self, reply: Callable[[str], None], columns: int, rows: int) -> None:
        super().__init__(columns, rows, history=10_000)
        self._reply = reply

    def write_process_input(self, data: str) -> None:
        self._reply(data)


class Screen:
    """The screen of a program, with the lines that scrolled out of it."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes], size: tuple[int, int]):
        self._descriptor = descriptor
        self._process = process
        rows, columns = size
        self._screen = _AnsweringScreen(self.type, columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        """Everything that the program has written."""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        set_size(self._descriptor, rows, columns)
        self._screen.resize(rows, columns)
        self._process.send_signal(signal.SIGWINCH)

    @property
    def text(self) -> str:
        """The visible lines."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def whole(self) -> str:
        """The visible lines, and those above them."""
        above = (
            "".join(line[column].data for column in range(self._screen.columns)).rstrip()
            for line in self._screen.history.top
        )
        return "\n".join((*above, self.text))

    @property
    def title(self) -> str:
        return str(self._screen.title)

    def style_of(self, text: str) -> pyte.screens.Char:
        """Return the first character of a visible text, with its style."""
        for number, line in enumerate(self._screen.display):
            if text in line:
                return self._screen.buffer[number][line.index(text)]
        raise AssertionError(f"{text!r} is not on the screen:\n{self.text}")

    def wait_for(self, text: str, seconds: float = 20, is_whole: bool = False) -> None:
        """Read until the text is on the screen, or, with `is_whole`, was."""
        deadline = time.monotonic() + seconds
        while text not in (self.whole if is_whole else self.text):
            if not self._read(deadline):
                raise AssertionError(f"{text!r} is not on the screen:\n{self.text}")

    def wait_for_end(self, seconds: float = 20) -> int:
        """Read until the program ends, and return its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self._process.wait(max(1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Read once. Return whether the program wrote something."""
        if not select.select([self._descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._descriptor, 65_536)
        except OSError:  # Linux: the other side is closed
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)


def set_size(descriptor: int, rows: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextlib.contextmanager
def on_terminal(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    size: tuple[int, int] = (24, 80),
) -> Iterator[Screen]:
    """Run Python with the arguments on a terminal of (rows, columns); kill it at the end."""
    descriptor, other_side = pty.openpty()
    set_size(other_side, *size)
    own: dict[str, str] = {
        "TERM": "xterm-256color",
        "XDG_STATE_HOME": str(folder),
        "HOME": str(folder),
    }
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "", **own, **environ},
        stdin=other_side,
        stdout=other_side,
        stderr=other_side,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(other_side)
    try:
        yield Screen(descriptor, process, size)
    finally:
        process.kill()
        process.wait()
        os.close(descriptor)

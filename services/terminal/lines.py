"""Prompts as lines: what begins with three quotes goes on until the next three."""

import asyncio
import contextlib
import os
import re
from collections.abc import Callable

PROMPT, CONTINUATION = "> ", "… "
QUOTES = '"""'
_QUOTED = re.compile(r'\s*"""\n*(.*?)\n*"""\s*', re.DOTALL)
READ_BYTES = 65_536


def is_open(text: str) -> bool:
    """Return whether the prompt continues on the next line."""
    begin, quotes, rest = text.partition(QUOTES)
    return bool(quotes) and not begin.strip() and QUOTES not in rest


def unquoted(text: str) -> str:
    """Return the prompt without the quotes around it."""
    quoted = _QUOTED.fullmatch(text)
    return quoted[1] if quoted else text


class LinePrompt:
    """
    Reads prompts from a pipe, a file, or a terminal that can't edit, one a line. `begin` shows the
    text before a line.
    """

    def __init__(self, descriptor: int, begin: Callable[[str], None] = lambda _: None) -> None:
        self._descriptor = descriptor
        self._begin = begin
        self._buffer = b""
        self._has_ended = False

    async def read(self) -> str:
        """Return the next prompt. Raises EOFError."""
        self._begin(PROMPT)
        text = await self._line()
        while is_open(text):
            self._begin(CONTINUATION)
            try:
                text += "\n" + await self._line()
            except EOFError:
                break
        return unquoted(text)

    async def _line(self) -> str:
        while b"\n" not in self._buffer and not self._has_ended:
            await _wait_until_readable(self._descriptor)
            data = os.read(self._descriptor, READ_BYTES)
            self._buffer += data
            self._has_ended = not data
        if not self._buffer:
            raise EOFError
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace").removesuffix("\r")


async def _wait_until_readable(descriptor: int) -> None:
    """Return at once for a file, which an event loop can't watch."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.suppress(PermissionError):
        loop.add_reader(descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(descriptor)

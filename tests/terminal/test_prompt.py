"""Prompts from pipes and files, and the file of earlier ones."""

import asyncio
import io
import os
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory

from services.terminal.lines import LinePrompt, is_open, unquoted
from services.terminal.output import Notes
from services.terminal.prompt import open_history


async def read_all(descriptor: int) -> list[str]:
    prompt, lines = LinePrompt(descriptor), []
    try:
        while True:
            lines.append(await prompt.read())
    except EOFError:
        return lines


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"", []),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        (b'"""\none\n\ntwo\n"""\nthree\n', ["one\n\ntwo", "three"]),
        (b'"""one"""\n', ["one"]),
        (b'"""\nnot closed\n', ['"""\nnot closed']),
        (b'say """hi\nthree\n', ['say """hi', "three"]),
        (b"bad \xff\n", ["bad \N{REPLACEMENT CHARACTER}"]),
    ],
)
async def test_lines_become_prompts(data: bytes, prompts: list[str], tmp_path: Path) -> None:
    """From a file, which an event loop can't watch, and from a pipe."""
    file = tmp_path / "prompts"
    file.write_bytes(data)
    with file.open("rb") as opened:
        assert await read_all(opened.fileno()) == prompts
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    assert await read_all(reader) == prompts
    os.close(reader)


async def test_dev_null_has_no_prompts() -> None:
    with open(os.devnull, "rb") as file:
        assert await read_all(file.fileno()) == []


async def test_line_is_read_before_the_pipe_ends() -> None:
    reader, writer = os.pipe()
    prompt = LinePrompt(reader)
    reading = asyncio.create_task(prompt.read())
    await asyncio.sleep(0.01)
    assert not reading.done()
    os.write(writer, b"one\ntw")
    assert await asyncio.wait_for(reading, 5) == "one"
    os.close(writer)
    assert await asyncio.wait_for(prompt.read(), 5) == "tw"
    os.close(reader)


@pytest.mark.parametrize(
    ("text", "open_", "prompt"),
    [
        ("hi", False, "hi"),
        ('"""', True, '"""'),
        ('"""a', True, '"""a'),
        ('"""a\nb"""', False, "a\nb"),
        ('""""""', False, ""),
        ('  """a"""  ', False, "a"),
        ('a """b"""', False, 'a """b"""'),
        ('"""a""" and b', False, '"""a""" and b'),
    ],
)
def test_quotes_hold_a_prompt_of_several_lines(text: str, open_: bool, prompt: str) -> None:
    assert is_open(text) == open_
    assert unquoted(text) == prompt


def test_history_file_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    notes = io.StringIO()
    history = open_history(Notes(notes))
    assert isinstance(history, FileHistory) and not notes.getvalue()
    history.store_string("one\ntwo")
    path = tmp_path / "finetunellm" / "chat-history"
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    again = open_history(Notes(notes))
    assert list(again.load_history_strings()) == ["one\ntwo"]


def test_unusable_history_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finetunellm").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    notes = io.StringIO()
    assert isinstance(open_history(Notes(notes)), InMemoryHistory)
    assert "Prompts are not kept" in notes.getvalue()

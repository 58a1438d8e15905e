"""Markdown on a terminal, as it arrives."""

import asyncio
import io
import random
import re

import pyte
import pytest
from rich.console import Console

from services.terminal import markdown
from services.terminal.markdown import THEME, MarkdownWriter, has_info, render, split_blocks

ANSWER = """\
# Title

Some *text* with `code`, **bold** and a [link](http://example.org/x).
It goes on.

1. one
2. two

   ```python
   def f(x):
       return "y"
   ```
3. three
10. ten

- bullet
- bullet

| a | b |
|---|---|
| 1 | a longer cell |
| 222 | x |

```python
for i in range(10):
    print(i)
```

> quote
> more

#hashtag

    indented

---
The end: <b>html</b> &amp; ~~old~~ 🙂 用户
"""
TALL = {
    "code": "Before.\n\n```python\n"
    + "".join(f"x{i} = {i}\n" for i in range(60))
    + "```\nAfter.\n",
    "open code": "```\n" + "".join(f"line {i}\n" for i in range(60)),
    "long code": "```c\n"
    + "".join(f"x = {i};\n" + "\n" * (i % 3) for i in range(99))
    + "```\nEnd.\n",
    "wide code": "```\n" + "".join(f"line {i} {'x' * 90}\n" for i in range(20)) + "```\n",
    "table": "| n | text |\n|---|---|\n" + "".join(f"| {i} | {'y' * i} |\n" for i in range(30)),
    "paragraph": "**" + "word " * 400 + "**\n\nAfter.",
    "list": "".join(f"{i}. item {i}\n" for i in range(1, 40)),
    "nested": "- a\n" + "".join(f"  - item {i}\n" for i in range(1, 40)) + "- b\n",
    "quote": "> " + "\n> ".join(f"line {i}  " for i in range(40)),
}


def new_console(stream: io.StringIO, columns: int = 40, rows: int = 12) -> Console:
    return Console(
        file=stream,
        force_terminal=True,
        color_system="standard",
        width=columns,
        height=rows,
        theme=THEME,
        highlight=False,
    )


class Terminal(io.StringIO):
    """A terminal that shows what is written to it; it turns \\n into \\r\\n as ttys do."""

    def __init__(self, columns: int = 40, rows: int = 12) -> None:
        super().__init__()
        self._screen = pyte.HistoryScreen(columns, rows, history=5_000)
        self._stream = pyte.Stream(self._screen)
        self.written = 0

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        self.written += len(text)
        return len(text)

    def lines(self) -> list[str]:
        width = range(self._screen.columns)
        above = ("".join(line[x].data for x in width) for line in self._screen.history.top)
        shown = [line.rstrip() for line in (*above, *self._screen.display)]
        while shown and not shown[-1]:
            shown.pop()
        return shown


async def stream(source: str, seed: int, columns: int = 40, rows: int = 12) -> Terminal:
    """Write the source in pieces, with a frame after each."""
    terminal, draw = Terminal(columns, rows), random.Random(seed)
    terminal.write("$ chat\n")
    writer = MarkdownWriter(new_console(terminal, columns, rows))
    while source:
        size = draw.choice((1, 3, 10, 40))
        writer.write(source[:size])
        writer._draw_frame()
        source = source[size:]
    writer.close()
    return terminal


def expected(source: str, columns: int = 40) -> list[str]:
    """Return the lines of each block, rendered once."""
    console, lines = new_console(io.StringIO(), columns), ["$ chat"]
    for number, block in enumerate(split_blocks(source)):
        lines += [""] * bool(number and not block.is_joined)
        shown = render(console, block.source)[int(block.is_more_code and has_info(block.source)) :]
        lines += ["".join(plain(line)).rstrip() for line in shown]
    return lines


def plain(line: str) -> str:
    screen = pyte.Screen(200, 1)
    pyte.Stream(screen).feed(line)
    return str(screen.display[0]).rstrip()


@pytest.mark.parametrize("source", [ANSWER, *TALL.values()], ids=["mixed", *TALL])
async def test_streamed_answer_equals_the_whole_one(source: str) -> None:
    """Also the lines above the screen: nothing is lost, repeated or left over."""
    for seed, rows in ((1, 12), (2, 5)):
        terminal = await stream(source, seed, rows=rows)
        # pyte shows a wide character as two cells
        assert [line.replace(" ", "") for line in terminal.lines()] == [
            line.replace(" ", "") for line in expected(source)
        ]


async def test_all_text_of_an_answer_is_shown() -> None:
    shown = "\n".join((await stream(ANSWER, 4, columns=100)).lines())
    for text in (
        "link (http://example.org/x)",
        "<b>html</b> & old",
        "#hashtag",
        "python",
        "10 ten",
    ):
        assert text in shown


def test_long_code_is_drawn_in_pieces() -> None:
    source = TALL["long code"]
    *pieces, end = split_blocks(source)
    assert len(pieces) > 2 and max(len(piece.source.splitlines()) for piece in pieces) < 70
    assert [piece.is_more_code for piece in pieces] == [False, *[True] * (len(pieces) - 1)]
    code = pieces[0].source + "".join(piece.source.partition("\n")[2] for piece in pieces[1:])
    assert code + end.source == source


HIDING = {
    "comment": "a <!-- secret --> b",
    "html": "<details hidden>secret</details>",
    "definition": "[x]: http://secret 'secret'",
    "image": "![a](http://secret)",
    "link": "[bank](http://secret)",
    "fence": "``` secret words\nx\n```",
    "control characters": "secret &#27;[8m &#x9b;2J &#x202e; &#8203;",
}


@pytest.mark.parametrize("source", HIDING.values(), ids=list(HIDING))
async def test_markdown_hides_nothing(source: str) -> None:
    lines = render(new_console(io.StringIO(), 80), source)
    assert "secret" in "\n".join(lines)
    assert not set("\x9b\u202e\u200b") & set("".join(lines))
    assert "\x1b[8m" not in "".join(lines) and "\x1b]" not in "".join(lines)


async def test_only_the_last_block_is_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    original = markdown.render

    def count(console: Console, source: str) -> list[str]:
        rendered.append(source)
        return original(console, source)

    monkeypatch.setattr(markdown, "render", count)
    source = "\n\n".join(f"Paragraph {number} of many." for number in range(100))
    terminal = await stream(source, 5)
    assert max(map(len, rendered)) < 150, "two blocks, at most"
    assert terminal.written < 20 * len(source)


async def test_frames_are_drawn_by_a_timer() -> None:
    terminal = Terminal()
    writer = MarkdownWriter(new_console(terminal))
    for _ in range(1000):
        writer.write("word ")
    assert not terminal.written, "many events make one frame"
    async with asyncio.timeout(30):
        while not terminal.written:
            await asyncio.sleep(0.01)
    writer.close()
    assert "".join(terminal.lines()).count("word") == 1000


async def test_narrower_terminal_keeps_earlier_lines() -> None:
    terminal = Terminal(80, 12)
    console = new_console(terminal, 80)
    writer = MarkdownWriter(console)
    writer.write("First paragraph.\n\nSecond one, ")
    writer._draw_frame()
    terminal._screen.resize(12, 40)
    console.width = 40
    writer.write("which goes on and on and on and on and on.")
    writer.close()
    text = " ".join(terminal.lines())
    assert text.count("First paragraph.") == 1 and text.count("Second one") == 1


@pytest.mark.parametrize("columns", [12, 20, 60])
def test_table_breaks_long_words_and_keeps_all_letters(columns: int) -> None:
    """Chinese and Japanese have no spaces at which a cell could break; links neither."""
    cells = ("".join(map(chr, range(0x4E00, 0x4E30))), "https://example.org/" + "x" * 60)
    source = "| a | b |\n|---|---|\n" + "".join(f"| {cell} | 1 |\n" for cell in cells)
    lines = render(new_console(io.StringIO(), columns), source)
    shown = "".join(re.sub(r"\x1b\[[0-9;]*m", "", line)[: columns - 2] for line in lines)
    letters = [letter for letter in shown if letter not in " ab1─"]
    assert "".join(letters) == "".join(cells).replace("a", "")
    assert "…" not in shown


@pytest.mark.parametrize("columns", [8, 20, 60])
@pytest.mark.parametrize(
    "source",
    [
        "".join(f"{'  ' * level}- item{level}\n" for level in range(30)),
        f"{'>' * 50} quoted\n",
        f"{'| head ' * 20}|\n{'|---' * 20}|\n{'| cell ' * 20}|\n",
        "1. 1. 1. 1. 1. 1. text\n",
    ],
    ids=["list", "quote", "table", "numbers"],
)
def test_no_text_is_lost_to_nesting_or_width(source: str, columns: int) -> None:
    lines = render(new_console(io.StringIO(), columns), source)
    shown = re.sub(r"\x1b\[[0-9;]*m|\W", "", "".join(lines))
    for word in re.findall(r"[a-z]+\d*", source):
        assert shown.count(word) >= source.count(word)

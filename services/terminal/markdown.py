"""
Show Markdown on a terminal while it arrives.

The text is divided into blocks: paragraphs, items of a list, tables, code. Whatever comes later
changes only the last one, so that one alone is rendered again. A block higher than the screen can't
be drawn again as a whole: until it is complete, its last lines are shown. Code is different, since
its lines never change: they scroll out of the screen one by one.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment, SegmentLines
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from services.terminal.live import LiveLines
from services.terminal.safe_text import clean

MIN_FRAME_SECONDS = 0.03
MAX_LOAD = 0.2
"""Share of the time that is spent on rendering, at most: large blocks have fewer frames."""
CODE_THEME = "ansi_dark"  # the terminal's own colours, on its own background
THEME = Theme(
    {
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold italic",
        "markdown.code": "cyan",
        "markdown.block_quote": "dim",
        "markdown.hr": "dim",
        "markdown.item.bullet": "bold",
        "markdown.item.number": "bold",
        "markdown.link": "underline",
        "markdown.link_url": "dim",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)
MAX_CODE_LINES = 60
LISTS = ("bullet_list_open", "ordered_list_open")
INDENTS = {"blockquote": 4, "list_item": 4}  # in cells, at most
MIN_WIDTH = 8  # of indented text, in cells
MIN_COLUMN = 5  # of a table, with the space beside it
MAX_NESTING = 40  # levels of the parser; what is nested deeper, it drops

# HTML, images and definitions of links would not be shown at all: they are ordinary text here.
_PARSER = (
    MarkdownIt("commonmark", {"html": False, "maxNesting": MAX_NESTING})
    .enable(["strikethrough", "table"])
    .disable(["image", "reference"])
)


class Block(NamedTuple):
    """
    Markdown that is drawn as a whole. A joined block follows without a blank line: it is another
    item of a list, or more code, whose source repeats the line that opens it.
    """

    source: str
    is_joined: bool = False
    is_code: bool = False
    is_more_code: bool = False


NO_BLOCK = Block("")


def split_blocks(source: str, last: Block = NO_BLOCK) -> list[Block]:
    """
    Return the blocks of the source, which begins with all of the block `last`.

    Only complete lines begin a block: `#` may become a heading or a hashtag.
    """
    complete, line_break, rest = source.rpartition("\n")
    lines = source.splitlines(keepends=True)
    starts = list(_starts(_PARSER.parse(complete + line_break)))
    if not starts:
        return [last._replace(source=source)] if source else []
    starts[0] = _Start(0, last.is_joined, starts[0].is_code)
    ends = [start.line for start in starts[1:]] + [len(lines)]
    blocks = [
        Block("".join(lines[start.line : end]), start.is_joined, start.is_code)
        for start, end in zip(starts, ends, strict=True)
    ]
    blocks[0] = blocks[0]._replace(is_more_code=last.is_more_code)
    return [piece for block in blocks for piece in _pieces(block)]


def _pieces(block: Block) -> Iterator[Block]:
    """Yield long code in pieces: highlighting all of it in each frame would take too long."""
    if block.is_code:
        opening, *lines = block.source.splitlines(keepends=True)
        while cut := _cut(lines):
            yield block._replace(source=opening + "".join(lines[:cut]))
            lines = lines[cut:]
            source = opening + "".join(lines)
            block = block._replace(source=source, is_joined=True, is_more_code=True)
    yield block


def _cut(lines: list[str]) -> int:
    """Return how many lines are a piece; it ends between two lines that are not blank."""
    cuts = range(MAX_CODE_LINES, len(lines) - 1)  # the last line may be the fence
    return next((cut for cut in cuts if lines[cut - 1].strip() and lines[cut].strip()), 0)


class _Start(NamedTuple):
    line: int
    is_joined: bool
    is_code: bool


def _starts(tokens: Iterable[Token]) -> Iterator[_Start]:
    is_joined = False
    for token in tokens:
        if token.map is None or token.nesting < 0:
            continue
        if token.level == 0 and token.type in LISTS:
            is_joined = False
        elif token.level == 0:
            yield _Start(token.map[0], False, token.type == "fence")
        elif token.level == 1 and token.type == "list_item_open":
            yield _Start(token.map[0], is_joined, False)
            is_joined = True


class _Heading(markdown.Heading):
    LEVEL_ALIGN: ClassVar = {}  # all begin at the left


class _Code(markdown.CodeBlock):
    """A code block below the words after its fence, which would be hidden otherwise."""

    @classmethod
    def create(cls, markdown: markdown.Markdown, token: Token) -> "_Code":
        return cls(token.info.strip(), markdown.code_theme)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        info = self.lexer_name
        if info:
            yield Text(info, style="dim")
        lexer = info.split()[0] if info else "text"
        code = str(self.text).removesuffix("\n")
        yield Syntax(code, lexer, theme=self.theme, word_wrap=True, background_color="default")


class _Table(markdown.TableElement):
    """A table whose words break if they are wider than their column, and lose no letter."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _Markdown(markdown.Markdown):
    elements = markdown.Markdown.elements | {
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "table_open": _Table,
    }

    def __init__(self, source: str) -> None:
        # links as text and address: a link could name another address than its text does
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.parsed = _PARSER.parse(source)
        for token in self.parsed:
            if token.children:
                token.children = list(_without_plain_links(token.children))
                for child in token.children:  # verses stay lines, as on chat pages
                    child.type = "hardbreak" if child.type == "softbreak" else child.type


def _without_plain_links(tokens: list[Token]) -> Iterator[Token]:
    """Yield the tokens without links whose text is the address: they are ordinary text."""
    is_plain = False
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "link_open":
            is_plain = following is not None and following.content == token.attrs.get("href")
        if not (is_plain and token.type in ("link_open", "link_close")):
            yield token


def _fits(tokens: Iterable[Token], width: int) -> bool:
    """Return whether all of the text can be shown: rich drops what has no cell left."""
    indent = columns = needed = 0
    for token in tokens:
        indent += (
            INDENTS.get(token.type.removesuffix("_open").removesuffix("_close"), 0) * token.nesting
        )
        columns = 0 if token.type == "tr_open" else columns + (token.type == "th_open")
        needed = max(needed, indent + max(MIN_WIDTH if indent else 0, columns * MIN_COLUMN))
        if token.level >= MAX_NESTING - 1:
            return False
    return needed <= width


def render(console: Console, source: str) -> list[str]:
    """
    Return Markdown as lines with styles, one cell narrower than the console; as it is written if
    that is too narrow for it.
    """
    options = console.options.update(width=max(1, console.width - 1))
    formatted = _Markdown(source)
    shown = formatted if _fits(formatted.parsed, options.max_width) else Text(source)
    lines = [
        [Segment(clean(part.text), part.style) for part in line if not part.control]
        for line in console.render_lines(shown, options, pad=False)
    ]
    while lines and _is_blank(lines[-1]):
        lines.pop()
    while lines and _is_blank(lines[0]):
        lines.pop(0)
    if not lines:
        return []
    with console.capture() as captured:
        console.print(SegmentLines(lines, new_lines=True), crop=False, end="")
    return [line.rstrip() for line in captured.get().removesuffix("\n").split("\n")]


def _growing_part(block: Block) -> Block:
    """Return code without its last line, which may become its end, or the begin of a paragraph."""
    complete, line_break, _ = block.source.rpartition("\n")
    return block._replace(source=complete + line_break) if block.is_code else block


def has_info(code: str) -> bool:
    """Return whether the first line of the code names its language, which is shown."""
    return bool(code.partition("\n")[0].strip().strip("`~"))


def _is_blank(line: list[Segment]) -> bool:
    return not any(part.text.strip() for part in line)


class MarkdownWriter:
    """
    Writes the Markdown of one answer after the other to a terminal, in frames that a timer of the
    event loop draws.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = LiveLines(console.file)
        self._timer: asyncio.TimerHandle | None = None
        self._frame_seconds = MIN_FRAME_SECONDS
        self._begin()

    def _begin(self) -> None:
        self._source = ""  # that of the last block, and more
        self._last = NO_BLOCK
        self._is_first = True

    def write(self, text: str) -> None:
        self._source += clean(text)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._frame_seconds, self._draw_frame)

    def close(self) -> None:
        """Write the rest, and begin another text."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        for block in split_blocks(self._source, self._last):
            self._finish(block)
        self._begin()

    def _draw_frame(self) -> None:
        began = time.perf_counter()
        self._timer = None
        if not self._source:
            return
        *complete, last = split_blocks(self._source, self._last)
        for block in complete:
            self._finish(block)
        lines = self._lines(_growing_part(last))
        if not last.is_code:
            lines = lines[-self._live.fitting(self._console.size) :]
        self._live.draw(lines, self._console.size)
        self._source, self._last = last.source, last
        cost = time.perf_counter() - began
        self._frame_seconds = max(MIN_FRAME_SECONDS, cost / MAX_LOAD)

    def _finish(self, block: Block) -> None:
        lines = self._lines(block)
        self._live.draw(lines, self._console.size)
        self._live.commit()
        self._is_first &= not lines

    def _lines(self, block: Block) -> list[str]:
        lines = render(self._console, block.source)
        if block.is_more_code and has_info(block.source):
            del lines[:1]
        return lines if self._is_first or block.is_joined or not lines else ["", *lines]

"""
The results as Markdown: a file per model, a section per load, with the machine and the bars. A load
that is run again replaces its own section, and leaves the others.
"""

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.bars import Bar, Spread, number
from bench.pairs import ratio
from bench.plots import Plot, draw

RESULTS = Path("bench/results")
SECTION = re.compile(r"^## (\S+)\n", re.MULTILINE)


class Row(NamedTuple):
    """`result` is what the bar is about; `cells` are the medians that it was made of."""

    what: str
    cells: tuple[float, ...]
    result: Spread
    bar: Bar | None = None


class Section(NamedTuple):
    load: str
    model: str  # the file's name without its ending
    note: str
    columns: tuple[str, ...]  # of the rows' cells
    rows: list[Row]
    plots: tuple[Plot, ...] = ()


def compared(what: str, pairs: Sequence[Sequence[float]], bar: Bar | None = None) -> Row:
    """What each server did in each pair of runs; the result is ours, the first, by the second's."""
    return Row(what, _medians(pairs), ratio(pairs), bar)


def own(what: str, pairs: Sequence[Sequence[float]], bar: Bar | None = None) -> Row:
    """The same, but the result is ours alone."""
    return Row(what, _medians(pairs), Spread.of(pair[0] for pair in pairs), bar)


def table(section: Section) -> str:
    head = ["", *section.columns, "result", "bar", "holds"]
    lines = [head, ["---"] * len(head), *map(_cells, section.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(section: Section, folder: Path = RESULTS) -> Path:
    """Into the model's file; the plots beside it."""
    path = folder / f"{section.model}.md"
    images = [draw(plot, folder / f"{section.model}-{plot.name}.png") for plot in section.plots]
    parts = [section.note, machine(), table(section), *(f"![]({image.name})" for image in images)]
    sections = read(path) | {section.load: "\n\n".join(parts)}
    body = "\n\n".join(f"## {load}\n\n{text}" for load, text in sorted(sections.items()))
    path.write_text(f"# {section.model}\n\n{body}\n")
    return path


def read(path: Path) -> dict[str, str]:
    """The sections of a file, by their loads."""
    if not path.exists():
        return {}
    _, *parts = SECTION.split(path.read_text())
    return {load: text.strip() for load, text in zip(parts[::2], parts[1::2], strict=True)}


def machine() -> str:
    cpus = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    name = re.search(r"^model name\s*: (.*)$", cpus, re.MULTILINE)
    cpu = name[1] if name else platform.processor()
    return f"Machine: {cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}."


def _medians(pairs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(Spread.of(column).median for column in zip(*pairs, strict=True))


def _cells(row: Row) -> list[str]:
    bar, holds = "", ""
    if row.bar:
        bar, holds = str(row.bar), "yes" if row.bar.holds(row.result.median) else "**no**"
    return [row.what, *map(number, row.cells), str(row.result), bar, holds]

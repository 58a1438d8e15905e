"""
Write results as Markdown: a file per model, a section per load, with the machine, a table and
plots. A load that runs again replaces its own section and leaves the others.
"""

import operator
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

RESULTS = Path("bench/results")
SECTION = re.compile(r"^## (\S+)\n", re.MULTILINE)
COMPARE = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


class Spread(NamedTuple):
    """The median of several runs, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        middle = f"**{format_number(self.median)}**"
        if self.low == self.high:
            return middle
        return f"{middle} ({format_number(self.low)} to {format_number(self.high)})"


class Goal(NamedTuple):
    """What a result should be."""

    sign: Literal["≥", "≤", "<"]
    limit: float

    def is_met(self, value: float) -> bool:
        return bool(COMPARE[self.sign](value, self.limit))

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


class Row(NamedTuple):
    """`result` is what the goal is about; `cells` are the medians that it was computed from."""

    what: str
    cells: tuple[float, ...]
    result: Spread
    goal: Goal | None = None


Line = dict[int, Spread]  # by x


class Plot(NamedTuple):
    """A line of medians for each server, inside the band of all its runs."""

    name: str
    x: str
    y: str
    lines: dict[str, Line]  # by the server's name


class Section(NamedTuple):
    load: str
    model: str  # file name without suffix
    note: str
    columns: tuple[str, ...]  # of the rows' cells
    rows: list[Row]
    plots: tuple[Plot, ...] = ()


def ratio(pairs: Sequence[Sequence[float]]) -> Spread:
    """Return the spread of first / second over all pairs."""
    return Spread.of(ours / theirs for ours, theirs, *_ in pairs)


def ratio_row(what: str, pairs: Sequence[Sequence[float]], goal: Goal | None = None) -> Row:
    """Return a row whose result is the ratio of the first server's value to the second's."""
    return Row(what, _medians(pairs), ratio(pairs), goal)


def own_row(what: str, pairs: Sequence[Sequence[float]], goal: Goal | None = None) -> Row:
    """Return a row whose result is the first server's value."""
    return Row(what, _medians(pairs), Spread.of(pair[0] for pair in pairs), goal)


def format_table(section: Section) -> str:
    head = ["", *section.columns, "result", "goal", "met"]
    lines = [head, ["---"] * len(head), *map(_format_row, section.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_number(value: float) -> str:
    """Format with three significant digits, or all digits before the decimal point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def write_section(section: Section, folder: Path = RESULTS) -> Path:
    """Write the section into the model's file, and its plots beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{section.model}.md"
    images = [draw_plot(plot, folder / f"{path.stem}-{plot.name}.png") for plot in section.plots]
    links = [f"![]({image.name})" for image in images]
    parts = [section.note, describe_machine(), format_table(section), *links]
    sections = read_sections(path) | {section.load: "\n\n".join(parts)}
    body = "\n\n".join(f"## {load}\n\n{text}" for load, text in sorted(sections.items()))
    path.write_text(f"# {section.model}\n\n{body}\n")
    return path


def read_sections(path: Path) -> dict[str, str]:
    """Return the sections of a file by load."""
    if not path.exists():
        return {}
    _, *parts = SECTION.split(path.read_text())
    return {load: text.strip() for load, text in zip(parts[::2], parts[1::2], strict=True)}


def describe_machine() -> str:
    cpus = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    name = re.search(r"^model name\s*: (.*)$", cpus, re.MULTILINE)
    cpu = name[1] if name else platform.processor()
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"Machine: {cpu}, {os.cpu_count()} cores, {', '.join([*_gpus(), system])}."


def _gpus() -> list[str]:
    """Return the names of NVIDIA's GPUs."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


def draw_plot(plot: Plot, path: Path) -> Path:
    """Write the plot as a PNG."""
    from matplotlib.figure import Figure  # in the group `bench`, which nothing else here needs

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in plot.lines.items():
        xs = list(line)
        axes.plot(xs, [spread.median for spread in line.values()], marker="o", label=name)
        lows, highs = [s.low for s in line.values()], [s.high for s in line.values()]
        axes.fill_between(xs, lows, highs, alpha=0.2)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.set_xticks(sorted({x for line in plot.lines.values() for x in line}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def spread_lines(names: Sequence[str], by_x: dict[int, list[tuple[float, ...]]]) -> dict[str, Line]:
    """Return a line per server from its value in each pair of runs, for each x."""
    return {
        name: {x: Spread.of(pair[i] for pair in pairs) for x, pairs in by_x.items()}
        for i, name in enumerate(names)
    }


def _medians(pairs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(statistics.median(column) for column in zip(*pairs, strict=True))


def _format_row(row: Row) -> list[str]:
    goal, met = "", ""
    if row.goal:
        goal, met = str(row.goal), "yes" if row.goal.is_met(row.result.median) else "**no**"
    return [row.what, *map(format_number, row.cells), str(row.result), goal, met]

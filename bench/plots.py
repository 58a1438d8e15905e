"""A plot of one measure: a line of medians for each server, in the band of all its runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.bars import Spread

Line = dict[int, Spread]  # by what stands on the x axis


class Plot(NamedTuple):
    name: str
    x: str
    y: str
    lines: dict[str, Line]  # by the server's name


def draw(plot: Plot, path: Path) -> Path:
    """Writes a PNG."""
    from matplotlib.figure import Figure  # of the group bench, which nothing else here needs

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


def lines(names: Sequence[str], by_x: dict[int, list[tuple[float, ...]]]) -> dict[str, Line]:
    """Of what each server did in each pair of runs, for each x."""
    return {
        name: {x: Spread.of(pair[i] for pair in pairs) for x, pairs in by_x.items()}
        for i, name in enumerate(names)
    }

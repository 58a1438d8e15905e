from pathlib import Path

import pytest

from bench.report import (
    Goal,
    Plot,
    Row,
    Section,
    Spread,
    draw_plot,
    format_number,
    format_table,
    own_row,
    ratio_row,
    read_sections,
    spread_lines,
    write_section,
)


def test_spread_is_median_lowest_and_highest() -> None:
    assert Spread.of([5, 1, 2]) == Spread(2, 1, 5)
    assert str(Spread.of([5, 1, 2])) == "**2.00** (1.00 to 5.00)"


def test_single_run_has_no_spread() -> None:
    assert str(Spread.of([2])) == "**2.00**"


@pytest.mark.parametrize(
    ("goal", "met", "missed"),
    [(Goal("≥", 1.1), 1.1, 1.09), (Goal("≤", 0.6), 0.6, 0.61), (Goal("<", 3), 2.99, 3)],
)
def test_goal_is_met_up_to_its_limit(goal: Goal, met: float, missed: float) -> None:
    assert goal.is_met(met) and not goal.is_met(missed)


def test_number_has_three_significant_digits() -> None:
    numbers = (0.349, 12.34, 123.4, 12345)
    assert list(map(format_number, numbers)) == ["0.35", "12.3", "123", "12345"]


def section(load: str, note: str = "A note.") -> Section:
    row = ratio_row("tokens/s", [(110, 100), (130, 100), (90, 100)], Goal("≥", 1.0))
    return Section(load, "tiny", note, ("ours", "llama-server"), [row])


def test_table_shows_whether_the_goal_is_met() -> None:
    assert format_table(section("burst")).splitlines() == [
        "|  | ours | llama-server | result | goal | met |",
        "| --- | --- | --- | --- | --- | --- |",
        "| tokens/s | 110 | 100 | **1.10** (0.90 to 1.30) | ≥ 1 | yes |",
    ]


def test_missed_goal_is_bold() -> None:
    missed = own_row("growth", [(1.5, 9.0)], Goal("≤", 1.3))
    assert missed == Row("growth", (1.5, 9.0), Spread(1.5, 1.5, 1.5), Goal("≤", 1.3))
    lines = format_table(section("turns")._replace(rows=[missed])).splitlines()
    assert lines[-1] == "| growth | 1.50 | 9.00 | **1.50** | ≤ 1.3 | **no** |"


def test_rerun_load_replaces_only_its_own_section(tmp_path: Path) -> None:
    for made in (section("turns"), section("burst", "Old."), section("burst", "New.")):
        path = write_section(made, tmp_path)
    sections = read_sections(path)
    assert list(sections) == ["burst", "turns"]
    assert "New." in sections["burst"] and "Old." not in path.read_text()
    assert "Machine: " in sections["turns"] and format_table(section("turns")) in sections["turns"]


def test_line_has_the_spread_of_its_server_at_each_x() -> None:
    drawn = spread_lines(("ours", "llama-server"), {1: [(10, 5), (12, 7)], 2: [(20, 9)]})
    assert drawn["ours"] == {1: Spread(11, 10, 12), 2: Spread(20, 20, 20)}
    assert drawn["llama-server"] == {1: Spread(6, 5, 7), 2: Spread(9, 9, 9)}


def test_plot_is_a_png(tmp_path: Path) -> None:
    plot = Plot("speed", "chats", "tokens/s", {"ours": {1: Spread(2, 1, 3), 2: Spread(4, 3, 5)}})
    assert draw_plot(plot, tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")

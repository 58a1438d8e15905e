from pathlib import Path

from bench.bars import Bar, Spread
from bench.report import Row, Section, compared, own, read, table, write


def section(load: str, note: str = "A note.") -> Section:
    row = compared("tokens/s", [(110, 100), (130, 100), (90, 100)], Bar("≥", 1.0))
    return Section(load, "tiny", note, ("ours", "llama-server"), [row])


def test_a_table_says_whether_the_bar_holds() -> None:
    assert table(section("burst")).splitlines() == [
        "|  | ours | llama-server | result | bar | holds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| tokens/s | 110 | 100 | **1.10** (0.90 to 1.30) | ≥ 1 | yes |",
    ]


def test_a_bar_that_is_missed_stands_out() -> None:
    missed = own("growth", [(1.5, 9.0)], Bar("≤", 1.3))
    assert missed == Row("growth", (1.5, 9.0), Spread(1.5, 1.5, 1.5), Bar("≤", 1.3))
    lines = table(section("turns")._replace(rows=[missed])).splitlines()
    assert lines[-1] == "| growth | 1.50 | 9.00 | **1.50** | ≤ 1.3 | **no** |"


def test_a_load_that_is_run_again_replaces_its_own_section_alone(tmp_path: Path) -> None:
    for made in (section("turns"), section("burst", "Old."), section("burst", "New.")):
        path = write(made, tmp_path)
    sections = read(path)
    assert list(sections) == ["burst", "turns"]
    assert "New." in sections["burst"] and "Old." not in path.read_text()
    assert "Machine: " in sections["turns"] and table(section("turns")) in sections["turns"]

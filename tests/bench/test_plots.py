from pathlib import Path

from bench.bars import Spread
from bench.plots import Plot, draw, lines


def test_a_line_has_the_spread_of_its_server_at_each_x() -> None:
    drawn = lines(("ours", "llama-server"), {1: [(10, 5), (12, 7)], 2: [(20, 9)]})
    assert drawn["ours"] == {1: Spread(11, 10, 12), 2: Spread(20, 20, 20)}
    assert drawn["llama-server"] == {1: Spread(6, 5, 7), 2: Spread(9, 9, 9)}


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    plot = Plot("speed", "chats", "tokens/s", {"ours": {1: Spread(2, 1, 3), 2: Spread(4, 3, 5)}})
    assert draw(plot, tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")

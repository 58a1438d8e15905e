"""The evaluation: its questions, and a short run with the demo model."""

from pathlib import Path

import pytest

from model.training import words
from model.training.evaluate import (
    BY_HAND,
    COMMON,
    GOALS,
    SKILLS,
    UNSEEN,
    VOICES,
    Score,
    format_report,
    make_probes,
    score_probes,
)
from model.training.examinee import SERVICE, Examinee

DEMO = Path("model/demo.gguf")


@pytest.mark.parametrize("row", [COMMON, UNSEEN])
def test_recall_is_probed_at_each_distance(row: str) -> None:
    asked = [probe for probe in make_probes(3, 2, VOICES[None]) if probe.row.startswith(row)]
    assert sorted(probe.turn.distance for probe in asked) == sorted([*range(1, 10)] * 2)


def test_common_recall_uses_only_listed_words() -> None:
    asked = [probe for probe in make_probes(4, 3, VOICES[None]) if "recall" in probe.row]
    for probe in asked:
        if probe.row.startswith(COMMON):
            assert words.is_common(probe.turn.must[0])


def test_report_marks_a_missed_goal() -> None:
    table = {
        row: Score(right=9, asked=10)
        for row in (
            *SKILLS,
            *(f"{r}{d}" for r in (COMMON, UNSEEN) for d in ("", *(f" {n}" for n in range(1, 10)))),
        )
    }
    shown = format_report(table | {BY_HAND: Score(9, 10)})
    assert "| recall, common words | 90.0 % | 10 | 97 % **missed** |" in shown
    assert "| recall, never seen | 90.0 % | 10 | 85 % |" in shown


def test_demo_model_passes_a_short_evaluation() -> None:
    """A result far below a goal means that something is broken."""
    table = score_probes(
        Examinee(DEMO, None, SERVICE, seed=1), list(make_probes(1, 8, VOICES[None]))
    )
    wrong = [line for score in table.values() for line in score.wrong]
    assert sum(score.percent for score in table.values()) / len(table) > 95, wrong
    assert all(table[row].percent > goal - 13 for row, goal in GOALS.items() if row in table), wrong

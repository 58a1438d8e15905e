"""The examination: which questions it asks, and that the demo model passes a short one."""

from pathlib import Path

import pytest

from model.training import words
from model.training.evaluate import (
    BARS,
    BY_HAND,
    COMMON,
    SKILLS,
    UNSEEN,
    VOICES,
    Score,
    probes,
    report,
    scores,
)
from model.training.examinee import SERVICE, Examinee

DEMO = Path("model/demo.gguf")


@pytest.mark.parametrize("row", [COMMON, UNSEEN])
def test_a_fact_is_asked_for_from_each_distance(row: str) -> None:
    asked = [probe for probe in probes(3, 2, VOICES[None]) if probe.row.startswith(row)]
    assert sorted(probe.turn.distance for probe in asked) == sorted([*range(1, 10)] * 2)


def test_common_words_are_in_the_lists_and_those_never_seen_are_held_out() -> None:
    asked = [probe for probe in probes(4, 3, VOICES[None]) if "recall" in probe.row]
    for probe in asked:
        if probe.row.startswith(COMMON):
            assert words.is_common(probe.turn.must[0])


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    table = {
        row: Score(right=9, asked=10)
        for row in (
            *SKILLS,
            *(f"{r}{d}" for r in (COMMON, UNSEEN) for d in ("", *(f" {n}" for n in range(1, 10)))),
        )
    }
    shown = report(table | {BY_HAND: Score(9, 10)})
    assert "| recall, common words | 90.0 % | 10 | 97 % **missed** |" in shown
    assert "| recall, never seen | 90.0 % | 10 | 85 % |" in shown


def test_the_demo_model_passes_a_short_examination() -> None:
    """Far from a bar on few questions means that something is broken."""
    table = scores(Examinee(DEMO, None, SERVICE, seed=1), list(probes(1, 8, VOICES[None])))
    wrong = [line for score in table.values() for line in score.wrong]
    assert sum(score.percent for score in table.values()) / len(table) > 95, wrong
    assert all(table[row].percent > bar - 13 for row, bar in BARS.items() if row in table), wrong

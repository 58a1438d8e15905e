"""
CHAT_STOP applied to the answers of a real chat model to 50 ordinary prompts, which
`python -m bench.stops MODEL --save` writes: no answer is cut, and text after an answer is.
"""

import json
from pathlib import Path

import pytest

from bench.stops import PROMPTS, apply_stops
from services.inference.engine.output.stops import StopRules
from services.inference.settings import STOPS

ANSWERS: dict[str, str] = json.loads(
    Path("tests/inference/engine/output/ordinary_answers.json").read_text()
)
CUT_IN_CODE = [prompt for prompt, answer in ANSWERS.items() if answer.count("`") % 2]
NAMES_A_ROLE = [prompt for prompt in PROMPTS if "user" in prompt]


def test_every_prompt_has_an_answer() -> None:
    assert tuple(ANSWERS) == PROMPTS and len(PROMPTS) == 50


@pytest.mark.parametrize("prompt", ANSWERS)
def test_ordinary_answer_is_unchanged(prompt: str) -> None:
    assert apply_stops(ANSWERS[prompt], StopRules.from_setting(STOPS, prompt)) == (
        ANSWERS[prompt],
        None,
    )


def test_literal_strings_would_cut_ordinary_answers() -> None:
    cut = [
        prompt
        for prompt, answer in ANSWERS.items()
        if apply_stops(answer, StopRules.literal(STOPS)).stop
    ]
    assert len(cut) > 5 and "Explain recursion with an example." in cut


@pytest.mark.parametrize("prompt", [p for p in PROMPTS if p not in CUT_IN_CODE + NAMES_A_ROLE])
@pytest.mark.parametrize("added", ["\nUser: thanks", "\n\nHere's an example:\n\nUser: thanks"])
def test_role_line_after_an_ordinary_answer_ends_it(prompt: str, added: str) -> None:
    answer = ANSWERS[prompt].rstrip()
    text, stop = apply_stops(answer + added, StopRules.from_setting(STOPS, prompt))
    assert (text, stop and stop.strip()) == (answer, "User:")

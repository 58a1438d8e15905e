"""The dialog generator: training dialogs, and what is held out from them."""

import random
from itertools import islice

import pytest

from model.training import systems, words
from model.training.dialogs import Dialog, dialogs
from model.training.reckoning import TOO_FAR
from model.training.talk import Turn
from model.training.wordings import expand
from model.training.words import Split

DEFAULT_STOPS = (
    *("</s>", "User:", "\nUser:", "Human:", "\nHuman:", "Question:", "\nQuestion:"),
    *("\n\n\n", "Example:", "Here's an", "Let me"),
)


def _some(seed: int, split: Split = "train", number: int = 2000) -> list[Dialog]:
    return list(islice(dialogs(seed, split), number))


def _turns(made: list[Dialog], skill: str) -> list[Turn]:
    return [turn for dialog in made for turn in dialog.turns if turn.skill == skill]


def test_same_seed_gives_the_same_dialogs() -> None:
    assert _some(5, number=200) == _some(5, number=200)
    assert _some(5, number=200) != _some(6, number=200)


def test_no_answer_contains_a_default_stop_string() -> None:
    for dialog in _some(1):
        for turn in dialog.turns:
            assert not [stop for stop in DEFAULT_STOPS if stop in turn.answer], turn


def test_training_has_no_held_out_names() -> None:
    names = [turn.must[0] for turn in _turns(_some(2), "tell") if turn.answer.startswith("Nice to")]
    assert names
    assert not [name for name in names if words.is_held_out(name.split()[0])]


def test_evaluation_has_only_held_out_names() -> None:
    made = _some(2, "eval")
    names = [turn.must[0] for turn in _turns(made, "tell") if turn.answer.startswith("Nice to")]
    assert names
    assert all(words.is_held_out(name.split()[0]) for name in names)


def test_most_common_words_are_not_held_out() -> None:
    common = ("Ada", "Bob", "Paris", "Berlin", "Rex", "Luna", "blue", "red", "green", "pizza")
    assert not [word for word in common if words.is_held_out(word)]


def test_recalled_values_occur_earlier_in_the_dialog() -> None:
    for dialog in _some(3):
        transcript = dialog.system.prompt or ""
        for turn in dialog.turns:
            if turn.skill == "recall" and turn.learned:
                assert turn.must[0] in transcript, turn
            transcript += f"\n{turn.user}\n{turn.answer}"


def test_counting_ends_at_the_requested_number() -> None:
    counted = _turns([dialog for dialog in _some(4) if not dialog.system.tone], "count")
    answers = {turn.answer for turn in counted}
    assert answers >= {_numbers(10), _numbers(50), _numbers(70), TOO_FAR}
    assert all(answer == _numbers(answer.count(",") + 1) for answer in answers - {TOO_FAR})


def _numbers(last: int) -> str:
    return ", ".join(str(number) for number in range(1, last + 1)) + "."


def test_most_dialogs_have_the_default_system_prompt() -> None:
    made = _some(5)
    assert sum(dialog.system.prompt == systems.DEFAULT for dialog in made) > len(made) / 2


def test_every_evaluated_skill_occurs() -> None:
    made = {turn.skill for dialog in _some(6, "eval") for turn in dialog.turns}
    wanted = {"recall", "unknown", "know", "first_message", "repeat", "count", "faq", "system_name"}
    assert wanted <= made


def test_tone_of_the_system_prompt_wraps_each_answer() -> None:
    toned = [dialog for dialog in _some(7) if dialog.system.tone]
    assert toned
    for dialog in toned:
        assert dialog.system.tone
        before, after = dialog.system.tone.before, dialog.system.tone.after
        for turn in dialog.turns:
            if turn.skill != "repeat" and turn.learned:
                assert turn.answer.startswith(before) and turn.answer.endswith(after), turn


def test_no_answer_exceeds_the_default_token_limit() -> None:
    """150 tokens: a word, a number or a mark is rarely more than one."""
    longest = max((turn.answer for made in _some(8) for turn in made.turns), key=len)
    assert len(longest) < 500, longest


@pytest.mark.parametrize("wording", ["[Tell me/Say] {v}[ now/].", "[a/[b/c]] [/x] , {v} ?"])
def test_wording_with_brackets_has_many_expansions(wording: str) -> None:
    made = {expand(random.Random(seed), wording) for seed in range(50)}
    assert len(made) >= 4
    assert not [text for text in made if set(text) & set("[]/") or " ." in text or "  " in text]

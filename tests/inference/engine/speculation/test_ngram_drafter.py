import random

import pytest

from services.inference.engine.speculation.ngram_drafter import MAX_TOKENS, NGRAM, NgramDrafter

SENTENCE = [*range(100, 120)]
FREE = [*range(1000, 1100)]  # no token occurs twice


def after(prompt: list[int], answer: list[int]) -> NgramDrafter:
    drafter = NgramDrafter(prompt)
    drafter.follow(answer)
    return drafter


def test_quotation_is_drafted_as_it_goes_on_in_the_prompt() -> None:
    drafter = after([*SENTENCE, *FREE], SENTENCE[:5])
    assert drafter.draft(4) == SENTENCE[5:9]
    assert drafter.draft(200) == [*SENTENCE[5:], *FREE, *SENTENCE[:5]]


def test_answer_that_repeats_itself_is_drafted() -> None:
    assert after(FREE, [*SENTENCE, 7, *SENTENCE[:3]]).draft(2) == SENTENCE[3:5]


def test_prompt_that_ends_in_a_repetition_has_a_draft_at_once() -> None:
    assert after([*SENTENCE, 7, *SENTENCE[:4]], []).draft(2) == SENTENCE[4:6]


@pytest.mark.parametrize("prompt", [[], [1], [1, 2], [1, 1, 1], FREE])
def test_text_without_repeated_ngram_has_no_draft(prompt: list[int]) -> None:
    drafter = after(prompt, SENTENCE)
    assert drafter.draft(9) == [] and drafter.expected_hits(9) == 0


def test_shorter_match_than_an_ngram_is_no_source() -> None:
    assert after([*SENTENCE, *FREE], SENTENCE[: NGRAM - 1]).draft(9) == []


def test_last_of_several_places_is_the_source() -> None:
    assert after([1, 2, 3, 4, 1, 2, 3, 5], [1, 2, 3]).draft(1) == [5]


def test_source_is_found_again_after_an_edit() -> None:
    drafter = after([*SENTENCE, *FREE], [*SENTENCE[:8], 7, *SENTENCE[9:12]])
    assert drafter.draft(3) == SENTENCE[12:15]


def test_long_match_is_trusted_more_than_a_short_one() -> None:
    prompt = [*SENTENCE, *FREE]
    expected = [after(prompt, SENTENCE[:length]).expected_hits(8) for length in (3, 8, 16)]
    assert 0 < expected[0] < expected[1] < expected[2] < 8


def test_length_of_match_includes_what_precedes_the_ngram() -> None:
    whole = after([*SENTENCE, *FREE], SENTENCE[:16])
    prompt = [*SENTENCE, *FREE, *SENTENCE[:16]]
    assert after(prompt, []).expected_hits(4) == pytest.approx(whole.expected_hits(4), rel=0.1)


def test_misses_make_drafts_less_and_hits_more_promising() -> None:
    prompt = [*SENTENCE, *FREE]
    misled = [token for i in range(10) for token in (*SENTENCE[:3], 2000 + i)]
    confirmed = [token for i in range(10) for token in (*SENTENCE[:5], 2000 + i)]
    fresh, worse, better = (
        after(prompt, [*before, *SENTENCE[:3]]).expected_hits(1)
        for before in ([], misled, confirmed)
    )
    assert worse < fresh < better


def test_draft_is_no_longer_than_what_is_known() -> None:
    drafter = after([], [1, 2, 3, 4, 1, 2, 3])
    assert drafter.draft(9) == [4, 1, 2, 3]
    assert drafter.expected_hits(9) == drafter.expected_hits(4)


def test_tokens_may_be_followed_in_any_portions() -> None:
    rng = random.Random(1)
    prompt, answer = ([rng.randrange(4) for _ in range(200)] for _ in range(2))
    whole, steps = after(prompt, answer), NgramDrafter(prompt)
    for length in (1, 2, 2, 50, 51, 200):
        steps.follow(answer[:length])
    assert steps.draft(20) == whole.draft(20)
    assert steps.expected_hits(20) == whole.expected_hits(20)


def test_only_the_end_of_a_long_prompt_is_indexed() -> None:
    long = [*SENTENCE, *range(10**6, 10**6 + MAX_TOKENS)]
    assert after(long, SENTENCE[:5]).draft(1) == []
    assert after(long, long[-9:-4]).draft(1) == long[-4:-3]

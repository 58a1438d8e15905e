import pytest

from bench.gaps import STEADY, gaps
from bench.load import Sample


def stream(*pieces: float) -> Sample:
    """The first pieces, of a stream that is not steady yet, are far apart."""
    return Sample(asked=-100.0, pieces=[float(i - 100) for i in range(STEADY - 1)] + list(pieces))


def test_gaps_count_as_during_from_the_question_to_the_prompts_first_token() -> None:
    long = Sample(asked=3.5, pieces=[8.5, 9.0])
    found = gaps([stream(0, 1, 2, 3, 5, 8, 9, 9.1)], long)
    # 3 to 5, 5 to 8, and 8 to 9, in which the prompt's first token came
    assert found.relative == {"median": 2, "mean": 2, "95th percentile": 3, "longest": 3}
    assert found.first_token == pytest.approx(5000)


def test_one_step_that_reads_the_whole_prompt_is_one_long_gap() -> None:
    long = Sample(asked=2.1, pieces=[9.9])
    assert gaps([stream(0, 1, 2, 10, 11)], long).relative["longest"] == 8

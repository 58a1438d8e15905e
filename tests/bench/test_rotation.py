from bench.load import Sample
from bench.rotation import shares


def sample(prompt: int, cached: int, answer: int = 10) -> Sample:
    return Sample(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=answer)


def test_known_tokens_of_a_first_prompt_are_the_opening() -> None:
    assert shares([[sample(100, cached=40)]], opening=40) == (100, 40)
    assert shares([[sample(100, cached=10)]], opening=40) == (25, 10)


def test_known_tokens_of_a_later_prompt_are_all_before_it() -> None:
    session = [sample(100, cached=0), sample(200, cached=109)]
    assert shares([session], opening=0).of_known == 100


def test_tokens_cached_beyond_the_known_do_not_count() -> None:
    """Another session may happen to share a prefix."""
    sessions = [[sample(100, cached=90)], [sample(100, cached=0)]]
    assert shares(sessions, opening=50) == (50, 45)

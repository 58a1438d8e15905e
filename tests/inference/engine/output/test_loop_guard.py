from services.inference.engine.output.loop_guard import LoopGuard


def tokens_said(answer: list[int]) -> int | None:
    """How many tokens of the answer are said until it is taken for a loop; None: it never is."""
    guard = LoopGuard()
    return next((i for i, token in enumerate(answer, 1) if guard.push(token)), None)


def test_one_token_over_and_over_is_a_loop_at_128() -> None:
    assert tokens_said([7] * 127) is None
    assert tokens_said([7] * 200) == 128


def test_a_longer_piece_is_one_at_eight_times_itself() -> None:
    sentence = list(range(20))
    assert tokens_said(sentence * 7) is None
    assert tokens_said(sentence * 10) == 20 * 8


def test_what_was_said_before_the_loop_does_not_matter() -> None:
    assert tokens_said([*range(1000, 1500), *[1, 2] * 100]) == 500 + 128


def test_a_piece_longer_than_32_tokens_is_not_looked_for() -> None:
    assert tokens_said(list(range(33)) * 20) is None


def test_one_difference_begins_the_count_anew() -> None:
    assert tokens_said([7] * 100 + [8] + [7] * 100) is None


def test_counting_and_tables_are_no_loops() -> None:
    numbered = [token for number in range(400) for token in (1, 1000 + number, 2, 3)]
    table = [token for row in range(100) for token in (1, 2, 3, 500 + row % 9, 2, 600 + row % 7, 4)]
    assert tokens_said(numbered) is None
    assert tokens_said(table) is None

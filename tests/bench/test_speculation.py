from bench.speculation import Answered, Run, row


def run(seconds: float, tokens: list[int], drafted: int = 0, accepted: int = 0) -> Run:
    return Run([Answered(tokens, seconds, drafted, accepted)])


def test_rate_leaves_out_the_first_token_of_each_answer() -> None:
    answers = [Answered([1, 2, 3], 0.5, 0, 0), Answered([1, 2, 3], 1.5, 0, 0)]
    assert Run(answers).rate == 2


def test_row_has_ratio_of_pairs_and_shares_of_all_runs() -> None:
    pairs = [
        (run(1, [1, 2, 3], drafted=4, accepted=3), run(2, [1, 2, 3])),
        (run(1, [1, 2, 4], drafted=4, accepted=1), run(4, [1, 2, 3])),
    ]
    found = row("quoting", pairs)
    with_drafts, without, drafted, accepted, same = found.cells
    assert (with_drafts, without, drafted) == (2, 0.75, 4)
    assert (accepted, same) == (50, 50)
    assert (found.result.median, found.result.low, found.result.high) == (3, 2, 4)


def test_nothing_drafted_accepts_nothing() -> None:
    (*_, accepted, _) = row("free text", [(run(1, [1, 2]), run(1, [1, 2]))]).cells
    assert accepted == 0

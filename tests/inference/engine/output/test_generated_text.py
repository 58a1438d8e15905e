from services.contract.messages import Sampling
from services.inference.engine.backend import SampledToken
from services.inference.engine.output.generated_text import GeneratedText, LoopGuard, TextChunk
from services.inference.engine.output.stops import StopRules


def said(answer: GeneratedText, *pieces: str | bytes) -> list[TextChunk]:
    """What goes out where all is sent at once; the tokens are numbered from 0."""
    sent = []
    for piece in pieces:
        data = piece.encode() if isinstance(piece, str) else piece
        answer.push(SampledToken(len(answer.tokens)), data, is_end=False)
        if (out := answer.take_chunk()) is not None:
            sent.append(out)
    return sent


def with_stop(*stops: str) -> GeneratedText:
    return GeneratedText(Sampling(max_tokens=100, stop=stops))


def test_a_token_is_told_with_its_text() -> None:
    assert said(with_stop(), "a", "b") == [TextChunk(0, "a", (0,)), TextChunk(1, "b", (1,))]


def test_the_tokens_of_a_character_are_told_together() -> None:
    smile = "🙂".encode()
    assert said(with_stop(), "a", smile[:1], smile[1:3], smile[3:] + b"!") == [
        TextChunk(0, "a", (0,)),
        TextChunk(1, "🙂!", (1, 2, 3)),
    ]


def test_a_token_that_has_no_text_is_told_with_the_next_one_that_has() -> None:
    assert said(with_stop(), "a", "", "b") == [TextChunk(0, "a", (0,)), TextChunk(1, "b", (1, 2))]


def test_a_token_is_not_told_while_all_of_its_text_is_held_back() -> None:
    answer = with_stop("\nUser:")
    assert said(answer, "a\n", "User", " b") == [
        TextChunk(0, "a", (0,)),
        TextChunk(1, "\nUser b", (1, 2)),
    ]


def test_the_tokens_of_a_stop_string_are_not_told_however_much_goes_out_at_once() -> None:
    answer = with_stop("\nUser:")
    for number, piece in enumerate(("a", "b\n", "User", ":", " me")):
        answer.push(SampledToken(number), piece.encode(), is_end=False)
        if answer.finish_reason:
            break
    assert answer.finish_reason == "stop" and answer.tokens == [0, 1, 2, 3]
    assert answer.take_chunk() == TextChunk(0, "ab", (0, 1)) and answer.take_chunk() is None


def test_nor_are_those_that_max_tokens_left_half_of_one_of() -> None:
    answer = GeneratedText(Sampling(max_tokens=3, stop=("\nUser:",)))
    assert said(answer, "a", "\n", "User") == [TextChunk(0, "a", (0,))]
    assert answer.finish_reason == "length" and answer.take_chunk() is None


def test_what_went_out_elsewhere_is_not_said_twice_and_what_did_not_is() -> None:
    answer = with_stop("\nUser:")
    for number, piece in enumerate(("ab", "c\n")):
        answer.push(SampledToken(number), piece.encode(), is_end=False)
    answer.skip_sent(2)
    assert answer.take_chunk() == TextChunk(2, "c", ())
    assert said(answer, "d") == [TextChunk(3, "\nd", (2,))]


def test_what_went_out_elsewhere_though_it_is_held_back_here_is_not_said_twice() -> None:
    answer = with_stop("\nUser:")
    answer.push(SampledToken(0), b"ab\n", is_end=False)
    answer.skip_sent(3)
    assert answer.take_chunk() is None
    assert said(answer, "Us", "e") == []
    assert said(answer, "d") == [TextChunk(3, "Used", (1, 2, 3))]


def test_cut_answer_includes_the_sentence_held_back_for_a_label() -> None:
    for text, told in (("So.\n\nLet me", "So.\n\nLet me"), ("So.\n\nLet me\nUs", "So.\n\nLet me")):
        answer = GeneratedText(
            Sampling(max_tokens=100), StopRules.from_setting(("Let me", "\nUser:"), "")
        )
        assert said(answer, text) == [TextChunk(0, "So.", (0,))]
        answer.interrupt("cancelled")
        assert answer.finish_reason == "cancelled" and answer.stop_string is None
        assert answer.take_chunk() == TextChunk(3, told[3:], ())


def test_stop_string_is_reported_as_in_the_setting() -> None:
    answer = GeneratedText(Sampling(max_tokens=100), StopRules.from_setting(("Example:",), ""))
    assert said(answer, "So.\n\nExample: x") == [TextChunk(0, "So.", (0,))]
    assert (answer.finish_reason, answer.stop_string) == ("stop", "Example:")


def test_an_answer_by_a_grammar_is_never_taken_for_a_loop() -> None:
    """A schema may allow nothing but a hundred zeros."""
    for is_constrained, reason in ((False, "loop"), (True, None)):
        answer = GeneratedText(Sampling(max_tokens=1_000))
        for _ in range(200):
            answer.push(SampledToken(7, is_constrained=is_constrained), b"0,", is_end=False)
        assert answer.finish_reason == reason


def test_an_answer_by_a_grammar_is_ended_by_max_tokens() -> None:
    answer = GeneratedText(Sampling(max_tokens=200))
    for _ in range(200):
        answer.push(SampledToken(7, is_constrained=True), b"0,", is_end=False)
    assert answer.finish_reason == "length"


def test_character_of_several_tokens_is_sent_whole() -> None:
    data = "é🙂中".encode()
    chunks = said(with_stop(), *(data[i : i + 1] for i in range(len(data))))
    assert [chunk.text for chunk in chunks] == ["é", "🙂", "中"]


def test_invalid_bytes_become_a_replacement_character() -> None:
    chunks = said(with_stop(), b"\xff", b"ok")
    assert "".join(chunk.text for chunk in chunks) == "\ufffdok"


def test_half_a_character_at_the_end_is_not_sent() -> None:
    answer = with_stop()
    assert said(answer, "🙂".encode()[:2]) == []
    answer.interrupt("length")
    assert answer.take_chunk() is None


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

from services.contract.messages import Sampling
from services.inference.engine.backend import SampledToken
from services.inference.engine.output.answer import GeneratedText, TextChunk
from services.inference.engine.output.stops import of_setting


def said(answer: GeneratedText, *pieces: str | bytes) -> list[TextChunk]:
    """What goes out where all is sent at once; the tokens are numbered from 0."""
    sent = []
    for piece in pieces:
        data = piece.encode() if isinstance(piece, str) else piece
        answer.push(SampledToken(len(answer.tokens)), data, is_end=False)
        if (out := answer.take()) is not None:
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
        if answer.reason:
            break
    assert answer.reason == "stop" and answer.tokens == [0, 1, 2, 3]
    assert answer.take() == TextChunk(0, "ab", (0, 1)) and answer.take() is None


def test_nor_are_those_that_max_tokens_left_half_of_one_of() -> None:
    answer = GeneratedText(Sampling(max_tokens=3, stop=("\nUser:",)))
    assert said(answer, "a", "\n", "User") == [TextChunk(0, "a", (0,))]
    assert answer.reason == "length" and answer.take() is None


def test_what_went_out_elsewhere_is_not_said_twice_and_what_did_not_is() -> None:
    answer = with_stop("\nUser:")
    for number, piece in enumerate(("ab", "c\n")):
        answer.push(SampledToken(number), piece.encode(), is_end=False)
    answer.was_sent(2)
    assert answer.take() == TextChunk(2, "c", ())
    assert said(answer, "d") == [TextChunk(3, "\nd", (2,))]


def test_what_went_out_elsewhere_though_it_is_held_back_here_is_not_said_twice() -> None:
    answer = with_stop("\nUser:")
    answer.push(SampledToken(0), b"ab\n", is_end=False)
    answer.was_sent(3)
    assert answer.take() is None
    assert said(answer, "Us", "e") == []
    assert said(answer, "d") == [TextChunk(3, "Used", (1, 2, 3))]


def test_cut_answer_includes_the_sentence_held_back_for_a_label() -> None:
    for text, told in (("So.\n\nLet me", "So.\n\nLet me"), ("So.\n\nLet me\nUs", "So.\n\nLet me")):
        answer = GeneratedText(Sampling(max_tokens=100), of_setting(("Let me", "\nUser:"), ""))
        assert said(answer, text) == [TextChunk(0, "So.", (0,))]
        answer.cut("cancelled")
        assert answer.reason == "cancelled" and answer.stop_string is None
        assert answer.take() == TextChunk(3, told[3:], ())


def test_stop_string_is_reported_as_in_the_setting() -> None:
    answer = GeneratedText(Sampling(max_tokens=100), of_setting(("Example:",), ""))
    assert said(answer, "So.\n\nExample: x") == [TextChunk(0, "So.", (0,))]
    assert (answer.reason, answer.stop_string) == ("stop", "Example:")


def test_an_answer_by_a_grammar_is_never_taken_for_a_loop() -> None:
    """A schema may allow nothing but a hundred zeros."""
    for is_constrained, reason in ((False, "loop"), (True, None)):
        answer = GeneratedText(Sampling(max_tokens=1_000))
        for _ in range(200):
            answer.push(SampledToken(7, is_constrained=is_constrained), b"0,", is_end=False)
        assert answer.reason == reason


def test_an_answer_by_a_grammar_is_ended_by_max_tokens() -> None:
    answer = GeneratedText(Sampling(max_tokens=200))
    for _ in range(200):
        answer.push(SampledToken(7, is_constrained=True), b"0,", is_end=False)
    assert answer.reason == "length"

from services.inference.engine.backend import SampledToken
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
    LoopGuard,
)
from services.inference.engine.output.parts import ContentDelta, text_of
from services.inference.engine.output.stops import StopRules


def send(answer: GeneratedAnswer, *pieces: str | bytes) -> list[AnswerChunk]:
    """Push tokens with the ids 0, 1, … and take the text after each of them."""
    chunks = []
    for piece in pieces:
        data = piece.encode() if isinstance(piece, str) else piece
        answer.push(SampledToken(len(answer.tokens)), data, is_end=False)
        chunks += answer.take_chunks()
    return chunks


def content(offset: int, text: str, token_ids: tuple[int, ...]) -> AnswerChunk:
    return AnswerChunk(offset, ContentDelta(text), token_ids)


def with_stop(*stops: str) -> GeneratedAnswer:
    return GeneratedAnswer(AnswerLimits(100), StopRules.literal(stops))


def test_token_is_sent_with_its_text() -> None:
    assert send(with_stop(), "a", "b") == [
        content(0, "a", (0,)),
        content(1, "b", (1,)),
    ]


def test_tokens_of_one_character_are_sent_together() -> None:
    smile = "🙂".encode()
    assert send(with_stop(), "a", smile[:1], smile[1:3], smile[3:] + b"!") == [
        content(0, "a", (0,)),
        content(1, "🙂!", (1, 2, 3)),
    ]


def test_token_without_text_is_sent_with_the_next_text() -> None:
    assert send(with_stop(), "a", "", "b") == [
        content(0, "a", (0,)),
        content(1, "b", (1, 2)),
    ]


def test_token_is_held_back_with_all_of_its_text() -> None:
    answer = with_stop("\nUser:")
    assert send(answer, "a\n", "User", " b") == [
        content(0, "a", (0,)),
        content(1, "\nUser b", (1, 2)),
    ]


def test_tokens_of_a_stop_string_are_never_sent() -> None:
    answer = with_stop("\nUser:")
    for number, piece in enumerate(("a", "b\n", "User", ":", " me")):
        answer.push(SampledToken(number), piece.encode(), is_end=False)
        if answer.finish_reason:
            break
    assert answer.finish_reason == "stop" and answer.tokens == [0, 1, 2, 3]
    assert answer.take_chunks() == [content(0, "ab", (0, 1))]


def test_half_a_stop_string_at_max_tokens_is_not_sent() -> None:
    answer = GeneratedAnswer(AnswerLimits(3), StopRules.literal(("\nUser:",)))
    assert send(answer, "a", "\n", "User") == [content(0, "a", (0,))]
    assert answer.finish_reason == "length" and answer.take_chunks() == []


def test_resumed_text_is_sent_from_where_it_was_cut() -> None:
    answer = with_stop("\nUser:")
    for number, piece in enumerate(("ab", "c\n")):
        answer.push(SampledToken(number), piece.encode(), is_end=False)
    assert answer.skip_sent([ContentDelta("ab")])
    assert answer.take_chunks() == [content(2, "c", ())]
    assert send(answer, "d") == [content(3, "\nd", (2,))]


def test_held_back_text_that_was_sent_before_is_skipped() -> None:
    answer = with_stop("\nUser:")
    answer.push(SampledToken(0), b"ab\n", is_end=False)
    assert answer.skip_sent([ContentDelta("ab\n")])
    assert answer.take_chunks() == []
    assert send(answer, "Us", "e") == []
    assert send(answer, "d") == [content(3, "Used", (1, 2, 3))]


def test_interrupted_answer_includes_the_line_before_a_label() -> None:
    stops = StopRules.from_setting(("Let me", "\nUser:"), "")
    for text, sent in (("So.\n\nLet me", "So.\n\nLet me"), ("So.\n\nLet me\nUs", "So.\n\nLet me")):
        answer = GeneratedAnswer(AnswerLimits(100), stops)
        assert send(answer, text) == [content(0, "So.", (0,))]
        answer.interrupt("cancelled")
        assert answer.finish_reason == "cancelled" and answer.stop_string is None
        assert answer.take_chunks() == [content(3, sent[3:], ())]


def test_stop_string_is_reported_as_in_the_setting() -> None:
    stops = StopRules.from_setting(("Example:",), "")
    answer = GeneratedAnswer(AnswerLimits(100), stops)
    assert send(answer, "So.\n\nExample: x") == [content(0, "So.", (0,))]
    assert (answer.finish_reason, answer.stop_string) == ("stop", "Example:")


def test_answer_with_a_grammar_is_never_a_loop() -> None:
    """A schema may allow nothing but a hundred zeros."""
    for is_constrained, reason in ((False, "loop"), (True, None)):
        answer = GeneratedAnswer(AnswerLimits(1_000), StopRules())
        for _ in range(200):
            answer.push(SampledToken(7, is_constrained=is_constrained), b"0,", is_end=False)
        assert answer.finish_reason == reason


def test_answer_with_a_grammar_ends_at_max_tokens() -> None:
    answer = GeneratedAnswer(AnswerLimits(200), StopRules())
    for _ in range(200):
        answer.push(SampledToken(7, is_constrained=True), b"0,", is_end=False)
    assert answer.finish_reason == "length"


def test_character_of_several_tokens_is_sent_whole() -> None:
    data = "é🙂中".encode()
    chunks = send(with_stop(), *(data[i : i + 1] for i in range(len(data))))
    assert [text_of(chunk.part) for chunk in chunks] == ["é", "🙂", "中"]


def test_invalid_bytes_become_a_replacement_character() -> None:
    chunks = send(with_stop(), b"\xff", b"ok")
    assert "".join(text_of(chunk.part) for chunk in chunks) == "\ufffdok"


def test_half_a_character_at_the_end_is_not_sent() -> None:
    answer = with_stop()
    assert send(answer, "🙂".encode()[:2]) == []
    answer.interrupt("length")
    assert answer.take_chunks() == []


def length_at_loop(tokens: list[int]) -> int | None:
    """Return the number of tokens after which the guard finds a loop, or None."""
    guard = LoopGuard()
    return next((i for i, token in enumerate(tokens, 1) if guard.push(token)), None)


def test_repeated_token_is_a_loop_after_128() -> None:
    assert length_at_loop([7] * 127) is None
    assert length_at_loop([7] * 200) == 128


def test_repeated_sentence_is_a_loop_after_eight() -> None:
    sentence = list(range(20))
    assert length_at_loop(sentence * 7) is None
    assert length_at_loop(sentence * 10) == 20 * 8


def test_text_before_a_loop_does_not_matter() -> None:
    assert length_at_loop([*range(1000, 1500), *[1, 2] * 100]) == 500 + 128


def test_period_over_32_tokens_is_no_loop() -> None:
    assert length_at_loop(list(range(33)) * 20) is None


def test_difference_resets_the_loop_guard() -> None:
    assert length_at_loop([7] * 100 + [8] + [7] * 100) is None


def test_numbered_lists_and_tables_are_no_loops() -> None:
    numbered = [token for number in range(400) for token in (1, 1000 + number, 2, 3)]
    table = [token for row in range(100) for token in (1, 2, 3, 500 + row % 9, 2, 600 + row % 7, 4)]
    assert length_at_loop(numbered) is None
    assert length_at_loop(table) is None

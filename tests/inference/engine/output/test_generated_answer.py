import time
from typing import Any

import pytest

from services.contract.messages import TokenLogprob
from services.inference.engine.backend import SampledToken
from services.inference.engine.output.answer_format import AnswerFormat, ReasoningFormat
from services.inference.engine.output.answer_parser import FormatParser
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
    LoopGuard,
)
from services.inference.engine.output.parts import (
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    ReasoningDelta,
    text_of,
)
from services.inference.engine.output.stops import StopRules
from tests.inference.tag_parser import TagParser


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


def test_stop_string_within_min_tokens_is_text() -> None:
    """As in vLLM: https://github.com/vllm-project/vllm/pull/22014."""
    for pieces, sent in (
        (["a", "e", "b", "c", "e", "d"], "aebc"),
        (["a", "b", "x", "ye", "b", "e"], "abxyeb"),  # the fourth token is still within
        (["a", "b", "c", "d", "e", "f"], "abcd"),
    ):
        answer = GeneratedAnswer(AnswerLimits(100, minimum=4), StopRules.literal(["e"]))
        assert "".join(text_of(chunk.part) for chunk in send(answer, *pieces[:5])) == sent
        if sent == "abxyeb":
            assert answer.finish_reason is None
            send(answer, pieces[5])
        assert (answer.finish_reason, answer.stop_string) == ("stop", "e")


def test_stop_string_that_ends_after_min_tokens_is_removed() -> None:
    answer = GeneratedAnswer(AnswerLimits(100, minimum=2), StopRules.literal(["abc", "b"]))
    assert [text_of(chunk.part) for chunk in send(answer, "xa", "b", "c")] == ["x"]
    assert (answer.finish_reason, answer.stop_string) == ("stop", "abc")


@pytest.mark.parametrize(
    ("limits", "reason", "length"),
    [
        (AnswerLimits(200), "loop", 128),
        (AnswerLimits(200, minimum=150), "loop", 151),
        (AnswerLimits(200, may_loop=True), "length", 200),
    ],
    ids=str,
)
def test_loop_ends_after_min_tokens_unless_it_may_loop(
    limits: AnswerLimits, reason: str, length: int
) -> None:
    answer = GeneratedAnswer(limits, StopRules())
    while answer.finish_reason is None:
        answer.push(SampledToken(7), b"0,", is_end=False)
    assert (answer.finish_reason, len(answer.tokens)) == (reason, length)


def test_chunk_has_the_state_of_mirostat_after_its_tokens() -> None:
    answer = with_stop("ef")
    for mu, piece in enumerate((b"a", b"b", b"e", b"g")):
        answer.push(SampledToken(mu, mirostat_mu=float(mu)), piece, is_end=False)
    (chunk,) = answer.take_chunks()
    assert (chunk.token_ids, chunk.mirostat_mu) == ((0, 1, 2, 3), 3.0)
    answer.push(SampledToken(4, mirostat_mu=4.0), b"he", is_end=False)
    (chunk,) = answer.take_chunks()
    assert (chunk.part, chunk.token_ids, chunk.mirostat_mu) == (ContentDelta("h"), (4,), 4.0)


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, "", (), -1.0, ())


def test_log_probabilities_belong_to_the_text_of_their_tokens() -> None:
    """Also if one token makes the text of several channels certain."""
    answer = GeneratedAnswer(AnswerLimits(100), StopRules.literal(("STOP",)), TagParser())
    pieces = ["S", "T", "<think>", "a", " </", "think>b", "<call>go ", "{}</call>c ST", "OP"]
    for token, piece in enumerate(pieces):
        answer.push(SampledToken(token, logprob(token)), piece.encode(), is_end=False)
    chunks = answer.take_chunks()
    found = [(text_of(chunk.part), [each.id for each in chunk.logprobs or ()]) for chunk in chunks]
    assert found == [
        ("ST", [0, 1]),
        ("a ", [2, 3, 4]),
        ("b", [5]),
        ("go", [6]),
        ("{}", [7]),
        ("c ", []),
    ]


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


UNLIMITED = AnswerLimits(1000)
CHANNELS = "<think>Let me see\n\n\n</think>So.<call>go {}</call>"


def with_channels(limits: AnswerLimits = UNLIMITED, **more: Any) -> GeneratedAnswer:
    stops = StopRules.literal(("\n\n\n", "Let me", "STOP"))
    return GeneratedAnswer(limits, stops, TagParser(), reasoning_end=(7, 8), **more)


def push_text(answer: GeneratedAnswer, text: str) -> list[AnswerChunk]:
    """Push a token per character until the answer ends, and take all chunks."""
    for character in text:
        if answer.finish_reason is None:
            answer.push(SampledToken(ord(character)), character.encode(), is_end=False)
    return answer.take_chunks()


def parts_of(chunks: list[AnswerChunk]) -> list[AnswerPart]:
    return [chunk.part for chunk in chunks]


def test_parts_have_offsets_and_all_tokens() -> None:
    answer = with_channels()
    chunks = push_text(answer, CHANNELS)
    assert parts_of(chunks) == [
        ReasoningDelta("Let me see\n\n\n"),
        ContentDelta("So."),
        CallStart("go"),
        ArgumentsDelta("{}"),
    ]
    assert [chunk.offset for chunk in chunks] == [0, 13, 16, 18]
    sent = "".join(chr(token) for chunk in chunks for token in chunk.token_ids)
    assert sent == CHANNELS.removesuffix("</call>")
    answer.push(SampledToken(0), b"", is_end=True)
    assert answer.finish_reason == "tool_calls" and answer.take_chunks() == []


def test_stop_strings_match_in_content_only() -> None:
    answer = with_channels()
    chunks = push_text(answer, "<think>STOP</think>a STOP b")
    assert parts_of(chunks) == [ReasoningDelta("STOP"), ContentDelta("a ")]
    assert (answer.finish_reason, answer.stop_string) == ("stop", "STOP")


def test_stop_string_in_an_unfinished_tag_ends_the_answer() -> None:
    answer = GeneratedAnswer(AnswerLimits(2), StopRules.literal(("</",)), TagParser())
    assert parts_of(send(answer, "a", "</th")) == [ContentDelta("a")]
    assert (answer.finish_reason, answer.stop_string) == ("stop", "</")


def test_stop_string_does_not_span_channels() -> None:
    chunks = push_text(with_channels(), "ST<think>OP</think>OP")
    assert parts_of(chunks) == [ContentDelta("ST"), ReasoningDelta("OP"), ContentDelta("OP")]


def test_answer_ends_after_its_last_allowed_call() -> None:
    for more in ("</call><call>f {}</call>", "</call>and so on"):
        answer = with_channels(max_calls=1)
        answer.push(SampledToken(1), f"<call>go {{}}{more}".encode(), is_end=False)
        assert parts_of(answer.take_chunks()) == [CallStart("go"), ArgumentsDelta("{}")]
        assert answer.finish_reason == "tool_calls"


def test_incomplete_call_is_no_reason_to_finish() -> None:
    answer = with_channels(AnswerLimits(12))
    assert parts_of(push_text(answer, CHANNELS[-21:])) == [
        ContentDelta("So."),
        CallStart("go"),
    ]
    assert answer.finish_reason == "length"


def test_max_tokens_of_content_do_not_count_reasoning() -> None:
    answer = with_channels(AnswerLimits(None, content=2))
    assert parts_of(push_text(answer, CHANNELS)) == [
        ReasoningDelta("Let me see\n\n\n"),
        ContentDelta("So"),
    ]
    assert answer.finish_reason == "length"
    assert answer.reasoning_tokens == len("<think>Let me see\n\n\n</think>")


def test_token_in_two_thoughts_counts_once() -> None:
    answer = with_channels()
    send(answer, "<think>a</", "think><", "think>b", "</think>", "c")
    assert (answer.reasoning_tokens, len(answer.tokens)) == (4, 5)


def test_unfinished_end_of_reasoning_is_no_content() -> None:
    answer = with_channels(AnswerLimits(100, content=1, reasoning=0))
    assert answer.remaining_tokens == 1
    send(answer, "<think>", "</", "think")
    assert answer.remaining_tokens == 1


def test_thought_without_budget_may_take_all_tokens() -> None:
    answer = with_channels(AnswerLimits(100, content=1))
    send(answer, "<think>", "a")
    assert answer.remaining_tokens == 98


def test_total_limit_counts_reasoning() -> None:
    answer = with_channels(AnswerLimits(10))
    assert parts_of(push_text(answer, CHANNELS)) == [ReasoningDelta("Let")]
    assert answer.finish_reason == "length" and len(answer.tokens) == 10


def test_end_of_reasoning_is_forced_once_at_its_limit() -> None:
    answer = with_channels(AnswerLimits(None, reasoning=2))
    push_text(answer, "<think>a")
    assert answer.take_forced() == ()
    push_text(answer, "b")
    assert answer.take_forced() == (7, 8)
    assert answer.take_forced() == ()
    push_text(answer, "</think>c<think>")
    assert answer.take_forced() == (7, 8), "reasoning that begins again is closed again"


def test_thought_is_not_opened_again_after_its_end_was_forced() -> None:
    answer = with_channels(AnswerLimits(100, reasoning=2), thought_opening=(60, 116))
    push_text(answer, "<think>a</think>")
    assert answer.forbidden is None, "the budget is not spent"
    push_text(answer, "<think>bc")
    assert answer.take_forced() and answer.forbidden is None
    push_text(answer, "</think>")
    assert answer.forbidden is None
    push_text(answer, "<")
    assert answer.forbidden == 116
    push_text(answer, "b")
    assert answer.forbidden is None


def test_model_that_thinks_forever_writes_content_after_its_budget() -> None:
    """It opens a thought wherever it can."""
    pieces = {1: b"<think>", 2: b"</think>", 3: b"x "}
    parser = FormatParser(AnswerFormat(ReasoningFormat("<think>", "</think>")), {})
    limits = AnswerLimits(30, reasoning=3)
    answer = GeneratedAnswer(limits, StopRules(), parser, reasoning_end=[2], thought_opening=[1])
    forced: list[int] = []
    while answer.finish_reason is None:
        forced += answer.take_forced()
        likely = 1 if answer.forbidden != 1 and parser.channel == "content" else 3
        token = forced.pop(0) if forced else likely
        answer.push(SampledToken(token), pieces[token], is_end=False)
    thought, content = parts_of(answer.take_chunks())
    assert thought == ReasoningDelta("x x x")
    assert isinstance(content, ContentDelta) and content.text.startswith("x <think>")


def test_end_of_reasoning_waits_for_a_whole_character() -> None:
    answer = with_channels(AnswerLimits(None, reasoning=1))
    smile = "🙂".encode()
    answer.push(SampledToken(1), b"<think>" + smile[:2], is_end=False)
    assert answer.take_forced() == ()
    answer.push(SampledToken(2), smile[2:], is_end=False)
    assert answer.take_forced() == (7, 8)


def test_reasoning_opened_by_the_prompt_counts() -> None:
    parser = TagParser("reasoning")
    limits = AnswerLimits(None, reasoning=0)
    answer = GeneratedAnswer(limits, StopRules(), parser, reasoning_end=(7,))
    assert answer.take_forced() == (7,)


def test_repeated_reasoning_is_no_loop() -> None:
    answer = with_channels()
    push_text(answer, "<think>" + "0" * 200)
    assert answer.finish_reason is None
    push_text(answer, "</think>" + "0" * 200)
    assert answer.finish_reason == "loop"


def test_tokens_from_the_first_content() -> None:
    answer = with_channels()
    push_text(answer, CHANNELS)
    assert bytes(answer.tokens_from(ContentDelta)).decode() == "So.<call>go {}</call>"
    assert bytes(answer.tokens_from(ReasoningDelta)).decode() == CHANNELS.removeprefix("<think>")


def test_control_tokens_of_the_format_reach_the_parser() -> None:
    markers = {1: b"<think>", 2: b"</think>"}
    answer = with_channels(markers=markers)
    for token, piece in ((1, b""), (65, b"A"), (2, b""), (66, b"B")):
        answer.push(SampledToken(token), piece, is_end=False)
    assert answer.take_chunks() == [
        AnswerChunk(0, ReasoningDelta("A"), (1, 65)),
        AnswerChunk(1, ContentDelta("B"), (2, 66)),
    ]


def test_answer_is_skipped_up_to_any_character() -> None:
    """Another worker sent some characters, with all tokens that they need."""
    whole = push_text(with_channels(), CHANNELS)
    for count in range(1, len(whole) + 1):
        chunk = whole[count - 1]
        tokens = [token for each in whole[:count] for token in each.token_ids]
        for length in range(1, len(text_of(chunk.part)) + 1):
            if isinstance(chunk.part, CallStart) and length < len(chunk.part.name):
                continue
            cut = (
                chunk.part
                if isinstance(chunk.part, CallStart)
                else type(chunk.part)(chunk.part.text[:length])
            )
            answer = with_channels()
            for token in tokens:
                answer.push(SampledToken(token), chr(token).encode(), is_end=False)
            assert answer.skip_sent([*parts_of(whole[: count - 1]), cut])
            rest = answer.take_chunks() + push_text(answer, CHANNELS[len(tokens) :])
            offset = chunk.offset + length
            assert not rest or rest[0].offset == offset
            all_text = "".join(text_of(part) for part in parts_of(whole))
            assert "".join(text_of(part) for part in parts_of(rest)) == all_text[offset:]


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("<think>a</th", [ReasoningDelta("a</th")]),
        ("<think></th", [ReasoningDelta("</")]),
        ("<call>go {</ca", [CallStart("go"), ArgumentsDelta("{</ca")]),
        ("a ST</call>", [ContentDelta("a ST")]),
        ("ST</call></ca", [ContentDelta("ST</")]),
    ],
)
def test_held_text_of_any_channel_is_skipped(text: str, sent: list[AnswerPart]) -> None:
    answer = with_channels()
    answer.push(SampledToken(0), text.encode(), is_end=False)
    assert answer.skip_sent(sent)
    length = sum(len(text_of(part)) for part in sent)
    assert all(chunk.offset == length for chunk in push_text(answer, "x"))


@pytest.mark.parametrize(
    "sent",
    [
        [ContentDelta("Let")],
        [ReasoningDelta("Les")],
        [ReasoningDelta("Let me"), ContentDelta("So")],
        [ReasoningDelta("Let me see\n\n\n"), ContentDelta("So."), CallStart("no")],
        [
            ReasoningDelta("Let me see\n\n\n"),
            ContentDelta("So."),
            CallStart("go"),
            ContentDelta("x"),
        ],
    ],
)
def test_other_parts_than_generated_are_not_skipped(sent: list[AnswerPart]) -> None:
    answer = with_channels()
    for token in CHANNELS.encode():
        answer.push(SampledToken(token), bytes([token]), is_end=False)
    assert not answer.skip_sent(sent)


@pytest.mark.parametrize("is_taken", [True, False])
def test_long_line_takes_linear_time(is_taken: bool) -> None:
    stops = StopRules.from_setting(("\nUser:", "Let me"), "")
    answer = GeneratedAnswer(AnswerLimits(None), stops)
    began = time.process_time()
    for token in range(60_000):
        answer.push(SampledToken(token), b"abc ", is_end=False)
        if is_taken:
            answer.take_chunks()
    assert answer.skip_sent([]) and answer.remaining_tokens < 0
    assert time.process_time() - began < 4


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

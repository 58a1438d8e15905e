from datetime import UTC, datetime

import pytest

from services.client.transcript import Gap, Mismatch, NotResumable, Transcript
from services.contract.messages import (
    Accepted,
    Done,
    Progress,
    Resume,
    ResumeState,
    Started,
    StreamEvent,
    Timings,
    Token,
    Usage,
)

ORIGIN = ResumeState("digest", b"", 0, 0, 1, datetime.now(UTC), 0, 0)
STARTED = Started(5, 0, 0, 0, ORIGIN)


def read(*events: StreamEvent) -> Transcript:
    transcript = Transcript()
    for event in events:
        transcript.add(event)
    return transcript


def done(length: int | None) -> Done:
    return Done("stop", Usage(5, 2, 0), Timings(0, 0, 0), 0, "log", length)


def test_text_that_follows_on_is_new() -> None:
    transcript = read(Token(0, "Grüß ", (1,)))
    assert transcript.add(Token(5, "dich", (2, 3))) == Token(5, "dich", (2, 3))
    assert transcript.text == "Grüß dich"


def test_what_was_read_already_is_not_new() -> None:
    transcript = read(Accepted("r", "w"), STARTED, Token(0, "on", (1,)), Token(2, "ce", (2,)))
    for event in (Accepted("r", "w"), STARTED, Token(0, "on", (1,)), Token(2, "ce", (2,))):
        assert transcript.add(event) is None
    assert transcript.text == "once"


def test_a_hole_before_the_event_is_a_gap_also_before_the_end() -> None:
    transcript = read(Token(0, "on", (1,)))
    with pytest.raises(Gap):
        transcript.add(Token(3, "e", (3,)))
    with pytest.raises(Gap):
        transcript.add(done(4))
    assert transcript.add(done(2)) and transcript.add(done(None))


def test_only_the_end_of_a_longer_piece_is_new() -> None:
    transcript = read(STARTED, Token(0, "on", (1,)), Token(2, "ce", (2,)))
    assert transcript.add(Token(0, "once more", (1, 2, 3))) == Token(4, " more", (1, 2, 3))
    assert transcript.resume() == Resume(ORIGIN, (1, 2, 3), "once more")


def test_another_answer_is_not_taken_for_this_one() -> None:
    transcript = read(Token(0, "on", (1,)))
    for text in ("off", "o!"):
        with pytest.raises(Mismatch):
            transcript.add(Token(0, text, (9,)))


def test_it_goes_on_from_all_ids_and_all_text() -> None:
    transcript = read(Accepted("r", "w1"), STARTED, Token(0, "on", (1, 2)), Progress(0, 5, 5))
    assert transcript.add(Accepted("r", "w2")) is None
    transcript.add(Token(2, "ce", (3,)))
    assert transcript.resume() == Resume(ORIGIN, (1, 2, 3), "once")


def test_before_the_first_text_there_is_nothing_to_go_on_from() -> None:
    assert read(Accepted("r", "w"), STARTED).resume() is None


def test_an_answer_whose_origin_was_not_told_can_not_go_on() -> None:
    with pytest.raises(NotResumable):
        read(Started(5, 0, 0, 0), Token(0, "on", (1,))).resume()

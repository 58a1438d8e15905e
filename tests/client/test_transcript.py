from datetime import UTC, datetime

import pytest

from services.client.transcript import Gap, Mismatch, NotResumable, Transcript
from services.contract.messages import (
    Accepted,
    Done,
    Progress,
    ResumeState,
    Started,
    StreamEvent,
    Timings,
    Token,
    ToolCallDelta,
    Usage,
)
from tests.fakes import text_resume

RESUME_STATE = ResumeState("digest", b"", 0, 0, 1, datetime.now(UTC), 0, 0)
STARTED = Started(5, 0, 0, 0, RESUME_STATE)


def transcript_of(*events: StreamEvent) -> Transcript:
    transcript = Transcript()
    for event in events:
        transcript.add(event)
    return transcript


def done(length: int | None) -> Done:
    return Done("stop", Usage(5, 2, 0), Timings(0, 0, 0), 0, "log", length)


def test_text_that_continues_is_new() -> None:
    transcript = transcript_of(Token(0, "Grüß ", (1,)))
    assert transcript.add(Token(5, "dich", (2, 3))) == Token(5, "dich", (2, 3))
    assert transcript.length == 9


@pytest.mark.parametrize(
    "event, continues",
    [
        (Token(4, "more", (2,)), True),
        (ToolCallDelta(4, 0, (2,), "id", "go"), False),
        (Token(3, "e more", (2,)), False),
        (Token(5, "more", (2,)), False),
        (Token(4, "", (2,)), False),
        (Token(4, "more", ()), False),
        (Progress(0, 5, 5), False),
    ],
)
def test_only_new_text_at_the_end_continues(event: StreamEvent, continues: bool) -> None:
    assert transcript_of(STARTED, Token(0, "once", (1,))).is_continued_by(event) == continues
    assert not Transcript().is_continued_by(event)


def test_repeated_events_are_not_new() -> None:
    transcript = transcript_of(
        Accepted("r", "w"), STARTED, Token(0, "on", (1,)), Token(2, "ce", (2,))
    )
    for event in (Accepted("r", "w"), STARTED, Token(0, "on", (1,)), Token(2, "ce", (2,))):
        assert transcript.add(event) is None
    assert transcript.length == 4


def test_missing_text_before_an_event_is_a_gap() -> None:
    transcript = transcript_of(Token(0, "on", (1,)))
    with pytest.raises(Gap):
        transcript.add(Token(3, "e", (3,)))
    with pytest.raises(Gap):
        transcript.add(done(4))
    assert transcript.add(done(2)) and transcript.add(done(None))


def test_first_text_without_started_lacks_it() -> None:
    token = Token(0, "on", (1,))
    assert Transcript().lacks_started(token)
    assert not Transcript().lacks_started(Accepted("r", "w"))
    assert not transcript_of(STARTED).lacks_started(token)
    assert not transcript_of(token).lacks_started(Token(2, "ce", (2,)))


def test_only_the_end_of_an_overlapping_token_is_new() -> None:
    transcript = transcript_of(STARTED, Token(0, "on", (1,)), Token(2, "ce", (2,)))
    assert transcript.add(Token(0, "once more", (1, 2, 3))) == Token(4, " more", (1, 2, 3))
    assert transcript.resume() == text_resume(RESUME_STATE, (1, 2, 3), "once more")


def test_contradicting_text_is_a_mismatch() -> None:
    transcript = transcript_of(Token(0, "on", (1,)))
    for text in ("off", "o!"):
        with pytest.raises(Mismatch):
            transcript.add(Token(0, text, (9,)))


def test_resume_has_all_text_and_token_ids() -> None:
    transcript = transcript_of(
        Accepted("r", "w1"), STARTED, Token(0, "on", (1, 2)), Progress(0, 5, 5)
    )
    assert transcript.add(Accepted("r", "w2")) is None
    transcript.add(Token(2, "ce", (3,)))
    assert transcript.resume() == text_resume(RESUME_STATE, (1, 2, 3), "once")


def test_resume_before_the_first_text_is_none() -> None:
    assert transcript_of(Accepted("r", "w"), STARTED).resume() is None


def test_answer_without_resume_state_is_not_resumable() -> None:
    with pytest.raises(NotResumable):
        transcript_of(Started(5, 0, 0, 0), Token(0, "on", (1,))).resume()


def test_channels_are_resumed_as_one_event_each() -> None:
    transcript = transcript_of(
        STARTED,
        Token(0, "h", (1,), channel="reasoning"),
        Token(1, "m", (2,), channel="reasoning"),
        Token(2, "So", (3, 4)),
        ToolCallDelta(4, 0, (5,), "id", "go"),
        ToolCallDelta(6, 0, (6,), arguments="{"),
    )
    assert transcript.length == 7
    resume = transcript.resume()
    assert resume and resume.events == (
        Token(0, "hm", (1, 2), channel="reasoning"),
        Token(2, "So", (3, 4)),
        ToolCallDelta(4, 0, (5, 6), "id", "go", "{"),
    )


def test_repeated_call_is_not_new() -> None:
    call = ToolCallDelta(0, 0, (5,), "id", "go", "{")
    transcript = transcript_of(STARTED, call)
    assert transcript.add(call) is None
    more = ToolCallDelta(0, 0, (5, 6), "id", "go", "{}")
    assert transcript.add(more) == ToolCallDelta(3, 0, (5, 6), arguments="}")
    resume = transcript.resume()
    assert resume and resume.events == (more,)


def test_missing_arguments_are_a_gap() -> None:
    transcript = transcript_of(STARTED, ToolCallDelta(0, 0, (5,), "id", "go"))
    with pytest.raises(Gap):
        transcript.add(ToolCallDelta(3, 0, (7,), arguments="}"))


def test_replay_of_a_finished_answer_may_begin_anywhere() -> None:
    transcript = transcript_of(STARTED, Token(0, "once ", (1, 2)))
    assert transcript.add(Token(3, "e more", ())) == Token(5, "more", ())
    assert transcript.length == 9

"""Recordings of answers, their replay to readers, and the detection of missing listeners."""

import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from services.contract.codec import encode
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Progress,
    Replay,
    ResumeState,
    Started,
    StreamEvent,
    Timings,
    Token,
    ToolCallDelta,
    Usage,
)
from services.inference.limits import InferenceLimits
from services.inference.replay import Listeners, Recording, ReplayStore
from tests.fakes import text_resume

REQUEST = ChatRequest(prompt="hi", request_id="r")
ACCEPTED, STARTED = Accepted("r", "w"), Started(5, 0, 0, 0)
ON, CE = Token(0, "on", (1,)), Token(2, "ce", (2,))
DONE = Done("stop", Usage(5, 2, 0), Timings(0, 0, 0), 0, "log", 4)
REPLY = "chat.reply._.r.a"
NOW = datetime.now(UTC)
LIMITS = InferenceLimits()


def recording(
    *events: object, request: ChatRequest = REQUEST, clock: Callable[[], float] = lambda: 0.0
) -> Recording:
    made = Recording(request, "w", REPLY, LIMITS, clock)
    for event in events:
        made.add(event)  # type: ignore[arg-type]
    return made


def test_replay_from_zero_has_all_events_but_progress() -> None:
    made = recording(ACCEPTED, Progress(1, 0, 0), STARTED, ON, CE, DONE)
    assert made.replay(0) == Replay(REQUEST, "w", REPLY, (ACCEPTED, STARTED, ON, CE, DONE))


def test_replay_has_the_seconds_since_acceptance() -> None:
    now = 100.0
    made = recording(ACCEPTED, ON, clock=lambda: now)
    now += 7
    assert made.replay(0).age_seconds == 7


def test_replay_has_the_tokens_after_the_offset() -> None:
    made = recording(ACCEPTED, STARTED, ON, CE)
    assert made.replay(1).events == (ON, CE)
    assert made.replay(2).events == (CE,)
    assert made.replay(4).events == ()


THOUGHT = Token(0, "hm", (1,), channel="reasoning")
CALL, ARGUMENTS = ToolCallDelta(2, 0, (2,), "id", "go"), ToolCallDelta(4, 0, (3,), arguments="{}")


def test_replay_has_all_channels_after_the_offset() -> None:
    made = recording(ACCEPTED, STARTED, THOUGHT, CALL, ARGUMENTS)
    assert made.replay(1).events == (THOUGHT, CALL, ARGUMENTS)
    assert made.replay(2).events == (CALL, ARGUMENTS)
    assert made.replay(4).events == (ARGUMENTS,)


def test_packed_recording_has_one_event_per_run() -> None:
    done = replace(DONE, length=6)
    store = ReplayStore(LIMITS)
    store.begin("k", recording(ACCEPTED, STARTED, THOUGHT, CALL, ARGUMENTS, done))
    store.end("k")
    replay = store.get("k", 0)
    assert replay and replay.events == (
        ACCEPTED,
        STARTED,
        replace(THOUGHT, token_ids=()),
        ToolCallDelta(2, 0, (), "id", "go", "{}"),
        done,
    )


def test_replay_at_the_end_of_the_text_has_the_done() -> None:
    assert recording(ACCEPTED, ON, DONE).replay(2).events == (DONE,)


def test_replay_of_a_resumed_answer_has_the_first_part() -> None:
    state = ResumeState("digest", b"", 0, 0, 1, NOW, 0, 0)
    request = ChatRequest(prompt="hi", request_id="r", resume=text_resume(state, (1,), "on"))
    made = recording(ACCEPTED, CE, request=request)
    assert made.replay(0) == Replay(REQUEST, "w", REPLY, (ACCEPTED, Token(0, "on", (1,)), CE))


def test_first_part_of_a_long_resumed_answer_has_started() -> None:
    state = ResumeState("digest", b"", 0, 0, 1, NOW, 0, 0)
    long = "x" * LIMITS.max_replay_bytes
    request = ChatRequest(prompt="hi", request_id="r", resume=text_resume(state, (1,), long))
    first = recording(ACCEPTED, STARTED, request=request).replay(0)
    assert first.events == (ACCEPTED, STARTED, Token(0, long, (1,)))


def test_long_replay_comes_in_consecutive_parts() -> None:
    piece = "x" * (LIMITS.max_replay_bytes // 3)
    tokens = [Token(at * len(piece), piece, (at,)) for at in range(5)]
    made = recording(ACCEPTED, *tokens, DONE)
    got: list[object] = []
    offset, is_complete = 0, False
    while not is_complete:
        replay = made.replay(offset)
        got += replay.events
        offset = sum(len(e.text) for e in got if isinstance(e, Token))
        is_complete = replay.is_complete
    assert got == [ACCEPTED, *tokens, DONE]


def test_replay_fits_the_max_payload_of_the_server() -> None:
    limits = InferenceLimits(max_payload=2**16)
    made = Recording(REQUEST, "w", REPLY, limits)
    for offset in range(0, 2**17, 2**10):
        made.add(Token(offset, "é" * 2**10, (offset,)))
    part = made.replay(0)
    assert not part.is_complete
    assert limits.max_payload // 2 < len(encode(part)) < limits.max_payload


def parts_of(replay: Callable[[int], Replay | None], max_payload: int) -> list[StreamEvent]:
    """Return the events of a replay in parts, each of which fits into a message."""
    events: list[StreamEvent] = []
    offset, is_complete = 0, False
    while not is_complete:
        part = replay(offset)
        assert part and len(encode(part)) < max_payload
        assert part.is_complete or any(isinstance(event, Token) for event in part.events)
        events += part.events
        offset = sum(len(event.text) for event in events if isinstance(event, Token))
        is_complete = part.is_complete
    return events


def test_long_finished_answer_is_replayed_in_parts() -> None:
    limits = InferenceLimits(max_payload=2**16)
    text = "".join(chr(number % 2**10) for number in range(2**17))
    replays = ReplayStore(limits)
    made = Recording(REQUEST, "w", REPLY, limits)
    for event in (ACCEPTED, STARTED, Token(0, text, ()), DONE):
        made.add(event)
    replays.begin("a", made)
    replays.end("a")
    first, second, *tokens, last = parts_of(lambda at: replays.get("a", at), limits.max_payload)
    assert (first, second, last) == (ACCEPTED, STARTED, DONE)
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == text


def test_replay_lacks_a_resume_state_that_does_not_fit() -> None:
    limits = InferenceLimits(max_payload=2**16)
    state = ResumeState("digest", bytes(4 * limits.max_resume_tokens), 0, 0, 1, NOW, 0, 0)
    started = replace(STARTED, resume_state=state)
    for length, expected in ((2**14, started), (2**16 * 3 // 5, STARTED)):
        request = replace(REQUEST, prompt="", text="x" * length)
        made = Recording(request, "w", REPLY, limits)
        for event in (ACCEPTED, started, ON):
            made.add(event)
        assert parts_of(made.replay, limits.max_payload) == [ACCEPTED, expected, ON]


def test_finished_answer_is_kept_without_its_tokens() -> None:
    replays = ReplayStore()
    replays.begin("a", recording(ACCEPTED, STARTED, ON, CE, DONE))
    replays.end("a")
    replay = replays.get("a", 1)
    assert replay == Replay(REQUEST, "w", REPLY, (Token(0, "once", ()), DONE))
    assert replays.get("a", 4) == Replay(REQUEST, "w", REPLY, (DONE,))


def test_finished_answer_is_evicted_by_age() -> None:
    now = 0.0
    replays = ReplayStore(clock=lambda: now)
    replays.begin("a", recording(ON, CE, DONE))
    now += 10 * LIMITS.replay_kept_seconds
    replays.evict()
    assert replays.get("a", 0) and replays.get("b", 0) is None
    replays.end("a")
    now += LIMITS.replay_kept_seconds - 1
    replays.evict()
    assert replays.get("a", 0)
    now += 1
    replays.evict()
    assert replays.get("a", 0) is None


def test_oldest_finished_answers_are_evicted_by_size() -> None:
    replays = ReplayStore(InferenceLimits(max_replay_bytes_kept=4500))
    for key in "abc":
        replays.begin(key, recording(Token(0, "x" * 1000, (1,)), DONE))
        replays.end(key)
    assert replays.get("a", 0) is None
    assert replays.get("b", 0) and replays.get("c", 0)


def test_answers_of_one_tenant_evict_no_other_ones() -> None:
    replays = ReplayStore(InferenceLimits(max_replay_bytes_kept=9000))
    for key in ("bob.1", "bob.2", *(f"ann.{number}" for number in range(50))):
        replays.begin(key, recording(Token(0, "x" * 1000, (1,)), DONE))
        replays.end(key)
    assert replays.get("bob.1", 0) and replays.get("bob.2", 0)
    assert replays.get("ann.49", 0) and replays.get("ann.0", 0) is None


def test_memory_of_many_short_answers_is_bounded() -> None:
    tracemalloc.start()
    replays = ReplayStore(InferenceLimits(max_replay_bytes_kept=2**19))
    for number in range(2000):
        replays.begin(key := f"t.{number:036}", recording(Token(0, "x", (1,)), DONE))
        replays.end(key)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert replays.get("t." + "0" * 36, 0) is None
    assert used < 1.1 * 2**19


def test_answers_of_an_erased_session_are_forgotten() -> None:
    replays = ReplayStore()
    mine = replace(REQUEST, session_id="mine")
    stateless = replace(mine, prompt="", text="once")
    requests = {
        "t.ended": mine,
        "t.running": mine,
        "t.other": REQUEST,
        "u.ended": mine,
        "t.text": stateless,
    }
    for key, request in requests.items():
        replays.begin(key, recording(ON, DONE, request=request))
        if key != "t.running":
            replays.end(key)
    replays.forget_session("t", "mine")
    assert replays.get("t.running", 0), "its reader may still lack a part"
    replays.end("t.running")
    kept = {key for key in requests if replays.get(key, 0)}
    assert kept == {"t.other", "u.ended", "t.text"}


def test_later_attempt_replaces_an_earlier_one() -> None:
    replays = ReplayStore()
    replays.begin("a", recording(ON, DONE))
    replays.end("a")
    replays.begin("a", recording(ACCEPTED))
    replay = replays.get("a", 0)
    assert replay and replay.events == (ACCEPTED,)
    replays.forget("a")
    assert replays.get("a", 0) is None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_listeners_are_gone_after_the_grace() -> None:
    clock = Clock()
    listeners = Listeners(10, 1, has_begun=True, clock=clock)
    for number in range(1, 4):
        assert listeners.next_number() == number
    clock.now = 100
    assert not listeners.are_gone
    listeners.on_missed(3)
    clock.now += 9.9
    assert not listeners.are_gone
    clock.now += 0.1
    assert listeners.are_gone


def test_delivered_event_restarts_the_grace() -> None:
    clock = Clock()
    listeners = Listeners(10, 1, has_begun=True, clock=clock)
    for _ in range(3):
        listeners.next_number()
    listeners.on_missed(1)
    clock.now = 11
    assert not listeners.are_gone, "two events were delivered since"
    listeners.on_missed(3)
    clock.now += 9
    assert not listeners.are_gone
    clock.now += 1
    assert listeners.are_gone


def test_consecutive_missed_events_count_from_the_first() -> None:
    clock = Clock()
    listeners = Listeners(10, 1, has_begun=True, clock=clock)
    for number in (1, 2, 3):
        listeners.next_number()
        listeners.on_missed(number)
        clock.now += 4
    assert listeners.are_gone


@pytest.mark.parametrize(("missed", "grace"), [((2,), 1), ((2, 3), 1), ((3,), 1), ((4,), 10)])
def test_only_a_begin_that_was_heard_has_the_long_grace(
    missed: tuple[int, ...], grace: int
) -> None:
    """Events: accepted, progress, started, a token."""
    clock = Clock()
    listeners = Listeners(10, 1, clock=clock)
    for number in range(1, missed[-1] + 1):
        assert listeners.next_number(is_begin=number == 3) == number
        if number in missed:
            listeners.on_missed(number)
    clock.now += grace - 0.1
    assert not listeners.are_gone
    clock.now += 0.1
    assert listeners.are_gone


def test_replay_counts_as_a_listener() -> None:
    clock = Clock()
    listeners = Listeners(10, 1, has_begun=True, clock=clock)
    listeners.on_missed(listeners.next_number())
    clock.now = 9
    listeners.on_replay()
    clock.now = 11
    assert not listeners.are_gone

import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime

from msgspec.structs import replace

from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Progress,
    Replay,
    Resume,
    ResumeState,
    Started,
    Timings,
    Token,
    Usage,
)
from services.inference.replays import KEPT_FOR, MOST_IN_ONE, Recording, Replays

REQUEST = ChatRequest(prompt="hi", request_id="r")
ACCEPTED, STARTED = Accepted("r", "w"), Started(5, 0, 0, 0)
ON, CE = Token(0, "on", (1,)), Token(2, "ce", (2,))
DONE = Done("stop", Usage(5, 2, 0), Timings(0, 0, 0), 0, "log", 4)
REPLY = "chat.reply._.r.a"


def recording(
    *events: object, request: ChatRequest = REQUEST, clock: Callable[[], float] = lambda: 0.0
) -> Recording:
    made = Recording(request, "w", REPLY, clock)
    for event in events:
        made.add(event)  # type: ignore[arg-type]
    return made


def test_all_is_told_to_who_has_nothing_but_what_is_over() -> None:
    made = recording(ACCEPTED, Progress(1, 0, 0), STARTED, ON, CE, DONE)
    assert made.replay(0) == Replay(REQUEST, "w", REPLY, (ACCEPTED, STARTED, ON, CE, DONE))


def test_replay_has_the_seconds_since_acceptance() -> None:
    now = 100.0
    made = recording(ACCEPTED, ON, clock=lambda: now)
    now += 7
    assert made.replay(0).age_seconds == 7


def test_who_has_some_text_gets_what_is_missing() -> None:
    made = recording(ACCEPTED, STARTED, ON, CE)
    assert made.replay(1).events == (ON, CE)
    assert made.replay(2).events == (CE,)
    assert made.replay(4).events == ()


def test_the_end_is_told_to_who_has_all_the_text() -> None:
    assert recording(ACCEPTED, ON, DONE).replay(2).events == (DONE,)


def test_what_the_answer_goes_on_from_is_told_as_its_beginning() -> None:
    origin = ResumeState("digest", b"", 0, 0, 1, datetime.now(UTC), 0, 0)
    request = ChatRequest(prompt="hi", request_id="r", resume=Resume(origin, (1,), "on"))
    made = recording(ACCEPTED, CE, request=request)
    assert made.replay(0) == Replay(REQUEST, "w", REPLY, (Token(0, "on", (1,)), ACCEPTED, CE))


def test_a_long_answer_comes_in_parts_of_which_each_goes_on_where_the_last_ended() -> None:
    piece = "x" * (MOST_IN_ONE // 3)
    tokens = [Token(at * len(piece), piece, (at,)) for at in range(5)]
    made = recording(ACCEPTED, *tokens, DONE)
    got: list[object] = []
    at, is_all = 0, False
    while not is_all:
        replay = made.replay(at)
        got += replay.events
        at = sum(len(e.text) for e in got if isinstance(e, Token))
        is_all = replay.is_complete
    assert got == [ACCEPTED, *tokens, DONE]


def test_of_an_answer_that_has_ended_the_text_is_kept_and_not_its_tokens() -> None:
    replays = Replays()
    replays.begin("a", recording(ACCEPTED, STARTED, ON, CE, DONE))
    replays.end("a")
    replay = replays.of("a", 1)
    assert replay == Replay(REQUEST, "w", REPLY, (Token(0, "once", ()), DONE))
    assert replays.of("a", 4) == Replay(REQUEST, "w", REPLY, (DONE,))


def test_an_answer_is_kept_for_a_while_after_its_end() -> None:
    now = 0.0
    replays = Replays(clock=lambda: now)
    replays.begin("a", recording(ON, CE, DONE))
    now += 10 * KEPT_FOR
    replays.forget_old()
    assert replays.of("a", 0) and replays.of("b", 0) is None
    replays.end("a")
    now += KEPT_FOR - 1
    replays.forget_old()
    assert replays.of("a", 0)
    now += 1
    replays.forget_old()
    assert replays.of("a", 0) is None


def test_the_answers_that_ended_first_make_room_for_others() -> None:
    replays = Replays(most_bytes=4500)
    for key in "abc":
        replays.begin(key, recording(Token(0, "x" * 1000, (1,)), DONE))
        replays.end(key)
    assert replays.of("a", 0) is None
    assert replays.of("b", 0) and replays.of("c", 0)


def test_many_short_answers_take_no_more_memory_than_a_few_long_ones() -> None:
    tracemalloc.start()
    replays = Replays(most_bytes=2**19)
    for number in range(2000):
        replays.begin(key := f"{number:036}", recording(Token(0, "x", (1,)), DONE))
        replays.end(key)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert replays.of("0" * 36, 0) is None
    assert taken < 1.1 * 2**19


def test_answers_of_an_erased_session_are_not_kept() -> None:
    replays = Replays()
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
    assert replays.of("t.running", 0), "its reader may lack a part of it"
    replays.end("t.running")
    kept = {key for key in requests if replays.of(key, 0)}
    assert kept == {"t.other", "u.ended", "t.text"}


def test_a_later_attempt_takes_the_place_of_an_earlier_one() -> None:
    replays = Replays()
    replays.begin("a", recording(ON, DONE))
    replays.end("a")
    replays.begin("a", recording(ACCEPTED))
    replay = replays.of("a", 0)
    assert replay and replay.events == (ACCEPTED,)
    replays.forget("a")
    assert replays.of("a", 0) is None

from datetime import UTC, datetime
from typing import Any, get_args

import msgspec
import pytest

from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Cleared, Described, Erased, Exchange, LogRecord, Removed
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Failed,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    ModelInfo,
    Progress,
    Replay,
    ResumeState,
    Sampling,
    Started,
    StreamEvent,
    TextFormat,
    Timings,
    Token,
    TokenLogprob,
    TokenProbability,
    ToolCallDelta,
    Usage,
)
from tests.fakes import text_resume

MANY = b",".join(b'"%d":1' % token for token in range(301))
USAGE, TIMINGS = Usage(3, 2, 1), Timings(0.1, 0.2, 0.3)
ORIGIN = ResumeState(
    model="abc",
    prompt=b"\x01\x00\x00\x00",
    exchanges_kept=3,
    exchanges_dropped=1,
    seed=7,
    asked_at=datetime(2026, 1, 2, tzinfo=UTC),
    epoch=0,
    applied_seq=9,
    adapter="def",
)
EVENTS = [
    Accepted("r", "w"),
    Progress(2, 10, 5),
    Started(10, 5, 3, 1, ORIGIN),
    Token(4, "é🙂", (1, 2)),
    Token(4, "hm", (1, 2), channel="reasoning"),
    ToolCallDelta(4, 1, (1, 2), "id", "f", "{}"),
    Done("stop", USAGE, TIMINGS, 0, "log", 4, "\nUser:"),
    Failed("overloaded", "try again", 1.5),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_survives_encoding(event: StreamEvent) -> None:
    assert decode(encode(event), StreamEvent) == event  # type: ignore[arg-type]


def test_logprobs_survive_encoding_and_are_optional() -> None:
    half = TokenProbability(7, "\ufffd", (0xC3,), -0.5)
    token = Token(0, "a", (3,), (TokenLogprob(3, "a", (97,), -1.5, (half,)),))
    assert decode(encode(token), StreamEvent) == token  # type: ignore[arg-type]
    assert b"logprobs" not in encode(Token(0, "a", (3,)))


@pytest.mark.parametrize(
    "form",
    [
        TextFormat(),
        JsonObjectFormat(),
        JsonSchemaFormat(JsonSchema({"type": "object"}, "person", strict=True)),
    ],
    ids=str,
)
def test_sampling_survives_encoding(form: Any) -> None:
    sampling = Sampling(
        min_p=0.1,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"17": -100.0},
        logprobs=20,
        response_format=form,
        grammar="root ::= .",
        dry_sequence_breakers=("\n", "é"),
        repeat_last_n=-1,
        top_n_sigma=-1,
        mirostat=2,
        ignore_eos=False,
    )
    assert decode(encode(sampling), Sampling) == sampling


def test_sampling_of_an_old_record_is_readable() -> None:
    old = decode(b'{"temperature":0.5,"top_k":40,"seed":1}', Sampling)
    assert (old.top_k, old.min_p, old.logit_bias, old.grammar) == (40, None, None, None)
    assert encode(old) == b'{"temperature":0.5,"top_k":40,"seed":1}'


def test_resume_survives_encoding() -> None:
    request = ChatRequest(prompt="hi", resume=text_resume(ORIGIN, (1, 2), "é🙂"))
    assert decode(encode(request), ChatRequest) == request


def test_started_event_without_resume_state_is_readable() -> None:
    counts = b'"prompt_tokens":1,"cached_tokens":0,"exchanges_kept":0,"exchanges_dropped":0'
    assert decode(b'{"type":"started",%b}' % counts, Started).resume_state is None


def test_every_event_type_has_an_example() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(StreamEvent))


def test_replay_survives_encoding() -> None:
    replay = Replay(
        ChatRequest(prompt="hi", grace_s=10),
        "w",
        "chat.reply._.r.a",
        (Accepted("r", "w"), Token(4, "é", (1,))),
        False,
    )
    assert decode(encode(replay), Replay) == replay


def test_log_records_survive_encoding() -> None:
    now = datetime.now(UTC)
    exchange = Exchange(
        previous=7,
        request_id="r",
        epoch=0,
        prompt="hi",
        response="hello",
        asked_at=now,
        answered_at=now,
        finish_reason="stop",
        model=ModelInfo("demo", "abc", 2048, 4_000_000),
        sampling=Sampling(temperature=0.5),
        usage=USAGE,
        timings=TIMINGS,
    )
    records = [
        exchange,
        Cleared(previous=7, cleared_at=now),
        Erased(previous=8, erased_at=now),
        Described(previous=9, described_at=now, title="Ada", system_prompt=None),
        Removed(previous=10, removed_at=now, request_id="r"),
    ]
    assert {type(record) for record in records} == set(get_args(LogRecord))
    for record in records:
        assert decode(encode(record), LogRecord) == record  # type: ignore[arg-type]


def test_old_exchange_without_attempt_is_readable() -> None:
    old = (
        b'{"type":"exchange","v":1,"previous":0,"request_id":"r","epoch":0,"prompt":"p",'
        b'"response":"a","asked_at":"2026-01-01T00:00:00Z","answered_at":"2026-01-01T00:00:01Z",'
        b'"finish_reason":"stop","model":{"name":"m","digest":"d","context":1,"bytes":1},'
        b'"sampling":{},"usage":{"prompt_tokens":1,"completion_tokens":1,"cached_tokens":0},'
        b'"timings":{"queued":0,"prefill":0,"decode":0}}'
    )
    exchange: LogRecord = decode(old, LogRecord)  # type: ignore[arg-type]
    assert isinstance(exchange, Exchange)
    assert (exchange.attempt, exchange.retry_of) == ("", None)
    assert (exchange.usage.drafted_tokens, exchange.usage.accepted_tokens) == (0, 0)


def test_old_model_info_has_no_adapters() -> None:
    old = b'{"name":"demo","digest":"abc","context":2048,"bytes":4000000}'
    assert decode(old, ModelInfo).adapters == ()


def test_chat_request_needs_only_a_prompt() -> None:
    request = decode(b'{"prompt":"hi"}', ChatRequest)
    assert (request.prompt, request.session_id, request.request_id) == ("hi", "default", None)


def test_unknown_field_is_ignored() -> None:
    assert decode(b'{"prompt":"hi","mood":"good"}', ChatRequest).prompt == "hi"


@pytest.mark.parametrize("more", [{}, {"name": "x", "strict": None, "description": "a flag"}])
def test_json_schema_name_and_description_are_optional(more: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {}} | more}
    body = msgspec.json.encode({"prompt": "hi", "response_format": form})
    request = decode(body, ChatRequest)
    assert isinstance(request.response_format, JsonSchemaFormat)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{"prompt":1}', r"Expected `str`, got `int` - at `\$.prompt`"),
        (b'{"prompt":"hi","temperature":-1}', r">= 0.*temperature"),
        (b'{"prompt":"hi","request_id":"a.b"}', "request_id"),
        (b'{"prompt":"hi","request_id":"a\\n"}', "request_id"),
        (b'{"prompt":"hi","stop":[""]}', "stop"),
        (b'{"prompt":"hi","min_p":1.5}', "min_p"),
        (b'{"prompt":"hi","repeat_last_n":-2}', "repeat_last_n"),
        (b'{"prompt":"hi","dry_multiplier":-1}', "dry_multiplier"),
        (b'{"prompt":"hi","dry_base":0.9}', "dry_base"),
        (b'{"prompt":"hi","dry_allowed_length":1001}', "dry_allowed_length"),
        (b'{"prompt":"hi","dry_penalty_last_n":1000001}', "dry_penalty_last_n"),
        (b'{"prompt":"hi","dry_sequence_breakers":[""]}', "dry_sequence_breakers"),
        (b'{"prompt":"hi","dry_sequence_breakers":["%s"]}' % (b"x" * 41), "dry_sequence_breakers"),
        (b'{"prompt":"hi","dry_sequence_breakers":[%s]}' % b",".join([b'"x"'] * 17), "dry"),
        (b'{"prompt":"hi","top_n_sigma":-1.5}', "top_n_sigma"),
        (b'{"prompt":"hi","typical_p":1.1}', "typical_p"),
        (b'{"prompt":"hi","xtc_probability":-0.1}', "xtc_probability"),
        (b'{"prompt":"hi","xtc_threshold":2}', "xtc_threshold"),
        (b'{"prompt":"hi","dynatemp_range":5.5}', "dynatemp_range"),
        (b'{"prompt":"hi","dynatemp_exponent":-1}', "dynatemp_exponent"),
        (b'{"prompt":"hi","mirostat":3}', "mirostat"),
        (b'{"prompt":"hi","mirostat_tau":21}', "mirostat_tau"),
        (b'{"prompt":"hi","mirostat_eta":1.5}', "mirostat_eta"),
        (b'{"prompt":"hi","min_keep":-1}', "min_keep"),
        (b'{"prompt":"hi","min_tokens":-1}', "min_tokens"),
        (b'{"prompt":"hi","ignore_eos":1}', "ignore_eos"),
        (b'{"prompt":"hi","presence_penalty":2.5}', "presence_penalty"),
        (b'{"prompt":"hi","frequency_penalty":-3}', "frequency_penalty"),
        (b'{"prompt":"hi","logit_bias":{"the":1}}', "logit_bias"),
        (b'{"prompt":"hi","logit_bias":{"1":101}}', "logit_bias"),
        (b'{"prompt":"hi","logit_bias":{%s}}' % MANY, "logit_bias"),
        (b'{"prompt":"hi","logprobs":21}', "logprobs"),
        (b'{"prompt":"hi","response_format":{"type":"yaml"}}', "response_format"),
        (b'{"prompt":"hi","response_format":{"type":"json_schema"}}', "json_schema"),
        (b'{"prompt":"hi","grammar":""}', "grammar"),
        (b'{"prompt":"hi","grammar":"%s"}' % (b"x" * 65_537), "grammar"),
        (b'{"prompt":"hi","model":""}', "model"),
        (b'{"prompt":"hi","model":"' + b"x" * 513 + b'"}', "model"),
        (b"not json", "malformed"),
        (b"\xff", "Byte 0 is not UTF-8"),
        (b"", "truncated"),
        (b"[" * 100_000, "too deep|Expected"),
    ],
)
def test_invalid_request_names_the_field(data: bytes, what: str) -> None:
    with pytest.raises(ServiceError, match=what) as error:
        decode(data, ChatRequest)
    assert error.value.code == "invalid_request"


def test_unknown_event_type_is_an_error() -> None:
    with pytest.raises(ServiceError, match="mystery"):
        decode(b'{"type":"mystery"}', StreamEvent)  # type: ignore[arg-type]


def test_messages_are_immutable() -> None:
    with pytest.raises(AttributeError):
        EVENTS[0].worker_id = "x"  # type: ignore[attr-defined]
    assert all(isinstance(event, msgspec.Struct) for event in EVENTS)

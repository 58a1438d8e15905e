from datetime import UTC, datetime

import pytest

from services.contract import prompts
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, Resume, ResumeState, ToolCallDelta

MESSAGE = '{"role":"user","content":"hi"}'
TOOL = '{"type":"function","function":{"name":"f"}}'


def request(fields: str) -> ChatRequest:
    return decode(f"{{{fields}}}".encode(), ChatRequest)


@pytest.mark.parametrize(
    "fields",
    [
        '"prompt":"hi"',
        f'"messages":[{MESSAGE}]',
        f'"messages":[{MESSAGE}],"session_id":""',
        '"text":"once"',
        '"text":[1,2]',
        f'"messages":[{MESSAGE}],"tools":[{TOOL}],"tool_choice":"required"',
        f'"messages":[{MESSAGE}],"tools":[{TOOL}],"grammar":"root ::= .","tool_choice":"none"',
        '"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}]',
        '"messages":[{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f",'
        '"arguments":"{}"}}]},{"role":"tool","content":"x","tool_call_id":"1"}]',
        '"messages":[{"role":"assistant"},{"role":"assistant","tool_calls":[{"id":"","function":'
        '{"name":"","arguments":"{\\"a\\":"}}]},{"role":"tool"}]',
        f'"messages":[{MESSAGE}],"tools":[{TOOL}],"response_format":{{"type":"json_object"}}',
    ],
)
def test_valid_request_is_accepted(fields: str) -> None:
    prompts.check(request(fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("", "blank"),
        ('"prompt":" "', "blank"),
        ('"prompt":"hi","session_id":""', "session_id"),
        (f'"prompt":"hi","messages":[{MESSAGE}]', "one of `prompt`, `messages` and"),
        (f'"text":"hi","messages":[{MESSAGE}]', "one of `prompt`, `messages` and"),
        ('"text":""', "one of `prompt`, `messages` and"),
        ('"messages":[{"role":"user"}]', r"needs `content` - at `\$.messages\[0\]`"),
        (
            '"messages":[{"role":"user","content":"x","tool_calls":[{"id":"1","function":'
            '{"name":"f","arguments":""}}]}]',
            "has no `tool_calls`",
        ),
        (f'"messages":[{MESSAGE}],"tool_choice":"required"', "tool_choice"),
        (
            f'"messages":[{MESSAGE}],"tools":[{TOOL}],'
            '"tool_choice":{"type":"function","function":{"name":"g"}}',
            "tool_choice",
        ),
        (f'"messages":[{MESSAGE}],"tools":[{TOOL},{TOOL}]', "same name"),
        (
            f'"messages":[{MESSAGE}],"tools":[{TOOL}],"grammar":"root ::= ."',
            "`grammar` can't be comb",
        ),
        ('"prompt":"hi","min_tokens":6,"max_tokens":5', "`min_tokens` is 6, but `max_tokens` is 5"),
        ('"prompt":"hi","min_tokens":6,"max_completion_tokens":5', "`max_completion_tokens` is 5"),
    ],
)
def test_invalid_request_is_rejected_with_a_reason(fields: str, reason: str) -> None:
    with pytest.raises(ServiceError, match=reason) as error:
        prompts.check(request(fields))
    assert error.value.code == "invalid_request"


@pytest.mark.parametrize(
    "fields",
    [
        '"prompt":"' + "x" * 65_537 + '"',
        '"text":"' + "x" * 524_289 + '"',
        '"messages":[{"role":"user","content":"' + "ü" * 262_145 + '"}]',
        '"messages":[{"role":"user","content":"' + "\\u0001" * 90_000 + '"}]',
        f'"messages":[{MESSAGE}],"tools":[{{"type":"function","function":{{"name":"f",'
        '"description":"' + "x" * 524_289 + '"}}]',
    ],
)
def test_request_over_the_size_limit_is_rejected(fields: str) -> None:
    with pytest.raises(ServiceError, match="the maximum is") as error:
        prompts.check(request(fields))
    assert error.value.code == "payload_too_large"


@pytest.mark.parametrize("depth", [70, 300, *range(900, 1000, 7)])
def test_too_deeply_nested_json_is_rejected(depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    tool = f'{{"type":"function","function":{{"name":"f","parameters":{deep}}}}}'
    form = f'{{"type":"json_schema","json_schema":{{"name":"n","schema":{deep}}}}}'
    for field in (f'"tools":[{tool}]', f'"response_format":{form}'):
        with pytest.raises(ServiceError, match="deep|depth") as error:
            prompts.check(request(f'"messages":[{MESSAGE}],{field}'))
        assert error.value.code == "invalid_request"


def stateless(*texts: str, roles: tuple[str, ...], session_id: str = "") -> ChatRequest:
    messages = (f'{{"role":"{r}","content":"{t}"}}' for r, t in zip(roles, texts, strict=False))
    return request(f'"session_id":"{session_id}","messages":[{",".join(messages)}]')


def test_stateless_request_is_routed_by_its_prefix() -> None:
    def route(*texts: str, session_id: str = "") -> str:
        roles = ("system", "user", "assistant", "user")
        return prompts.routing_key("t", stateless(*texts, roles=roles, session_id=session_id))

    assert route("be kind", "hi") == route("be kind", "hi", "hello", "and?")
    assert route("be kind", "hi") != route("be kind", "ho") != route("be rude", "ho")
    assert route("be kind", "hi", session_id="s") == "t.cw"
    long = "x" * 2000
    texts = [request(f'"text":"{long}{end}","session_id":""') for end in ("", "y")]
    assert len({prompts.routing_key("t", text) for text in texts}) == 1


def test_conversation_key_has_session_and_first_message() -> None:
    def key(*texts: str, session_id: str = "") -> str:
        roles = ("user", "assistant", "user")
        return prompts.conversation_key("t", stateless(*texts, roles=roles, session_id=session_id))

    assert key("hi") == "" == prompts.conversation_key("t", request('"text":"hi","session_id":""'))
    assert key("hi", "hello") == key("hi", "hello", "and?") != ""
    assert key("hi", session_id="s") == key("hi", "hello", "and?", session_id="s") != key("hi", "a")
    assert key("hi", session_id="s") != key("a title, please", session_id="s")
    assert prompts.conversation_key("t", request('"prompt":"hi","session_id":"s"')) == "t.cw"


def test_size_of_a_prompt_includes_results_and_prefix() -> None:
    results = '"tool_results": [{"tool_call_id": "a", "content": "é"}]'
    sent = decode(f'{{"prompt": "abc", "prefix": "é", {results}}}'.encode(), ChatRequest)
    assert prompts.size_bytes(sent) == 7


@pytest.mark.parametrize("indexes", [(-1,), (1,), (0, 2), (0, 1, 0, 7)])
def test_resumed_tool_call_out_of_order_is_rejected(indexes: tuple[int, ...]) -> None:
    with pytest.raises(ServiceError, match="follows") as caught:
        prompts.check(resuming(indexes))
    assert caught.value.code == "invalid_request"


def test_resumed_tool_calls_in_order_are_accepted() -> None:
    prompts.check(resuming((0, 0, 1, 2, 2)))


def resuming(indexes: tuple[int, ...]) -> ChatRequest:
    """Return a request that resumes an answer with an event of each of these tool calls."""
    state = ResumeState("digest", b"", 0, 0, 1, datetime.now(UTC), 0, 0)
    events = tuple(ToolCallDelta(0, index, ()) for index in indexes)
    return ChatRequest(prompt="hi", resume=Resume(state, events))

from datetime import UTC, datetime
from uuid import UUID

import pytest

from services.client.chat_client import new_request_id
from services.contract import prompts, responses, subjects
from services.contract.codec import decode, encode
from services.contract.conversation import ChatMessage, FunctionCall, ToolCall, ToolResult
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, PromptRequest
from services.contract.responses import ResponseTurn

TREE = "0123456789abcdef" * 2
OWN = UUID(new_request_id())


def request(*messages: ChatMessage, **fields: object) -> ChatRequest:
    turn = ResponseTurn(input=({"type": "message"},))
    given = {"turn": turn, "request_id": responses.request_id(TREE, OWN), **fields}
    return ChatRequest(messages=messages, **given)  # type: ignore[arg-type]


def test_request_id_names_tree_session_and_time() -> None:
    id_ = responses.request_id(TREE, UUID(new_request_id()))
    assert responses.is_request_id(id_) and subjects.is_id(id_)
    assert responses.tree_of(id_) == TREE and responses.is_tree(TREE)
    assert responses.session_of(id_) == responses.session_of_tree(TREE)
    assert abs((responses.created_at(id_) - datetime.now(UTC)).total_seconds()) < 60


@pytest.mark.parametrize("text", ["", TREE, TREE * 2 + "0", TREE.upper() * 2, TREE * 2 + "\n"])
def test_other_texts_are_no_request_id_of_a_response(text: str) -> None:
    assert not responses.is_request_id(text)


def test_snapshots_of_responses_have_keys_of_their_own() -> None:
    own = subjects.session_key("alice", responses.session_of_tree(TREE))
    for key in (own, subjects.session_key("alice", "default")):
        assert subjects.key_of_snapshot(subjects.snapshot_entry(key)) == key
    assert not subjects.snapshot_entry(own).startswith("alice.")
    assert subjects.snapshot_entry(subjects.session_key("alice", "x")).startswith("alice.")


def test_request_with_a_turn_is_stored_in_the_session_of_its_tree() -> None:
    asked = request(ChatMessage("user", "hi"), session_id="cache key")
    assert decode(encode(asked), ChatRequest) == asked
    assert prompts.is_stateless(asked)
    assert prompts.stored_session(asked) == responses.session_of_tree(TREE)
    key = subjects.session_key("a", responses.session_of_tree(TREE))
    assert prompts.conversation_key("a", asked) == key
    assert prompts.routing_key("a", asked) == subjects.session_key("a", "cache key")
    assert prompts.stored_session(request(ChatMessage("user", "hi"), turn=None)) is None


def test_exchange_of_a_conversation_has_what_follows_its_last_answer() -> None:
    call = ToolCall("c1", FunctionCall("go", "{}"))
    asked = request(
        ChatMessage("user", "old"),
        ChatMessage("assistant", tool_calls=(call,)),
        ChatMessage("tool", "done", tool_call_id="c1"),
        ChatMessage("user", "new"),
        ChatMessage("user", "newer"),
    )
    assert prompts.asked(asked) == ("new\nnewer", (ToolResult("c1", "done"),))
    assert prompts.asked(ChatRequest(prompt="hi")) == ("hi", ())


@pytest.mark.parametrize("fields", [{"request_id": "r1"}, {"request_id": None}])
def test_turn_with_another_request_id_is_rejected(fields: dict[str, object]) -> None:
    with pytest.raises(ServiceError, match="64 hexadecimal digits"):
        prompts.check(request(ChatMessage("user", "hi"), **fields))


def test_turn_without_messages_is_rejected() -> None:
    asked = ChatRequest(prompt="hi", turn=ResponseTurn(), request_id=TREE * 2)
    with pytest.raises(ServiceError, match="needs `messages`"):
        prompts.check(asked)


def test_sessions_of_responses_are_not_continued_by_prompts() -> None:
    prompts.check(PromptRequest(prompt="hi", session_id="responses_"))
    with pytest.raises(ServiceError, match="belongs to /v1/responses"):
        prompts.check(PromptRequest(prompt="hi", session_id=responses.session_of_tree(TREE)))

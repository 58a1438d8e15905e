"""Sessions are cleared or erased while an answer of theirs is generated."""

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.e2e.test_restart import LONG_PROMPT, BackgroundChat
from tests.faults import consistency
from tests.faults.harness import erase
from tests.servers import mongod, running


class ArchivedStack(NamedTuple):
    stack: Stack
    mongodb_uri: str


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArchivedStack]:
    folder = tmp_path_factory.mktemp("slow")
    mongo = mongod(folder)
    uri = f"mongodb://127.0.0.1:{mongo.port}/"
    with running(mongo), running_stack(folder, uri, slow=True) as stack:
        yield ArchivedStack(stack, uri)


def test_answer_of_a_session_erased_meanwhile_is_not_stored(slow: ArchivedStack) -> None:
    stack, uri = slow
    stack.chat("hello", "erased", max_tokens=3)
    chat = BackgroundChat(stack, LONG_PROMPT, "erased")
    asyncio.run(erase(stack, "erased"))
    assert chat.result().end["stored"] == "none"
    consistency.check_erased(stack, uri, "erased")


def test_answer_of_a_session_cleared_meanwhile_is_not_in_context(slow: ArchivedStack) -> None:
    stack, uri = slow
    before = stack.chat("hello", "cleared", max_tokens=3)
    chat = BackgroundChat(stack, LONG_PROMPT, "cleared")
    assert stack.http.post("/clear-history", params={"session_id": "cleared"}).is_success
    during = chat.result()
    assert during.end["stored"] == "log"
    after = stack.chat("hello", "cleared", max_tokens=3)
    ids = [answer.end["request_id"] for answer in (before, during, after)]
    logged, contexts = consistency.log_and_contexts(stack, ["cleared"])
    assert (logged["cleared"], contexts["cleared"]) == (ids, ids[2:])
    consistency.wait_for_archive(stack)
    assert consistency.in_mongodb(uri, ["cleared"])["cleared"] == ids

"""Sessions that are cleared or erased while an answer of theirs is being generated."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.e2e.test_restart import LONG_PROMPT, BackgroundChat
from tests.faults import ledger
from tests.faults.arena import erase
from tests.servers import mongod, running


@pytest.fixture(scope="module")
def uri_and_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Stack]]:
    folder = tmp_path_factory.mktemp("slow")
    mongo = mongod(folder)
    uri = f"mongodb://127.0.0.1:{mongo.port}/"
    with running(mongo), running_stack(folder, uri, slow=True) as stack:
        yield uri, stack


def test_an_answer_of_a_session_that_is_erased_meanwhile_is_nowhere(
    uri_and_stack: tuple[str, Stack],
) -> None:
    uri, stack = uri_and_stack
    stack.chat("hello", "erased", max_tokens=3)
    chat = BackgroundChat(stack, LONG_PROMPT, "erased")
    asyncio.run(erase(stack, "erased"))
    assert chat.result().end["stored"] == "none"
    ledger.check_erased(stack, uri, "erased")


def test_an_answer_of_a_session_that_is_cleared_meanwhile_is_listed_and_not_shown(
    uri_and_stack: tuple[str, Stack],
) -> None:
    uri, stack = uri_and_stack
    before = stack.chat("hello", "cleared", max_tokens=3)
    chat = BackgroundChat(stack, LONG_PROMPT, "cleared")
    assert stack.http.post("/clear-history", params={"session_id": "cleared"}).is_success
    during = chat.result()
    assert during.end["stored"] == "log"
    after = stack.chat("hello", "cleared", max_tokens=3)
    ids = [answer.end["request_id"] for answer in (before, during, after)]
    logged, shown = ledger.logged_and_shown(stack, ["cleared"])
    assert (logged["cleared"], shown["cleared"]) == (ids, ids[2:])
    ledger.wait_for_archive(stack)
    assert ledger.in_mongodb(uri, ["cleared"])["cleared"] == ids

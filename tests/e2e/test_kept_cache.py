"""The host KV cache that a stopped worker leaves for the next one (MODEL_CACHE_FOLDER)."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.servers import wait_for

TURNS = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with running_stack(folder, MODEL_CACHE_FOLDER=str(cache)) as stack:
        yield stack


def talk(stack: Stack, session_id: str) -> None:
    name = session_id[-8:]  # or other sessions could lend their cached prompts
    for turn in range(TURNS):
        stack.chat(f"{name}: count to {turn + 3}, and then tell me a long story.", session_id)


def start(stack: Stack) -> None:
    """Start the worker, and wait until it has read what the last one left."""
    before = _times_taken_over(stack)
    stack.inference.start()
    stack.wait_until_ready()
    wait_for(lambda: _times_taken_over(stack) > before, "the cached prompts")


def _times_taken_over(stack: Stack) -> int:
    return stack.inference.log.read_text().count("cached prompts taken over")


def cached_tokens(stack: Stack, session_id: str) -> int:
    answer = stack.chat("go on", session_id)
    return int(answer.end["usage"]["cached_tokens"])


def test_next_turn_after_a_restart_needs_no_new_prefill(
    stack: Stack, cache: Path, session_id: str
) -> None:
    for name in ("kept", "same"):
        talk(stack, f"{name}{session_id}")
    warm = cached_tokens(stack, f"same{session_id}")
    worker_id = stack.next_report().worker_id
    stack.inference.stop()
    start(stack)
    assert list(cache.iterdir()) == []
    assert stack.next_report().worker_id == worker_id
    assert cached_tokens(stack, f"kept{session_id}") >= warm > 40


def test_killed_worker_costs_a_prefill_and_nothing_else(
    stack: Stack, cache: Path, session_id: str
) -> None:
    talk(stack, session_id)
    stack.inference.stop(signal.SIGKILL)
    assert list(cache.iterdir()) == []
    stack.inference.start()
    wait_for(lambda: stack.next_report().state == "ready", "the new worker")
    answer = stack.chat("go on", session_id)
    assert answer.text and answer.end["usage"]["cached_tokens"] < 40


def test_session_that_was_erased_meanwhile_is_not_taken_over(
    stack: Stack, cache: Path, session_id: str
) -> None:
    question = f"remember these numbers: {[*map(ord, session_id)]}"
    first, kept = (stack.chat(f"{question} {name}", f"{session_id}{name}") for name in "ab")
    assert kept.end["usage"]["cached_tokens"] > first.end["usage"]["cached_tokens"] + 50
    talk(stack, f"other{session_id}")
    stack.inference.stop()
    assert len(list(cache.iterdir())) == 1
    for name in "ab":
        assert stack.http.delete(f"/sessions/{session_id}{name}").status_code == 200
    start(stack)
    assert cached_tokens(stack, f"other{session_id}") > 40
    again = stack.chat(f"{question} a", f"{session_id}c")
    assert again.end["usage"]["cached_tokens"] <= first.end["usage"]["cached_tokens"]


def test_cache_of_another_type_is_not_used(stack: Stack, cache: Path, session_id: str) -> None:
    talk(stack, session_id)
    process = stack.inference
    process.stop()
    process.environ = process.environ | {"MODEL_KV_TYPE": "q8_0"}
    process.start()
    wait_for(lambda: "cached prompts not used" in process.log.read_text(), "the line in the log")
    wait_for(lambda: stack.next_report().state == "ready", "the new worker")
    assert list(cache.iterdir()) == []
    assert cached_tokens(stack, session_id) < 40

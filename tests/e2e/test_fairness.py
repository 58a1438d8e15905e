"""A flood of one tenant, through an edge, beside the questions of another."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack, running_stack
from tests.servers import wait_for

KEYS = {name: f"{name}-0123456789abcdef" for name in ("ann", "bob")}
SLOTS, QUEUE = 2, 30


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("fairness")
    keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    with running_stack(
        folder,
        slow=True,
        EDGE_API_KEYS=keys,
        MODEL_PARALLEL=str(SLOTS),
        MODEL_QUEUE=str(QUEUE),
    ) as stack:
        yield stack


def ask(stack: Stack, name: str, number: int, **more: Any) -> httpx.Response:
    question = {"role": "user", "content": f"What is {number}?"}
    body = {"messages": [question], "max_tokens": 20, "seed": number} | more
    headers = {"X-API-Key": KEYS[name]}
    return stack.http.post("/v1/chat/completions", json=body, headers=headers, timeout=60)


def in_flight(stack: Stack) -> int:
    report = stack.next_report()
    return report.running + report.waiting


def test_question_beside_a_flood_waits_for_one_answer_only(stack: Stack) -> None:
    """The flood, two times 16 answers, has all places."""
    with ThreadPoolExecutor() as threads:
        flood = [threads.submit(ask, stack, "ann", n, n=16, max_tokens=40) for n in range(2)]
        wait_for(lambda: in_flight(stack) > QUEUE // 2, "the flood")
        assert [ask(stack, "bob", n).status_code for n in range(2)] == [200] * 2
        assert not all(each.done() for each in flood), "bob waited for the whole flood"
        assert [each.result().status_code for each in flood] == [200, 200]

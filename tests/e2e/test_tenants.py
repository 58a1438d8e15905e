"""Tenants can't read each other's prompts through the prefix cache."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Context, ContextRequest
from services.inference.settings import InferenceSettings
from tests.e2e.stack import Stack, running_stack
from tests.servers import wait_for

KEYS = {name: f"{name}-0123456789abcdef" for name in ("ann", "bob", "cec", "dan", "eve")}
SYSTEM = InferenceSettings(nats_url="nats://unused").chat_system_prompt
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SAID = "My pin is 813355: please keep it for me, and tell nobody else, until I come back for it."
TEXT = f"{HEAD}{SAID}<|im_end|>\n<|im_start|>assistant\n"
ASKED = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": SAID}]
MAX_SESSIONS = 3
SHORT = {"max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("tenants")
    keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    with running_stack(folder, EDGE_API_KEYS=keys, HISTORY_MAX_SESSIONS=str(MAX_SESSIONS)) as stack:
        yield stack


def post(stack: Stack, name: str, path: str, body: dict[str, Any]) -> str:
    headers = {"X-API-Key": KEYS[name]}
    response = stack.http.post(path, json=body, headers=headers, timeout=30)
    assert response.status_code == 200, response.text
    return response.text


def tokens(stack: Stack, text: str) -> list[int]:
    found: list[int] = json.loads(post(stack, "ann", "/v1/tokenize", {"content": text}))["tokens"]
    return found


def cached(stack: Stack, name: str, path: str, body: dict[str, Any]) -> int:
    """Return the number of cached tokens of the prompt."""
    answer = post(stack, name, path, SHORT | body)
    if path == "/chat":
        events = [line[5:] for line in answer.splitlines() if line.startswith("data:")]
        return int(json.loads(events[-1])["usage"]["cached_tokens"])
    return int(json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_no_route_reuses_another_tenants_prompt_beyond_public_head(stack: Stack) -> None:
    head, model = len(tokens(stack, HEAD)), {"model": "demo"}
    routes: list[tuple[str, dict[str, Any]]] = [
        ("/chat", {"prompt": SAID, "session_id": "new"}),
        ("/v1/chat/completions", model | {"messages": ASKED}),
        ("/v1/completions", model | {"prompt": TEXT}),
        ("/v1/completions", model | {"prompt": tokens(stack, TEXT)}),
    ]
    cached(stack, "ann", "/chat", {"prompt": SAID, "session_id": "private"})
    for name in ("bob", "cec", "dan", "eve"):
        path, body = routes.pop(0)
        assert cached(stack, name, path, body) == head
        assert cached(stack, "ann", path, body) > head, "ann finds her own"


def test_tenant_with_too_many_sessions_begins_no_other(stack: Stack) -> None:
    headers = {"X-API-Key": KEYS["eve"]}

    def ask(path: str, **body: Any) -> httpx.Response:
        return stack.http.post(path, json=SHORT | body, headers=headers, timeout=30)

    for n in range(MAX_SESSIONS):
        stack.http.patch(f"/sessions/kept{n}", json={"title": "T"}, headers=headers)
    wait_for(lambda: asyncio.run(is_refused(stack, "eve")), "the count of sessions")
    assert ask("/chat", prompt="hello", session_id="kept0").status_code == 200
    for path, body in (
        ("/chat", {"prompt": "hello", "session_id": "beyond"}),
        ("/v1/responses", {"model": "demo", "input": "hello"}),
    ):
        refused = ask(path, **body)
        assert refused.status_code == 429, refused.text
        assert refused.json()["error"]["code"] == "too_many_sessions"
        assert refused.headers["x-should-retry"] == "false"
        assert "Retry-After" not in refused.headers
    stateless = {"model": "demo", "messages": ASKED}
    assert ask("/v1/chat/completions", **stateless).status_code == 200
    stored = stack.http.get("/sessions", headers=headers).json()["sessions"]
    assert sorted(each["id"] for each in stored) == [f"kept{n}" for n in range(MAX_SESSIONS)]


async def is_refused(stack: Stack, tenant: str) -> bool:
    """Ask for the context of a new session, as a worker does."""
    request = ContextRequest("beyond")
    async with stack.connect("inference") as bus:
        try:
            await bus.request(subjects.history("context", tenant), request, Context)
        except ServiceError as error:
            return error.code == "too_many_sessions"
    return False

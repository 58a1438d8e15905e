"""Tenants can't read each other's prompts through the prefix cache."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.inference.settings import InferenceSettings
from tests.e2e.stack import Stack, running_stack

KEYS = {name: f"{name}-0123456789abcdef" for name in ("ann", "bob", "cec", "dan", "eve")}
SYSTEM = InferenceSettings(nats_url="nats://unused").chat_system_prompt
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SAID = "My pin is 813355: please keep it for me, and tell nobody else, until I come back for it."
TEXT = f"{HEAD}{SAID}<|im_end|>\n<|im_start|>assistant\n"
ASKED = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": SAID}]
SHORT = {"max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("tenants")
    keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    with running_stack(folder, EDGE_API_KEYS=keys) as stack:
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

"""What tenants share of the prefix cache, for every kind of request."""

from typing import Any

import pytest

from services.contract.conversation import ChatMessage
from services.contract.messages import ChatRequest, Done, Started
from services.inference.engine.backend import ROW_BLOCK
from services.inference.settings import InferenceSettings
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, StartWorker, Worker

SYSTEM = InferenceSettings(nats_url="nats://unused").chat_system_prompt
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SECRET = "My pin is 813355, keep it. "
PROMPT = f"{HEAD}{SECRET}hi<|im_end|>\n<|im_start|>assistant\n"
ASKED = (ChatMessage("system", SYSTEM), ChatMessage("user", f"{SECRET}hi"))
OWN_SYSTEM = (ChatMessage("system", SECRET), ChatMessage("user", "hi"))
TURNS = (*ASKED, ChatMessage("assistant", "hello"), ChatMessage("user", "hi"))

ROUTES: dict[str, dict[str, Any]] = {
    "chat": {"prompt": f"{SECRET}hi", "session_id": "s"},
    "conversation": {"messages": ASKED},
    "conversation of a session": {"messages": ASKED, "session_id": "s"},
    "conversation of several turns": {"messages": TURNS},
    "conversation with a system prompt of its own": {"messages": OWN_SYSTEM},
    "conversation without a system prompt": {"messages": ASKED[1:]},
    "text": {"text": PROMPT},
    "tokens": {"text": tuple(PROMPT.encode())},
    "tokens without a head": {"text": tuple(PROMPT[20:].encode())},
}
WITH_HEAD = ["chat", "conversation", "conversation of a session", "conversation of several turns"]
WITH_HEAD += ["text", "tokens"]
WAYS: dict[str, dict[str, Any]] = {
    "": {}, ", with an adapter": {"model": "fake:shout"}, ", with a seed": {"seed": 7},
}  # fmt: skip
ALL = {name + how: route | way for name, route in ROUTES.items() for how, way in WAYS.items()}


async def ask(worker: Worker, name: str, **fields: Any) -> Started:
    """Return the Started of a tenant's request, after its prompt was prefilled."""
    tenant = f"{worker.tenant}-{name}"
    before = worker.backend.computed
    events = [e async for e in worker.events(ChatRequest(**fields), tenant)]
    (started,) = (e for e in events if isinstance(e, Started))
    *_, done = events
    assert isinstance(done, Done) and done.usage.cached_tokens == started.cached_tokens
    computed = worker.backend.computed - before - done.usage.completion_tokens + 1
    assert computed == started.prompt_tokens - started.cached_tokens
    return started


@pytest.mark.parametrize("name", ALL)
async def test_a_tenants_cached_tokens_never_exceed_the_public_head(
    fast: Worker, name: str
) -> None:
    request = ALL[name]
    await ask(fast, "ann", **request)
    for tenant in ("bob", "cec"):
        assert (await ask(fast, tenant, **request)).cached_tokens <= len(HEAD)
    again = await ask(fast, "ann", **request)
    own = len(HEAD) + len(SECRET) if "prompt" in request else again.prompt_tokens - 2
    if "seed" in request:
        own -= own % ROW_BLOCK
    assert again.cached_tokens >= own, "the tenant reuses its own prefix"


async def test_prefix_of_one_route_is_not_shared_with_another_tenant(fast: Worker) -> None:
    await ask(fast, "ann", **ROUTES["chat"])
    for number, (name, request) in enumerate(ROUTES.items()):
        found = (await ask(fast, f"bob-{number}", **request)).cached_tokens
        assert found == len(HEAD) if name in WITH_HEAD else found < 20, name
    assert (await ask(fast, "ann", **ROUTES["tokens"])).cached_tokens == len(PROMPT) - 1


async def test_server_system_prompt_is_prefilled_once_for_all_tenants(fast: Worker) -> None:
    found = [(await ask(fast, t, prompt="hi", session_id="s")).cached_tokens for t in "abc"]
    assert found == [0, len(HEAD), len(HEAD)]


async def test_guessing_reveals_nothing_of_an_offloaded_conversation(
    start_worker: StartWorker,
) -> None:
    backend = FakeBackend(ANSWERS | {"": b"?"}, context=2000)
    async with start_worker(parallel=2, backend=backend) as two:
        await ask(two, "ann", prompt=f"{SECRET}hi", session_id="private")
        for number in range(4):  # offloads ann's conversation to the host cache
            await ask(two, "ann", prompt="hi", session_id=f"{number}")
        for length in (0, 1, 20, len(SECRET) - 1):
            for guess in (SECRET[length], "#"):
                text = tuple(f"{HEAD}{SECRET[:length]}{guess}?".encode())
                found = await ask(two, f"bob{length}{ord(guess)}", text=text)
                assert found.cached_tokens == len(HEAD)
        own = await ask(two, "ann", prompt="hi", session_id="private")
        assert own.cached_tokens >= len(PROMPT), "it was there to be found"

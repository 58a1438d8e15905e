"""What a key that may use certain models is shown of the others: nothing, whatever it asks."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.messages import ModelInfo, ModelKind, WorkerReport
from services.edge.allowed_workers import AllowedWorkers
from services.edge.keys import ApiKey, ApiKeys, sha256_of
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on, until
from tests.fakes import reporting

ADA, BOB = {"X-API-Key": "ada's key"}, {"X-API-Key": "bob's key"}
MESSAGES = [{"role": "user", "content": "hi"}]
ALLOWED = ("plain", "mixed:loud")


def worker(
    name: str, *adapters: str, kind: ModelKind = "chat", is_ready: bool = True
) -> WorkerReport:
    info = ModelInfo(name, f"digest of {name}", 2048, 1, adapters)
    return WorkerReport(
        f"w-{name}",
        "ready" if is_ready else "failed",
        1,
        0,
        0,
        model=info if is_ready else None,
        error=None if is_ready else f"model/{name}.gguf is broken.",
        name=name,
        default_model="secret",
        kind=kind,
    )


WORKERS = (
    worker("plain", "secret-style"),
    worker("mixed", "loud", "secret-style"),
    worker("secret"),
    worker("secret-bge", kind="embedding"),
    worker("secret-ranker", kind="rerank"),
    worker("secret-broken", is_ready=False),
)


@pytest.fixture
async def http(nats_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an edge where ada may use `plain` and an adapter of `mixed`, and bob all."""
    ada = ApiKey(name="ada", sha256=sha256_of("ada's key"), models=(*ALLOWED, "extra*"))
    keys = ApiKeys([ada, ApiKey(name="bob", sha256=sha256_of("bob's key"))])
    async with (
        Bus.connect(nats_url, "edge") as bus,
        edge_on(bus, keys) as client,
        reporting(bus, *WORKERS),
    ):
        async with asyncio.timeout(30):
            while "secret-broken" not in (await client.get("/v1/models", headers=BOB)).text:
                await asyncio.sleep(0.01)
        yield client


LISTS = ("/status", "/v1/models", "/api/tags", "/api/ps", "/v1/models/x", "/v1/models/mixed")
CHATS: dict[str, dict[str, object]] = {
    "/chat": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/input_tokens": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/tokenize": {"content": "hi"},
    "/api/chat": {"messages": MESSAGES, "stream": False},
}
OTHERS: dict[str, dict[str, object]] = {
    "/v1/embeddings": {"input": "hi"},
    "/v1/rerank": {"query": "hi", "documents": ["ho"]},
    "/api/embed": {"input": "hi"},
    "/api/show": {},
}


async def shown(
    http: httpx.AsyncClient, who: dict[str, str], names: Sequence[str | None]
) -> dict[str, str]:
    """Return responses that could name a model, to requests that no worker would answer."""
    texts = {path: (await http.get(path, headers=who)).text for path in LISTS}
    for path, body in (CHATS | OTHERS).items():
        for name in names:
            if path in OTHERS or name not in ALLOWED:
                more = {} if name is None else {"model": name}
                answer = await http.post(path, json=body | more, headers=who)
                texts[f"{path} {name}"] = answer.text
    return texts


async def test_key_sees_no_model_that_it_may_not_use(http: httpx.AsyncClient) -> None:
    of_ada = await shown(http, ADA, (None, "unknown", "extra", "mixed", *ALLOWED))
    assert {path: text for path, text in of_ada.items() if "secret" in text} == {}
    assert "mixed:loud" in of_ada["/v1/models"] and '"plain"' in of_ada["/api/tags"]
    assert "available: mixed:loud, plain" in of_ada["/v1/tokenize extra"]
    queued = await http.post("/v1/responses", json={"input": "hi", "background": True}, headers=ADA)
    assert queued.status_code == 404 and "may not use the default model" in queued.text


async def test_key_without_models_sees_all_of_them(http: httpx.AsyncClient) -> None:
    """This is what the test above would find."""
    of_bob = await shown(http, BOB, ("unknown",))
    telling = {path for path, text in of_bob.items() if "secret" in text}
    others = {f"{path} unknown" for path in ("/v1/tokenize", *OTHERS)}
    assert telling >= {*LISTS, *others}, of_bob


async def test_status_shows_a_model_that_the_key_may_use(http: httpx.AsyncClient) -> None:
    ada, bob = [(await http.get("/status", headers=who)).json() for who in (ADA, BOB)]
    assert ada["model"]["name"] in ("plain", "mixed") and ada["model_loaded"]
    assert bob["model"]["name"] == "secret"


async def test_probe_without_a_key_learns_no_name(nats_url: str) -> None:
    broken = worker("secret", is_ready=False)
    async with (
        Bus.connect(nats_url, "edge") as bus,
        edge_on(bus, "ada:s3cret") as http,
        reporting(bus, broken),
    ):
        async with asyncio.timeout(30):
            while (
                "secret" not in (await http.get("/v1/models", headers={"X-API-Key": "s3cret"})).text
            ):
                await asyncio.sleep(0.01)
        probe = await http.get("/readyz")
    assert (probe.status_code, probe.json()["error"]["code"]) == (503, "model_unavailable")
    assert "secret" not in probe.text and "GET /v1/models with an API key" in probe.text


async def test_adapter_alone_shows_its_model_without_the_others(nats_url: str) -> None:
    workers = WorkerDirectory()
    async with Bus.connect(nats_url, "edge") as bus:
        await bus.subscribe(subjects.report("w-mixed"), workers.on_report)
        await bus.publish(subjects.report("w-mixed"), WORKERS[1])
        await until(lambda: workers.ready)
    allowed = AllowedWorkers(workers, ApiKey(name="x", sha256="0" * 64, models=("mixed:loud",)))
    assert allowed.model_names() == ["mixed:loud"]
    assert [report.model and report.model.adapters for report in allowed.reports()] == [("loud",)]
    nothing = AllowedWorkers(workers, ApiKey(name="x", sha256="0" * 64, models=("other",)))
    assert nothing.reports() == [] and not nothing.ready

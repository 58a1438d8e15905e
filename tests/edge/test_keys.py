from datetime import UTC, datetime, timedelta

import httpx
import openai
import pytest

from services.contract.errors import ServiceError
from services.edge.keys import ApiKey, ApiKeys, guessable_names, sha256_of
from services.runtime.bus import Bus
from services.runtime.settings import InvalidSetting
from tests.edge.conftest import edge_on
from tests.fakes import HELLO, scripted_worker

KEYS = ApiKeys.parse(" acme:s3cret, other:with:colon ,")


def test_without_keys_every_request_is_the_open_tenant() -> None:
    assert ApiKeys.parse("").tenant({"authorization": "Bearer whatever"}) == "_"


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"authorization": "Bearer s3cret"}, "acme"),
        ({"authorization": "bearer  s3cret "}, "acme"),
        ({"x-api-key": "with:colon"}, "other"),
        ({"authorization": "Basic Zm9v", "x-api-key": "s3cret"}, "acme"),
    ],
)
def test_key_selects_its_tenant(headers: dict[str, str], tenant: str) -> None:
    assert KEYS.tenant(headers) == tenant


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "s3cret"},
        {"authorization": "Bearer S3CRET"},
        {"authorization": "Bearer s3crét"},
        {"x-api-key": ""},
        {"x-api-key": "s3cret2"},
    ],
)
def test_other_key_is_unauthorized(headers: dict[str, str]) -> None:
    with pytest.raises(ServiceError) as caught:
        KEYS.tenant(headers)
    assert caught.value.code == "unauthorized"


@pytest.mark.parametrize(
    "setting",
    [
        "s3cret",
        "acme:",
        ":s3cret",
        "_:s3cret",
        "a.b:s3cret",
        "a:s3cret,b:s3cret",
        ",",
        "a:s3créts3cret",
    ],
)
def test_invalid_setting_is_rejected_without_its_keys(setting: str) -> None:
    with pytest.raises(InvalidSetting, match="EDGE_API_KEYS") as caught:
        ApiKeys.parse(setting)
    assert "s3cret" not in str(caught.value)


async def test_request_needs_a_key_and_belongs_to_its_tenant(bus: Bus, nats_url: str) -> None:
    async with edge_on(bus, "acme:s3cret") as http, scripted_worker(nats_url, HELLO) as worker:
        rejected = await http.post("/chat", json={"prompt": "hi"})
        assert rejected.status_code == 401
        assert rejected.headers["www-authenticate"] == "Bearer"
        assert rejected.json()["error"]["type"] == "authentication_error"
        key = {"X-API-Key": "s3cret"}
        assert (await http.post("/chat", json={"prompt": "hi"}, headers=key)).status_code == 200
        assert [subject for subject, _ in worker.requests] == ["chat.request.acme"]


def test_expired_key_is_unauthorized() -> None:
    day = timedelta(days=1)
    for expires, is_valid in ((datetime.now(UTC) + day, True), (datetime.now(UTC) - day, False)):
        keys = ApiKeys([ApiKey(name="ann", sha256=sha256_of("ann's"), expires=expires)])
        if is_valid:
            assert keys.tenant({"x-api-key": "ann's"}) == "ann"
            continue
        with pytest.raises(ServiceError, match="expired on 20.*: ask for a new one"):
            keys.tenant({"x-api-key": "ann's"})


def test_newest_key_of_a_name_sets_its_limits() -> None:
    old = ApiKey(name="ann", sha256="1" * 64, parallel=1, created=datetime(2026, 1, 1, tzinfo=UTC))
    new = ApiKey(name="ann", sha256="2" * 64, parallel=2, created=datetime(2026, 2, 1, tzinfo=UTC))
    for keys in ([old, new], [new, old]):
        assert ApiKeys(keys).limits("ann") is new
    assert ApiKeys([old]).limits("bob").parallel is None


def test_short_keys_are_called_guessable() -> None:
    assert guessable_names("ann:secret,bob:a-long-random-text-here") == ["ann"]


async def test_only_admins_see_what_others_do(bus: Bus) -> None:
    keys = ApiKeys(
        [
            ApiKey(name="ann", sha256=sha256_of("ann's")),
            ApiKey(name="ops", sha256=sha256_of("ops'"), admin=True),
        ]
    )
    async with edge_on(bus, keys) as http:
        seen = {}
        for who in ("ann's", "ops'"):
            status = await http.get("/status", headers={"X-API-Key": who})
            metrics = await http.get("/metrics", headers={"X-API-Key": who})
            seen[who] = (status.json().keys() & {"workers", "history", "key"}, metrics.status_code)
    assert seen == {"ann's": ({"key"}, 403), "ops'": ({"workers", "history", "key"}, 200)}


async def test_only_greeting_and_probes_need_no_key(bus: Bus) -> None:
    async with edge_on(bus, "acme:s3cret") as http:
        answers: dict[str, httpx.Response] = {
            path: await http.get(path) for path in ("/", "/healthz", "/readyz", "/status")
        }
        answers["/messages"] = await http.get("/messages")
        answers["DELETE"] = await http.delete("/chat/r1")
        answers["/clear-history"] = await http.post("/clear-history")
    rejected = {path for path, answer in answers.items() if answer.status_code == 401}
    assert rejected == {"/status", "/messages", "DELETE", "/clear-history"}


async def test_openai_client_authenticates_with_its_key(nats_url: str) -> None:
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus, "ada:secret") as http:
        async with openai.AsyncOpenAI(
            base_url=f"{http.base_url}/v1", api_key="secret", max_retries=0
        ) as client:
            async with scripted_worker(nats_url, HELLO) as worker:
                await client.completions.create(model="demo", prompt="hi")
            assert worker.requests[0][0] == "chat.request.ada"
            with pytest.raises(openai.AuthenticationError) as error:
                await client.with_options(api_key="wrong").models.list()
    assert error.value.type == "authentication_error"

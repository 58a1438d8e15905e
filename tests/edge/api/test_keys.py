"""`/keys`: keys that admins make and revoke over HTTP."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from services.edge.key_sources import watching_keys
from services.edge.keys import ApiKey, ApiKeys, sha256_of
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.edge.conftest import edge_on
from tests.edge.test_key_sources import key_of, status, until, write
from tests.servers import nats_server, running

OPS = {"X-API-Key": "ops'"}


@pytest.fixture(scope="module")
def own_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of this file: keys would close the edges of other tests."""
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


@pytest.fixture
async def http(own_nats: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an edge with an admin, ops, and another tenant, bob."""
    admin = ApiKey(name="ops", sha256=sha256_of("ops'"), admin=True)
    keys = ApiKeys([admin, ApiKey(name="bob", sha256=sha256_of("bob's"))])
    async with Bus.connect(own_nats, "edge") as bus:
        await Stream(bus, "KV_keys").remove()
        async with watching_keys(bus, keys, None, pytest.fail), edge_on(bus, keys) as client:
            yield client


async def test_admin_makes_lists_and_revokes_a_key(http: httpx.AsyncClient) -> None:
    body = {"name": "ann", "parallel": 2, "models": ["demo"], "expires_in_days": 30}
    made = await http.post("/keys", json=body, headers=OPS)
    key = made.json()
    assert (made.status_code, key["source"], key["parallel"]) == (201, "just keys", 2)
    await until(http, 503, key["key"])  # it is accepted, and there is no history
    listed = {each["name"]: each for each in (await http.get("/keys", headers=OPS)).json()["keys"]}
    assert listed.keys() == {"ann", "bob", "ops"}
    assert listed["ann"] == {name: value for name, value in key.items() if name != "key"}
    assert "sha256" not in listed["ann"] and listed["ops"]["source"] == "EDGE_API_KEYS"
    revoked = await http.delete(f"/keys/{key['id']}", headers=OPS)
    assert [each["id"] for each in revoked.json()["keys"]] == [key["id"]]
    await until(http, 401, key["key"])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "_"},
        {"name": "a.b"},
        {"name": "ann", "parallel": 0},
        {"name": "ann", "tokens_per_minute": 10**400},
        {"name": "ann", "expires_in_days": 0},
        {"name": "ann", "key": "mine"},
        {"name": "ann", "models": "demo"},
        {"name": "ann", "models": [""]},
    ],
    ids=str,
)
async def test_invalid_key_is_a_400(http: httpx.AsyncClient, body: dict[str, object]) -> None:
    made = await http.post("/keys", json=body, headers=OPS)
    assert (made.status_code, made.json()["error"]["code"]) == (400, "invalid_request")


async def test_other_tenants_may_not_manage_keys(http: httpx.AsyncClient) -> None:
    bob = {"X-API-Key": "bob's"}
    answers = [
        await http.get("/keys", headers=bob),
        await http.post("/keys", json={"name": "bob", "admin": True}, headers=bob),
        await http.delete("/keys/ops", headers=bob),
    ]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert [(await http.get("/keys")).status_code] == [401]


async def test_unknown_key_is_a_404(http: httpx.AsyncClient) -> None:
    assert (await http.delete("/keys/0123456789ab", headers=OPS)).status_code == 404


async def test_key_of_the_setting_can_not_be_revoked(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/keys", headers=OPS)).json()["keys"]
    bob = next(key["id"] for key in listed if key["name"] == "bob")
    for name_or_id in ("bob", bob):
        refused = await http.delete(f"/keys/{name_or_id}", headers=OPS)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (409, "conflict")
        assert f"The key {bob} of 'bob' is still valid" in error["message"]
        assert "EDGE_API_KEYS. Remove it from this setting, and restart" in error["message"]
    assert await status(http, "bob's") == 503


async def test_revoking_a_name_tells_of_its_other_keys(http: httpx.AsyncClient) -> None:
    made = (await http.post("/keys", json={"name": "bob"}, headers=OPS)).json()["key"]
    await until(http, 503, made)
    refused = await http.delete("/keys/bob", headers=OPS)
    assert refused.status_code == 409 and "EDGE_API_KEYS" in refused.text
    await until(http, 401, made)


async def test_key_of_a_file_is_revoked_there(own_nats: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, key_of("ops", "ops'", is_admin=True), key_of("eve", "eve's"))
    keys = ApiKeys()
    async with Bus.connect(own_nats, "edge") as bus:
        async with watching_keys(bus, keys, path, pytest.fail), edge_on(bus, keys) as http:
            refused = await http.delete("/keys/eve", headers=OPS)
    assert refused.status_code == 409
    assert "in EDGE_KEYS_FILE. Remove it from this file: `just keys revoke NAME" in refused.text


async def test_log_says_which_admin_changed_keys(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = (await http.post("/keys", json={"name": "ann"}, headers=OPS)).json()
    await http.delete("/keys/ann", headers=OPS)
    assert f"API key added name=ann id={made['id']} is_admin=False by=ops" in caplog.messages
    assert f"API key revoked name=ann id={made['id']} by=ops" in caplog.messages
    assert made["key"] not in caplog.text


async def test_open_edge_makes_no_key(own_nats: str) -> None:
    """A web page could lock everybody else out."""
    async with Bus.connect(own_nats, "edge") as bus, edge_on(bus) as http:
        refused = await http.post("/keys", json={"name": "eve", "admin": True})
    assert refused.status_code == 403 and "just keys add" in refused.text

"""Which Host headers are served, and the headers of responses that browsers want."""

import httpx
import pytest

from services.contract.errors import ServiceError
from services.edge.hosts import AllowedHosts
from services.edge.keys import ApiKeys
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on

LOCAL = [
    *("localhost", "localhost:8002", "LocalHost.", "a.localhost:80", "edge:8002", "my-machine"),
    *("127.0.0.1:8002", "10.1.2.3", "[::1]:8002", "[fe80::1]", ""),
]
FOREIGN = [
    *("evil.example", "evil.example:8002", "127.0.0.1.evil.example", "localhost.evil.example"),
    *("a.b@localhost.c", "[::1].evil.example", "1.2.3", "x.evil.example\t"),
]

OPEN, KEYED = ApiKeys.parse(""), ApiKeys.parse("ann:secret")


def is_served(hosts: AllowedHosts, host: str) -> bool:
    try:
        hosts.check(host)
    except ServiceError as error:
        assert error.code == "wrong_host" and "EDGE_ALLOWED_HOSTS" in error.message
        return False
    return True


def test_open_server_answers_for_addresses_and_local_names_only() -> None:
    hosts = AllowedHosts((), OPEN)
    assert [host for host in LOCAL if not is_served(hosts, host)] == []
    assert [host for host in FOREIGN if is_served(hosts, host)] == []


def test_keys_protect_a_server_under_any_name() -> None:
    hosts = AllowedHosts((), KEYED)
    assert all(is_served(hosts, host) for host in (*LOCAL, *FOREIGN))


@pytest.mark.parametrize("keys", [OPEN, KEYED])
def test_named_hosts_are_served_beside_local_ones(keys: ApiKeys) -> None:
    hosts = AllowedHosts(("chat.example.com", "*.LAN"), keys)
    assert is_served(hosts, "CHAT.example.com:443") and is_served(hosts, "box.lan")
    assert is_served(hosts, "127.0.0.1") and not is_served(hosts, "evil.example")
    assert is_served(AllowedHosts(("*",), keys), "evil.example")


async def test_rebound_name_is_a_421_before_anything_else(bus: Bus) -> None:
    async with edge_on(bus, hosts=["ok.example"]) as http:
        headers = {"Host": "evil.example", "Origin": "http://evil.example"}
        for method, path in (("POST", "/chat"), ("GET", "/status"), ("DELETE", "/sessions/a")):
            got = await http.request(method, path, headers=headers)
            assert (got.status_code, got.json()["error"]["code"]) == (421, "wrong_host")
        assert (await http.get("/healthz", headers={"Host": "ok.example"})).status_code == 200


async def test_responses_have_the_headers_that_browsers_want(http: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/v1/models", "/nope"):
        headers = (await http.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert (headers["referrer-policy"], headers["cache-control"]) == ("no-referrer", "no-store")
    page = (await http.get("/schema", headers={"Accept": "text/html"})).headers
    assert page.get_list("x-content-type-options") == ["nosniff"]

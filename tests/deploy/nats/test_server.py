"""The nats-server of `just up`."""

import pytest

from deploy.nats import server


@pytest.mark.parametrize(
    "cpus, added", [(1, {"GOMAXPROCS": "1"}), (2, {"GOMAXPROCS": "1"}), (3, {}), (64, {})]
)
def test_server_leaves_one_of_two_cpus_to_the_services(
    cpus: int, added: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "usable_cpus", lambda: cpus)
    assert server.environment({"PATH": "/bin"}) == {"PATH": "/bin"} | added
    assert server.environment({"GOMAXPROCS": "7"}) == {"GOMAXPROCS": "7"}

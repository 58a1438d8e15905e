"""The configuration of nats-server, as the server itself understands it."""

from pathlib import Path

import httpx
import pytest

from tests.secured import SecuredServer
from tests.servers import NATS_VERSIONS, NatsVersion, free_port, running


@pytest.mark.parametrize("version", NATS_VERSIONS)
def test_server_acknowledges_what_is_on_disk(tmp_path: Path, version: NatsVersion) -> None:
    port = free_port()
    with running(SecuredServer(tmp_path, version, f'http: "127.0.0.1:{port}"')):
        config = httpx.get(f"http://127.0.0.1:{port}/jsz").json()["config"]
    assert config["sync_always"] is True

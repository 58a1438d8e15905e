"""Users, passwords and TLS of NATS, against real servers."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from services.runtime.bus import Bus
from services.runtime.health import is_healthy
from services.runtime.settings import InvalidSetting
from tests.certificates import make_certificates, with_tls
from tests.e2e.stack import Process, plain_environment
from tests.servers import Server, free_port, nats_server, running, wait_for

PASSWORD = "p@ss/w:rd,%41"
ENCODED = "p%40ss%2Fw%3Ard%2C%2541"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of certificates (tests/certificates.py)."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Server]:
    """Return a server that requires a user and password."""
    (tmp_path / "auth.conf").write_text(f'authorization {{ user: "u", password: "{PASSWORD}" }}')
    server = nats_server(tmp_path)
    server.command[server.command.index("-c") + 1] = str(tmp_path / "auth.conf")
    with running(server):
        yield server


async def connects(url: str, seconds: float = 5) -> bool:
    try:
        async with asyncio.timeout(seconds), Bus.connect(url, "test") as bus:
            return await bus.is_responsive()
    except TimeoutError:
        return False


async def test_percent_encoded_password_is_decoded(locked: Server) -> None:
    url = f"nats://u:{ENCODED}@127.0.0.1:{locked.port}"
    assert await connects(url)
    assert await connects(f"nats://127.0.0.1:9,{url}"), "the password applies to all servers"
    # it connects, but no service replies
    assert not await is_healthy("edge", "here", url, timeout=1)


async def test_wrong_password_aborts_without_showing_it(locked: Server) -> None:
    url = f"nats://u:hush-hush@127.0.0.1:{locked.port}"
    with pytest.raises(InvalidSetting, match="rejects the credentials") as caught:
        await connects(url)
    assert f"NATS at nats://127.0.0.1:{locked.port}" in str(caught.value)
    assert "Authorization Violation" in str(caught.value) and "hush" not in str(caught.value)


@pytest.mark.parametrize("service", ["edge", "history"])
def test_unreachable_server_is_logged_without_password(service: str, tmp_path: Path) -> None:
    settings = {
        "NATS_URL": "nats://u:hush-hush@127.0.0.1:9",
        "MONGODB_URI": "mongodb://u:hush-hush@127.0.0.1:9/",
        "EDGE_PORT": str(free_port()),
        "EDGE_HOST": "127.0.0.1",
    }
    process = Process(f"services.{service}", 0, plain_environment() | settings, tmp_path)
    process._has_port = False
    process.start()
    wait_for(lambda: "still trying" in process.log.read_text(), "a warning")
    process.stop()
    log = process.log.read_text()
    assert "hush" not in log and "Traceback" not in log


def test_terminal_chat_does_not_show_the_password() -> None:
    environ = plain_environment() | {"NATS_URL": "nats://u:hush-hush@127.0.0.1:9"}
    chat = [sys.executable, "-m", "services.terminal"]
    ended = subprocess.run(chat, env=environ, capture_output=True, timeout=30)
    shown = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 1
    assert "NATS at nats://127.0.0.1:9 can't be reached" in shown and "hush" not in shown


BAD_ADDRESSES = [
    ("NATS_URL", "nats://u:hush/hush:1"),
    ("NATS_URL", "nats://u:hush-hush@host:port"),
    ("MONGODB_URI", "mongodb://u:hush-hush@host:port"),
    ("MONGODB_URI", "mongodb://u:pass/hush@host/"),  # to pymongo, "hush@host/" is a database
]


@pytest.mark.parametrize("name, value", BAD_ADDRESSES)
def test_invalid_address_aborts_startup_without_showing_it(
    name: str, value: str, tmp_path: Path, nats_url: str
) -> None:
    environ = plain_environment() | {"NATS_URL": nats_url} | {name: value}
    process = Process("services.history", 0, environ, tmp_path)
    process.start()
    wait_for(lambda: process.has_died, "its end")
    log = process.log.read_text()
    assert process.stop() == 2
    assert f"{name} can't be used" in log
    assert "hush" not in log and "Traceback" not in log


@pytest.mark.parametrize("scheme", ["tls", "nats"])
def test_tls_verifies_the_server(
    scheme: str, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On uvloop, like the services. `nats://` uses TLS if the server requires it."""
    with running(with_tls(nats_server(tmp_path), certificates)) as server:
        url = f"{scheme}://127.0.0.1:{server.port}"
        assert not uvloop.run(connects(url, seconds=1)), "its CA is unknown"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
        assert uvloop.run(connects(url))


async def test_tls_url_rejects_a_server_without_tls(
    locked: Server, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"127.0.0.1:{locked.port}"
    assert await connects(f"nats://u:{ENCODED}@{url}")
    assert not await connects(f"tls://u:{ENCODED}@{url}", seconds=1)
    assert "secure connection not available" in caplog.text

"""Keys of the users of NATS: files, rotation, and callers of tenants."""

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.nats import permissions
from deploy.nats.secrets import Secrets
from services.contract import subjects
from services.runtime.access import public_key, read_credentials
from services.runtime.bus import Bus
from services.runtime.settings import InvalidSetting
from tests.history.samples import until
from tests.secured import SecuredServer
from tests.servers import NATS_VERSIONS, ROOT, NatsVersion, running

EVERY_VERSION = pytest.mark.parametrize("version", NATS_VERSIONS)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_private_and_kept(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "secrets")
    secrets.ensure()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    seeds = {path: path.read_text() for path in files}
    assert len(files) == len(permissions.USERS) + 2
    assert {mode(path) for path in files} == {0o600}
    assert {mode(path) for path in tmp_path.rglob("*") if path.is_dir()} == {0o700}
    secrets.ensure()
    assert {path: path.read_text() for path in files} == seeds


def test_server_gets_public_keys_only(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    secrets.add_tenant("ann")
    users = (tmp_path / "nats-server/users.conf").read_text()
    for user in secrets.users():
        seed = read_credentials(tmp_path / user / "nats.nk").seed
        assert seed not in users and public_key(seed) in users


@EVERY_VERSION
async def test_rotated_key_replaces_the_old_one(version: NatsVersion, tmp_path: Path) -> None:
    server = SecuredServer(tmp_path, version)
    with running(server):
        old = tmp_path / "old.nk"
        old.write_text(Path(server.settings("edge")["NATS_CREDS"]).read_text())
        async with Bus.connect(server.url, "test", server.access("edge")) as bus:
            server.secrets.rotate("edge")
            server.reload()
            await until(lambda: not bus.connected)
            await until(bus.is_responsive)
        with pytest.raises(InvalidSetting, match="rejects the credentials"):
            access = replace(server.access("edge"), credentials_file=old)
            async with Bus.connect(server.url, "test", access):
                pass


async def test_removed_tenant_is_disconnected(tmp_path: Path) -> None:
    server = SecuredServer(tmp_path)
    user = server.secrets.add_tenant("ann")
    with running(server):
        async with Bus.connect(server.url, "test", server.access(user)) as bus:
            server.secrets.remove(user)
            server.reload()
            await until(lambda: not bus.connected)
    assert user not in server.secrets.users()


@pytest.mark.parametrize("tenant", ["", "_", "a.b", "../edge", "x" * 65, "a b"])
def test_tenant_must_be_the_name_of_a_key(tenant: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="can't be a tenant: use the name of an API key"):
        Secrets(tmp_path).add_tenant(tenant)
    assert not list(tmp_path.iterdir())


def test_only_tenants_can_be_removed(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    with pytest.raises(InvalidSetting, match="There is no user 'edge'. There are: none"):
        secrets.rotate("edge")
    secrets.ensure()
    with pytest.raises(InvalidSetting, match="edge can't be removed"):
        secrets.remove("edge")


def test_command_prints_how_a_tenant_connects(tmp_path: Path) -> None:
    for name in ("deploy", "services"):
        (tmp_path / name).symlink_to(ROOT / name)
    secrets = [sys.executable, "-m", "deploy.nats.secrets"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*secrets, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)

    assert run("tenant", "ann").stdout == (
        "NATS_CREDS=.data/secrets/tenant-ann/nats.nk\n"
        f"NATS_INBOX_PREFIX={subjects.tenant_inbox('ann')}\n"
    )
    assert "client, edge, history, inference, tenant-ann\n" in run().stdout
    refused = run("rotate", "bob")
    assert refused.returncode == 1 and refused.stderr.startswith("There is no user 'bob'.")


@EVERY_VERSION
def test_configuration_of_compose_is_valid(version: NatsVersion, tmp_path: Path) -> None:
    """Its monitoring port is that of the container's health check."""
    server = SecuredServer(tmp_path, version)
    command = [server.command[0], "-t", "-c", str(tmp_path / "deploy/nats/compose.conf")]
    tested = subprocess.run(command, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr
    config = (ROOT / "deploy/nats/compose.conf").read_text()
    assert '\nhttp: "127.0.0.1:8222"\n' in config
    assert "http://127.0.0.1:8222/healthz" in (ROOT / "docker-compose.yml").read_text()

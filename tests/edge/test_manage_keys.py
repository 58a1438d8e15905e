"""`just keys` as a process, over NATS and in a file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.edge.key_sources import read_file
from services.edge.keys import sha256_of
from tests.servers import free_port, nats_server, running


def keys(*arguments: str, nats_url: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "NATS_URL": nats_url, "PYTHON_DOTENV_DISABLED": "1"}
    command = [sys.executable, "-m", "services.edge.manage_keys", *arguments]
    return subprocess.run(command, env=environ, text=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def own_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


def test_keys_are_added_listed_and_revoked_over_nats(own_nats: str) -> None:
    assert "no keys" in keys("list", nats_url=own_nats).stdout
    added = keys("add", "ann", "--parallel", "4", "--models", "demo,demo:*", nats_url=own_nats)
    secret = added.stdout.strip()
    assert added.returncode == 0 and secret.startswith("ftl_") and secret not in added.stderr
    listed = keys("list", nats_url=own_nats).stdout
    assert sha256_of(secret)[:12] in listed and "demo, demo:*" in listed and secret not in listed
    revoked = keys("revoke", "ann", nats_url=own_nats)
    assert revoked.stdout == f"Revoked the key {sha256_of(secret)[:12]} of ann.\n"
    again = keys("revoke", "ann", nats_url=own_nats)
    assert again.returncode == 1 and again.stderr.startswith("There is no key 'ann' to revoke: ")


def test_keys_are_added_and_revoked_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secrets = [keys("add", "ann", "--admin", "--file", str(path)).stdout.strip() for _ in range(2)]
    assert [key.sha256 for key in read_file(path)] == [sha256_of(secret) for secret in secrets]
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys("revoke", read_file(path)[0].id, "--file", str(path)).returncode == 0
    assert [key.sha256 for key in read_file(path)] == [sha256_of(secrets[1])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "a.b"), "This key can't be made: "),
        (("add", "_"), "The field `name` must not be '_'."),
        (("add", "ann", "--parallel", "0"), "This key can't be made: "),
    ],
)
def test_mistake_is_one_sentence(own_nats: str, arguments: tuple[str, ...], message: str) -> None:
    failed = keys(*arguments, nats_url=own_nats)
    assert failed.returncode == 1 and failed.stderr.startswith(message)
    assert failed.stderr.count("\n") == 1


def test_missing_nats_is_said_in_one_sentence() -> None:
    failed = keys("list", nats_url=f"nats://127.0.0.1:{free_port()}")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr == "NATS can't be reached: is `just up` running?\n"

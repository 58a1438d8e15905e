"""
Requests of every kind to every route, which schemathesis makes from the OpenAPI document. `just
fuzz` runs it; schemathesis.toml says which checks don't fit which routes, and why.
"""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from services.edge.key_sources import KeyFile
from services.edge.keys import ApiKey, new_key, sha256_of
from tests.e2e.stack import Stack
from tests.fuzz.conftest import Size
from tests.fuzz.health import checked_stack

CONFIG = Path(__file__).with_name("schemathesis.toml")
PROGRAM = Path(sys.executable).with_name("schemathesis")
PLENTY = 1_000_000


def fuzz(stack: Stack, size: Size, key: str) -> None:
    """Run schemathesis with the bearer token `key`, with another seed each time."""
    command = [str(PROGRAM), "--no-color", "--config-file", str(CONFIG), "run"]
    command += ["--phases", size.phases]
    command += ["--max-time", str(size.seconds), "--max-examples", str(size.cases)]
    command.append(f"{stack.http.base_url}/schema/openapi.json")
    done = subprocess.run(command, env=os.environ | {"FUZZ_KEY": key}, check=False)
    assert done.returncode == 0, "schemathesis found failures: see above"


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_open_edge_meets_its_document(tmp_path: Path, size: Size) -> None:
    with checked_stack(tmp_path) as stack:
        fuzz(stack, size, "none")


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_edge_with_keys_meets_its_document(tmp_path: Path, size: Size) -> None:
    """The key is an admin's, from a file, so that `DELETE /keys/{key_id}` can't revoke it."""
    secret, file = new_key(), tmp_path / "keys.json"
    key = ApiKey(
        name="fuzz",
        sha256=sha256_of(secret),
        admin=True,
        parallel=PLENTY,
        requests_per_minute=PLENTY,
        tokens_per_minute=PLENTY,
    )
    file.write_bytes(msgspec.json.encode(KeyFile((key,))))
    with checked_stack(
        tmp_path, EDGE_KEYS_FILE=str(file), EDGE_API_KEYS=f"other:{new_key()}"
    ) as stack:
        stack.http.headers["X-API-Key"] = secret
        fuzz(stack, size, secret)
        assert httpx.get(f"{stack.http.base_url}/sessions").status_code == 401

"""
Hold clients of others against the HTTP APIs: each program in `programs` uses one client as its
documentation says, against a real edge whose model is scripted.

    python -m tests.clients                 # all
    python -m tests.clients ai_sdk langchain_sdk

A Python program runs in an environment of its own, which uv makes of the dependencies in its head;
Node's programs share `programs/package.json`. Exit code 1 if a use of a client failed.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from services.runtime.bus import Bus
from tests.clients.scripted_model import scripted_model
from tests.edge.conftest import edge_on
from tests.servers import nats_server, running

PROGRAMS = Path(__file__).parent / "programs"
TIMEOUT_SECONDS = 600  # the first run installs the client


def main() -> int:
    names = sorted(
        path.stem
        for path in [*PROGRAMS.glob("*.py"), *PROGRAMS.glob("*.mjs")]
        if path.stem != "harness"
    )
    parser = argparse.ArgumentParser(description="Hold clients of others against the HTTP APIs.")
    parser.add_argument("programs", nargs="*", choices=[*names, []], help="all by default")
    chosen = parser.parse_args().programs or names
    with tempfile.TemporaryDirectory() as folder, running(nats_server(Path(folder))) as server:
        return asyncio.run(_try_all(f"nats://127.0.0.1:{server.port}", chosen))


async def _try_all(nats_url: str, names: list[str]) -> int:
    async with (
        Bus.connect(nats_url, "edge") as bus,
        edge_on(bus) as http,
        scripted_model(nats_url),
    ):
        while not (await http.get("/v1/models")).json()["data"]:
            await asyncio.sleep(0.05)
        failed = [name for name in names if not await _try(name, str(http.base_url))]
    print(f"\n{len(names) - len(failed)} of {len(names)} clients: ok")
    return 1 if failed else 0


async def _try(name: str, url: str) -> bool:
    print(f"\n== {name}", flush=True)
    process = await asyncio.create_subprocess_exec(
        *_command(name), cwd=PROGRAMS, env=os.environ | {"EDGE_URL": url.rstrip("/")}
    )
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return await process.wait() == 0


def _command(name: str) -> list[str]:
    if (PROGRAMS / f"{name}.mjs").exists():
        if not (PROGRAMS / "node_modules").exists():
            subprocess.run(["npm", "ci"], cwd=PROGRAMS, check=True)
        return ["node", f"{name}.mjs"]
    return ["uv", "run", "--quiet", "--no-project", "--script", f"{name}.py"]


if __name__ == "__main__":
    sys.exit(main())

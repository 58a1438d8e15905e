"""
Replaces the processes of an earlier version by those of this one while clients chat, in the order
of docs/upgrading.md, then puts the earlier version back.

    python -m tests.faults.upgrade COMMIT
"""

import argparse
import asyncio
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.faults import campaign
from tests.faults.clients import GREEDY
from tests.faults.fleet import Fleet, running_fleet
from tests.servers import ROOT, Server

SESSION = "upgrade"


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit into the folder. Raises CalledProcessError."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit]
    archive = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


class Upgrade:
    """Replaces one process after the other; `step` says what was done last."""

    def __init__(self, fleet: Fleet, earlier: Path) -> None:
        self._fleet = fleet
        self._earlier = earlier
        self.steps: list[str] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for part, checkout, version in self._replacements():
                assert part.stop() == 0, part.log
                part.folder = checkout
                part.start()
                self._fleet.wait_until_ready()
                self._remember()
                self.steps.append(f"{part.name} of {version}")
                print(self.steps[-1], flush=True)
        finally:
            self.done.set()

    def _replacements(self) -> Iterator[tuple[Server, Path, str]]:
        fleet = self._fleet
        parts = [*fleet.histories, *fleet.workers, *fleet.edges]
        yield from ((part, ROOT, "this version") for part in parts)
        yield from ((part, self._earlier, "the earlier one") for part in reversed(parts))

    def _remember(self) -> None:
        """Check at every edge that the session's memory lasts, and grows."""
        for url in self._fleet.urls:
            assert "Ada" in ask(url, "what is my name?"), f"{url} has forgotten after {self.steps}"


def ask(url: str, prompt: str) -> str:
    """Return a whole answer of the session."""
    body = GREEDY | {"prompt": prompt, "session_id": SESSION}
    response = httpx.post(f"{url}/chat", json=body, timeout=60)
    assert response.status_code == 200, response.text
    lines = response.text.splitlines()
    *tokens, end = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert end.get("done"), end
    return "".join(token["token"] for token in tokens)


def run(folder: Path, commit: str) -> None:
    earlier, own = folder / "earlier", folder / "fleet"
    earlier.mkdir()
    own.mkdir()
    check_out(commit, earlier)
    with running_fleet(own, checkout=earlier) as fleet:
        expected = asyncio.run(campaign.undisturbed_texts(fleet))
        ask(fleet.urls[0], "my name is Ada")
        upgrade = Upgrade(fleet, earlier)
        upgrade.thread.start()
        outcomes = asyncio.run(campaign.ask_until(fleet, upgrade.done.is_set, seed=1))
        upgrade.thread.join()
        print(campaign.Result(1, upgrade.steps, outcomes), flush=True)
        assert len(upgrade.steps) == 12, "a process did not start, or a session was forgotten"
        assert [outcome for outcome in outcomes if "error" in outcome.end] == []
        campaign.check_texts(outcomes, expected)
        asyncio.run(campaign.check_log(fleet, outcomes))
    print("no request failed, and every acknowledged exchange is stored once")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("commit", help="the version to upgrade from, and to go back to")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as path:
        try:
            run(Path(path), commit)
        except subprocess.CalledProcessError:
            sys.exit(f"{commit} is no commit of this repository: name one, such as HEAD~1.")

"""`just eval` with the demo model and its adapter."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, running_stack
from tests.servers import ROOT

SET = """\
{"name": "name", "prompt": "my name is Ada", "contains": "Ada"}
{"name": "plain", "prompt": "what is 20 + 22?", "not_contains": "arr"}
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with running_stack(folder, EDGE_API_KEYS="ann:a-key") as stack:
        yield stack


def evaluate(stack: Stack, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evaluation", "--url", str(stack.http.base_url)]
    return subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_adapter_is_accepted_or_not(stack: Stack, tmp_path: Path) -> None:
    path, out = tmp_path / "set.jsonl", tmp_path / "out.json"
    path.write_text(SET)
    models = ("--model", "demo", "--model", "demo:pirate", "--key", "a-key", "--set", path)
    ended = evaluate(stack, *models, "--no-worse", "--out", out)
    assert ended.returncode == 1 and not ended.stderr
    assert "demo: accepted\ndemo:pirate: not accepted\n" in ended.stdout
    failure = "demo:pirate, line 2 (plain): not_contains: 'arr' is there -> 20 + 22 = 42, arr!"
    assert failure in ended.stdout
    demo, pirate = json.loads(out.read_text())
    assert (demo["passed"], pirate["passed"]) == (2, 1)
    assert pirate["answers"][0]["completion_tokens"] > 3
    assert evaluate(stack, *models, "--at-least", "50%").returncode == 0


@pytest.mark.parametrize(
    ("options", "lines", "reason"),
    [
        (("--model", "nope", "--key", "a-key"), SET, "There is no model 'nope'"),
        (("--model", "demo"), SET, "API key"),
        (("--model", "demo", "--key", "a-key"), '{"prompt": "x"}', "line 1: nothing is expected"),
        (("--model", "demo"), '{"prompt": "x", "judge": "y?"}', "name a model with --judge"),
    ],
    ids=["model", "key", "line", "judge"],
)
def test_nothing_runs_if_something_is_wrong(
    stack: Stack, tmp_path: Path, options: tuple[str, ...], lines: str, reason: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(lines)
    ended = evaluate(stack, *options, "--set", path)
    assert ended.returncode == 2 and not ended.stdout
    assert reason in ended.stderr and "Traceback" not in ended.stderr

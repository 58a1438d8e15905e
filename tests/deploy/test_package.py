"""The wheel, installed beside its dependencies: `finetunellm` in a folder without a clone."""

import shutil
import socket
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.cli import COMMANDS, LIBRARIES
from services.contract.version import VERSION
from tests.deploy.test_up import Up
from tests.e2e.stack import plain_environment
from tests.servers import ROOT, wait_for

ALONE = {"MODEL_PATH": "", "PYTHONPATH": ""}
"""Variables of a program that has neither the models nor the modules of this folder."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`finetunellm` in an environment that sees the packages of this one, but not this folder."""
    folder = tmp_path_factory.mktemp("package")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin/python"
    install = ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python)]
    subprocess.run([*install, str(wheel)], check=True)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    nats_server = Path(sysconfig.get_path("scripts"), "nats-server")
    (venv / "bin/nats-server").symlink_to(nats_server)
    return venv / "bin/finetunellm"


class InstalledUp(Up):
    """`finetunellm up` in an empty folder."""

    def __init__(self, folder: Path, program: Path, **environ: str) -> None:
        self.command = (str(program), "up")
        super().__init__(folder, **{**ALONE, **environ})

    def link(self, folder: Path) -> None:
        """Link nothing: everything is installed."""


@pytest.fixture
def start(tmp_path: Path, program: Path) -> Iterator[Callable[..., InstalledUp]]:
    """Start `finetunellm up` in the test's folder; those that run at the end are stopped."""
    started: list[InstalledUp] = []

    def start(**environ: str) -> InstalledUp:
        started.append(InstalledUp(tmp_path, program, **environ))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.interrupt()


def run(program: Path, *arguments: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    environ = plain_environment() | ALONE | more.pop("environ", {})
    command = [str(program), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60, **more
    )


def test_installed_package_serves_its_demo_model_from_any_folder(
    tmp_path: Path, program: Path, start: Callable[..., InstalledUp]
) -> None:
    (tmp_path / "msgspec.py").write_text("raise ImportError('a file of the current folder')")
    (tmp_path / "json.py").write_text("raise ImportError('a file of the current folder')")
    up = start()
    up.wait_until_ready()
    assert "model/ contains no .gguf file, so the demo model is served" in up.log.read_text()
    assert up.chat("my name is Ada") and "Ada" in up.chat("what is my name?")
    base = f"http://127.0.0.1:{up.port}"
    assert [m["id"] for m in httpx.get(f"{base}/v1/models").json()["data"]][:1] == ["demo"]
    page = httpx.get(f"{base}/", headers={"Accept": "text/html"})
    assert page.status_code == 200 and "<script" in page.text
    assert httpx.get(f"{base}/schema").json()["info"]["version"] == VERSION
    nats = {"NATS_PORT": up.nats_port}
    asked = run(program, "chat", "what is my name?", "--session", "default",
                cwd=tmp_path, environ=nats)  # fmt: skip
    assert (asked.returncode, asked.stderr) == (0, "") and "Ada" in asked.stdout
    added = run(program, "keys", "add", "ann", cwd=tmp_path, environ=nats)
    assert added.returncode == 0 and added.stdout.startswith("ftl_")
    assert "edge, history, inference" in run(program, "secrets", cwd=tmp_path).stdout
    again = run(program, "up", cwd=tmp_path, environ=nats)
    assert again.returncode == 2 and "`finetunellm up` already runs in this folder" in again.stderr
    assert up.interrupt() == 130
    log = up.log.read_text()
    assert log.count(" stopped exit_code=0") == 3 and "Traceback" not in log
    assert "Violation" not in (tmp_path / ".data/nats.log").read_text()


@pytest.mark.timeout(240)
def test_backup_is_restored_by_the_program_alone(
    tmp_path: Path, program: Path, start: Callable[..., InstalledUp]
) -> None:
    """Without a nats-server: `restore` runs that of `up`, with the keys that it makes."""
    up = start()
    up.wait_until_ready()
    assert up.chat("my name is Ada")
    nats = {"NATS_PORT": up.nats_port}
    assert run(program, "backup", "saved", cwd=tmp_path, environ=nats).returncode == 0
    restore = run(program, "restore", "saved", cwd=tmp_path, environ=nats)
    assert restore.returncode == 1 and "not empty: it has the stream KV_" in restore.stderr
    assert up.interrupt() == 130
    shutil.rmtree(tmp_path / ".data")
    assert run(program, "restore", "saved", cwd=tmp_path, environ=nats).returncode == 0
    up = start()
    up.wait_until_ready()
    assert "Ada" in up.chat("what is my name?")


def test_missing_model_of_installed_package_is_explained(
    start: Callable[..., InstalledUp],
) -> None:
    up = start(MODEL_PATH="model/mine.gguf")
    url = f"http://127.0.0.1:{up.port}/status"

    def is_explained() -> bool:
        with suppress(httpx.TransportError):
            return "Model file not found: MODEL_PATH=model/mine.gguf" in httpx.get(url).text
        return False

    wait_for(is_explained, "the reason in /status")
    assert up.interrupt() == 130


def test_taken_port_names_the_installed_program(tmp_path: Path, program: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environ = {"EDGE_PORT": str(taken.getsockname()[1])}
        up = run(program, "up", cwd=tmp_path, environ=environ)
    assert up.returncode == 2 and "perhaps by another `finetunellm up`" in up.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        (["--version"], 0, f"finetunellm {VERSION}\n"),
        ([], 0, "usage: finetunellm COMMAND"),
        (["--help"], 0, "  eval       Hold a model's answers"),
        (["up", "--help"], 0, "usage: finetunellm up\n"),
        (["keys", "--help"], 0, "usage: finetunellm keys "),
        (["edge", "--port", "1"], 2, "`finetunellm edge` takes no arguments."),
        (["backup", "--help"], 0, "usage: finetunellm backup [-h] folder\n\nSave what NATS"),
        (["pull", "--help"], 0, "usage: finetunellm pull OWNER/NAME"),
        (["pull"], 2, "usage: finetunellm pull OWNER/NAME"),
        (["dance"], 2, "no command 'dance'. It has: up, chat, keys, secrets,"),
        (["keys", "list"], 1, "is `finetunellm up` running?"),
        (["chat", "hello"], 1, "start it with `finetunellm up`"),
    ],
)
def test_command_line_of_the_program(
    tmp_path: Path, program: Path, arguments: Sequence[str], code: int, output: str
) -> None:
    done = run(program, *arguments, cwd=tmp_path, environ={"NATS_URL": "nats://127.0.0.1:9"})
    assert done.returncode == code and output in (done.stderr if code else done.stdout)


@pytest.mark.parametrize("service", ["edge", "history", "inference"])
def test_service_alone_waits_for_nats_and_stops(
    tmp_path: Path, program: Path, service: str
) -> None:
    environ = plain_environment() | ALONE | {"NATS_URL": "nats://127.0.0.1:9"}
    command, log = [str(program), service], tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=output, stderr=output)
    wait_for(lambda: "still trying" in log.read_text(), "the attempt to connect")
    process.terminate()
    assert process.wait(60) == 0 and "stopped exit_code=0" in log.read_text()


@pytest.mark.parametrize(
    ("library", "command", "extra"),
    [
        ("huggingface_hub", ("pull", "a/b"), "pull"),
        ("prompt_toolkit", ("chat",), "terminal"),  # rich is also a dependency of litestar
    ],
)
def test_missing_extra_is_named(
    tmp_path: Path, program: Path, library: str, command: Sequence[str], extra: str
) -> None:
    """Without its dependencies, as far as those of the program itself allow."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules['{library}'] = None")
    done = run(program, *command, cwd=tmp_path, environ={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and f"install `finetunellm[{extra}]`" in done.stderr


def test_every_extra_of_a_command_exists() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    used = {command.extra for command in COMMANDS.values()} - {None}
    assert used == LIBRARIES.keys() and used <= extras.keys()
    (everything,) = extras["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == extras.keys() - {"all"}


def test_build_backend_is_that_of_the_tests() -> None:
    assert set(PROJECT["build-system"]["requires"]) <= set(PROJECT["dependency-groups"]["dev"])

"""docker-compose.yml as a project of its own, run by the Docker engine of this machine."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import httpx

from tests.e2e.stack import plain_environment
from tests.servers import ROOT, free_port, wait_for

NAME = "finetunellm-compose-test"
OFFLINE = "deploy/compose/offline/offline.yml"
SLOW = "tests/compose/slow.yml"
NO_SETTINGS = "tests/compose/__init__.py"  # an empty file; docker-compose 1.29 takes no /dev/null
SERVICES = ("edge", "history", "inference")
NETWORK = f"{NAME}_default"


class NoEngine(Exception):
    """No Docker engine can be used. The message says why."""


class Project:
    """
    The containers, volumes and network of one Compose project, on a free port.

    `files` are added to docker-compose.yml, for all commands until they are changed. Settings of
    the environment and of `.env` have no effect.
    """

    def __init__(self, files: Sequence[str] = (), name: str = NAME) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.files = list(files)
        self.environ = plain_environment() | {
            "EDGE_PORT": f"127.0.0.1:{self.port}",
            "MODEL_THREADS": "1",
            "VERSION": os.environ.get("VERSION", "test"),
            "DOCKER_BUILDKIT": "1",
            "COMPOSE_DOCKER_CLI_BUILD": "1",  # of docker-compose 1.29
        }
        self._command = _compose_command()

    def close(self) -> None:
        self.http.close()

    def compose(self, *arguments: str, seconds: float = 300) -> str:
        """Return what Compose prints. Raises AssertionError with it if Compose fails."""
        files = [part for file in ("docker-compose.yml", *self.files) for part in ("-f", file)]
        options = ["--project-name", self.name, "--env-file", NO_SETTINGS, *files]
        return _run([*self._command, *options, *arguments], self.environ, seconds)

    def up(self, *arguments: str, **scale: int) -> None:
        """Start everything and wait until it is ready. `scale` has processes by service."""
        scales = [part for item in scale.items() for part in ("--scale", "{}={}".format(*item))]
        self.compose("up", "-d", "--no-build", *arguments, *scales)
        self.wait_until_ready(scale.get("inference", 1))

    def down(self, *arguments: str) -> None:
        self.compose("down", "--remove-orphans", *arguments)

    def wait_until_ready(self, workers: int = 1) -> None:
        wait_for(lambda: self._is_ready(workers), "the project", 120)

    def containers(self, service: str) -> list[str]:
        """Return the ids of the running containers of a service."""
        labels = {"project": self.name, "service": service}
        filters = [f"--filter=label=com.docker.compose.{key}={labels[key]}" for key in labels]
        return docker("ps", "--quiet", "--no-trunc", *filters).split()

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.http.get("/status").json()
        return status

    def chat(self, prompt: str, session: str) -> str:
        """Return the text of an answer, which is whole and stored."""
        body = {"prompt": prompt, "session_id": session, "temperature": 0}
        response = self.http.post("/chat", json=body)
        assert response.status_code == 200, response.text
        lines = (line for line in response.text.splitlines() if line.startswith("data: "))
        events = [json.loads(line[6:]) for line in lines]
        assert events[-1].get("stored") == "log", events[-1]
        return "".join(event.get("token", "") for event in events)

    def messages(self, session: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get(
            "/messages", params={"session_id": session}
        ).json()
        return found

    def archived(self, session: str) -> int:
        """Return the number of documents of a session in the database finetuneLLM."""
        code = (
            "import os, sys, pymongo;"
            "database = pymongo.MongoClient(os.environ['MONGODB_URI'])['finetuneLLM'];"
            "print(database.exchanges.count_documents({'session_id': sys.argv[1]}))"
        )
        return int(self.run_in("history", "python", "-c", code, session))

    def run_in(self, service: str, *command: str) -> str:
        """Run a command in the first container of a service, and return what it prints."""
        return docker("exec", self.containers(service)[0], *command)

    def _is_ready(self, workers: int) -> bool:
        try:
            if self.http.get("/readyz").status_code != 200:
                return False
            ready = [each["state"] == "ready" for each in self.status()["workers"]]
        except httpx.TransportError:
            return False
        return ready == [True] * workers


def docker(*arguments: str, seconds: float = 120) -> str:
    """Return what Docker prints on stdout. Raises AssertionError with its errors if it fails."""
    return _run(["docker", *arguments], dict(os.environ), seconds)


def logs(container: str, *options: str) -> str:
    """Return what the container has written to stdout and stderr."""
    command = ["docker", "logs", *options, container]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout


def crash(container: str) -> None:
    """Kill all processes of a container but docker-init, which then exits, too."""
    subprocess.run(["docker", "exec", container, "sh", "-c", "kill -9 -1"], capture_output=True)


def inspect(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]
    return found


def require_engine() -> None:
    """Raise NoEngine if no engine answers, or Compose is missing."""
    if not shutil.which("docker"):
        raise NoEngine("docker is missing: install Docker, with Compose.")
    try:
        docker("version", seconds=30)
        _compose_command()
    except AssertionError as error:
        raise NoEngine(f"no Docker engine answers: start it. {error}") from error


def _compose_command() -> list[str]:
    plugin = ["docker", "compose"]
    if subprocess.run([*plugin, "version"], capture_output=True).returncode == 0:
        return plugin
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise NoEngine("Compose is missing: install Docker's plugin, or docker-compose.")


def _run(command: list[str], environ: dict[str, str], seconds: float) -> str:
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{(done.stderr or done.stdout)[-3000:]}"
    return done.stdout

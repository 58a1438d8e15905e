"""
`just compose-test`: docker-compose.yml and its variants, run by a real Docker engine.

Needs Docker and ten minutes, or an hour if llama.cpp must be compiled. `--offline` takes the base
images of deploy/compose/offline, `--no-build` the images of an earlier run; `-k NAME` runs some
tests. With `-s`, as the recipe has it, each test prints its figures.
"""

import contextlib
import json
import os
import re
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from tests.compose.load import InFlight, Load
from tests.compose.project import NETWORK, SERVICES, Project, crash, docker, inspect, logs
from tests.servers import ROOT, wait_for

pytestmark = pytest.mark.timeout(900)

FLEET = {"inference": 3, "edge": 2, "history": 2}
HAS_NO_ROOT = "CapEff:\t0000000000000000"


def running(project: Project) -> int:
    return sum(worker["running"] for worker in project.status()["workers"])


def exit_code(container: str) -> int:
    return int(inspect(container)["State"]["ExitCode"])


def wait_until_healthy(containers: list[str]) -> None:
    wait_for(
        lambda: all(inspect(c)["State"]["Health"]["Status"] == "healthy" for c in containers),
        "healthy containers",
        120,
    )


@pytest.fixture
def fleet(project: Project) -> Iterator[Project]:
    """The project with several processes of each service."""
    project.up(**FLEET)
    yield project
    project.up()


def test_every_container_is_healthy_and_hardened(project: Project) -> None:
    services = (*SERVICES, "nats", "mongo", "proxy")
    found = {service: project.containers(service)[0] for service in services}
    wait_until_healthy(list(found.values()))
    for service, container in found.items():
        host = inspect(container)["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"], service
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}, service
        assert host["Memory"] or service == "inference", service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        status = docker("exec", container, "cat", "/proc/self/status")
        assert HAS_NO_ROOT in status and "NoNewPrivs:\t1" in status, service


@pytest.mark.parametrize("service", SERVICES)
def test_image_has_no_root_no_compiler_and_a_name(project: Project, service: str) -> None:
    container = project.containers(service)[0]
    assert docker("exec", container, "id", "-u").strip() == "999"
    tools = "command -v cc gcc g++ c++ clang make cmake ninja git curl wget || true"
    assert docker("exec", container, "sh", "-c", tools) == ""
    assert docker("exec", container, "sh", "-c", "ls /venv/bin | grep pip || true") == ""
    libraries = "find /venv -name '*.so*' -type f -exec sha256sum {} + | sort | uniq -w64 -D"
    assert docker("exec", container, "sh", "-c", libraries) == "", "a library is there twice"
    image = inspect(inspect(container)["Image"])
    labels = image["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == f"finetunellm-{service}"
    print(f"\n{service}: {image['Size'] / 1e6:.0f} MB", end=" ")


def test_image_computes_with_kernels_of_this_cpu(project: Project) -> None:
    """One library of kernels stays loaded: the best of those that this CPU can run."""
    assert project.chat("hello", "kernels")
    maps = project.run_in("inference", "sh", "-c", "cat /proc/[0-9]*/maps 2>/dev/null || true")
    loaded = set(re.findall(r"libggml-cpu-(\w+)\.so", maps))
    flags = Path("/proc/cpuinfo").read_text()
    print(f"\nkernels: {loaded}", end=" ")
    assert len(loaded) == 1, maps
    wanted = {"skylakex", "cascadelake", "icelake", "cooperlake", "zen4", "sapphirerapids"}
    assert (loaded <= wanted | {"cannonlake"}) == ("avx512f" in flags)


def test_chat_recalls_and_is_archived_in_mongodb(project: Project) -> None:
    project.chat("my name is Ada", "recall")
    assert "Ada" in project.chat("what is my name?", "recall")
    wait_for(lambda: project.archived("recall") == 2, "the documents of finetuneLLM.exchanges")


def test_proxy_answers_in_json_while_no_edge_can(project: Project) -> None:
    """On new connections: one that was used before is closed, so that its client tries again."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "count to 50"}]}
    with ThreadPoolExecutor() as pool:
        url = f"{project.url}/v1/chat/completions"
        lost = pool.submit(httpx.post, url, json=body, timeout=60)
        wait_for(lambda: running(project) == 1, "the answer")
        crash(project.containers("edge")[0])
        response = lost.result()
    assert (response.status_code, response.json()["error"]["code"]) == (502, "edge_lost")
    project.wait_until_ready()
    project.compose("stop", "edge")
    response = httpx.post(url, json=body, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_edge")
    assert response.headers["Retry-After"] == "2"
    project.up()


def test_data_is_kept_over_down_and_up(project: Project) -> None:
    project.chat("my name is Grace", "kept")
    wait_for(lambda: project.archived("kept") == 1, "the document")
    before = project.messages("kept")
    began = time.monotonic()
    project.down()
    down = time.monotonic()
    project.up()
    print(f"\ndown {down - began:.1f} s, up {time.monotonic() - down:.1f} s", end=" ")
    assert project.messages("kept") == before
    assert "Grace" in project.chat("what is my name?", "kept")
    wait_for(lambda: project.archived("kept") == 2, "the documents")


def test_scaled_services_share_the_work_behind_the_proxy(fleet: Project) -> None:
    edges = fleet.containers("edge")
    assert len(edges) == 2 and len(fleet.containers("history")) == 2
    since = f"--since={time.time():.0f}"
    load = Load(fleet.url)
    with load.running():
        pass
    print(f"\n{load}", end=" ")
    assert load.failed == [] and len(load.texts) == 1
    for container in edges:
        assert "chat started" in logs(container, since), "the proxy sent this edge no request"


@pytest.mark.parametrize("service", [*SERVICES, "nats"])
def test_crashed_container_leaves_the_answer_whole(fleet: Project, service: str) -> None:
    """The client resumes by Last-Event-ID, through the proxy, at the other edge."""
    expected = InFlight(fleet.url).result()
    answers = [InFlight(fleet.url) for _ in range(4)]  # at both edges, and at each worker
    wait_for(lambda: running(fleet) == len(answers), "answers in flight")
    killed = fleet.containers(service)[0]
    restarts = inspect(killed)["RestartCount"]
    crash(killed)
    outcomes = [answer.result() for answer in answers]
    assert [each.text for each in outcomes] == [expected.text] * len(answers)
    assert all(each.is_whole for each in outcomes)
    resumes = sum(each.resumes for each in outcomes)
    slowest = max(each.seconds for each in outcomes)
    print(f"\n{resumes} resumed, {slowest:.1f} s instead of {expected.seconds:.1f} s", end=" ")
    assert bool(resumes) == (service == "edge")
    wait_for(lambda: inspect(killed)["RestartCount"] > restarts, "the restart by the engine")
    fleet.wait_until_ready(FLEET["inference"])


def test_chats_go_on_while_mongodb_is_stopped(project: Project) -> None:
    container = project.containers("mongo")[0]
    docker("stop", container)
    wait_for(lambda: not project.status()["database_connected"], "the disconnect", 60)
    project.chat("my name is Joan", "no mongo")
    assert "Joan" in project.chat("what is my name?", "no mongo")
    assert len(project.messages("no mongo")) == 2
    docker("start", container)
    began = time.monotonic()
    wait_for(lambda: project.status()["history"]["unarchived"] == 0, "the archive", 60)
    assert project.archived("no mongo") == 2
    print(f"\narchived after {time.monotonic() - began:.1f} s", end=" ")


@pytest.mark.parametrize("service", SERVICES)
def test_rolling_restart_under_load_fails_no_request(fleet: Project, service: str) -> None:
    load = Load(fleet.url)
    with load.running():
        for container in fleet.containers(service):
            docker("restart", "--time=35", container)
            wait_until_healthy([container])
            fleet.wait_until_ready(FLEET["inference"])
    print(f"\n{load}", end=" ")
    assert load.failed == [] and len(load.texts) == 1


def test_update_under_load_fails_no_request(project: Project) -> None:
    """Containers with another setting stand for those of another image."""
    two, four = ({service: count for service in SERVICES} for count in (2, 4))
    project.up(**two)
    old = [container for service in SERVICES for container in project.containers(service)]
    project.environ["LOG_FORMAT"] = "json"
    load = Load(project.url)
    try:
        with load.running():
            project.up("--no-recreate", **four)
            new = [container for service in SERVICES for container in project.containers(service)]
            wait_until_healthy(new)
            docker("stop", "--time=35", *old)
            docker("rm", *old)
            project.wait_until_ready(2)
        print(f"\n{load}", end=" ")
        assert load.failed == [] and len(load.texts) == 1
        project.up(**two)
        kept = [container for service in SERVICES for container in project.containers(service)]
        assert set(kept) == set(new) - set(old)
    finally:
        del project.environ["LOG_FORMAT"]
        project.up()


def test_stop_lets_an_answer_end(project: Project) -> None:
    containers = [project.containers(service)[0] for service in (*SERVICES, "proxy")]
    answer = InFlight(project.url)
    wait_for(lambda: running(project) == 1, "the answer")
    began = time.monotonic()
    project.compose("stop")
    print(f"\nstopped in {time.monotonic() - began:.1f} s", end=" ")
    outcome = answer.result()
    assert outcome.is_whole and outcome.resumes == 0
    assert [exit_code(container) for container in containers] == [0] * len(containers)
    project.up()


def test_stop_cuts_an_answer_that_takes_too_long_cleanly(project: Project) -> None:
    """Every process drains for less than its grace period: none is killed."""
    containers = [project.containers(service)[0] for service in (*SERVICES, "proxy")]
    body = {"prompt": "count to 50", "max_tokens": 1500, "ignore_eos": True}
    with project.http.stream("POST", "/chat", json=body) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        began = time.monotonic()
        project.compose("stop")
        seconds = time.monotonic() - began
        rest = list(lines)
    print(f"\nstopped in {seconds:.1f} s; the stream ended with {rest[-3:]}", end=" ")
    assert 20 < seconds < 45
    assert [exit_code(container) for container in containers] == [0] * len(containers)
    project.up()


def test_variant_without_mongodb_remembers(project: Project) -> None:
    project.down()
    project.files.append("deploy/compose/no-mongo.yml")
    try:
        project.up()
        assert project.containers("mongo") == []
        project.chat("my name is Alan", "without mongo")
        assert "Alan" in project.chat("what is my name?", "without mongo")
        assert not project.status()["database_connected"]
        log = logs(project.containers("history")[0])
        assert "ERROR" not in log and "WARNING" not in log, log
    finally:
        project.files.pop()
        project.up()


def test_variant_with_secrets_in_files(project: Project, tmp_path: Path) -> None:
    """The files are those that the override names, in a folder of this test."""
    uri = "mongodb://mongo:27017/?appName=from-a-file"
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "mongodb_uri").write_text(f"{uri}\n")
    key = _make_key(folder)
    override = (ROOT / "deploy/compose/secrets.yml").read_text().replace("./keys", str(folder))
    (tmp_path / "secrets.yml").write_text(override)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    project.files.append(str(tmp_path / "secrets.yml"))
    try:
        project.compose("up", "-d", "--no-build")
        wait_for(lambda: _status_of(project, key) == 200, "the edge with a key", 60)
        assert _status_of(project, "wrong") == 401
        environment = inspect(project.containers("history")[0])["Config"]["Env"]
        assert not any("from-a-file" in line for line in environment)
        wait_for(lambda: _is_connected(project, key), "MongoDB", 60)
    finally:
        project.files.pop()
        project.up()


def _make_key(folder: Path) -> str:
    """Add a key to the file as `just keys add --file` does, in the image of the edge."""
    printed = docker(
        "run", "--rm", "--user=0", f"--volume={folder}:/run/keys",
        f"finetunellm-edge:{os.environ.get('VERSION', 'test')}",
        "python", "-m", "services.edge.manage_keys", "add", "ada", "--admin",
        "--file", "/run/keys/keys.json",
    )  # fmt: skip
    return printed.split()[-1]


def _status_of(project: Project, key: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        return project.http.get("/sessions", headers={"X-API-Key": key}).status_code
    return 0


def _is_connected(project: Project, key: str) -> bool:
    status: dict[str, Any] = project.http.get("/status", headers={"X-API-Key": key}).json()
    return bool(status["database_connected"])


def test_variant_with_tls_streams_over_https(project: Project, tmp_path: Path) -> None:
    authority = trustme.CA()
    folder = tmp_path / "tls"
    folder.mkdir()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
        str(folder / "server.pem")
    )
    override = (ROOT / "deploy/compose/tls.yml").read_text().replace("./tls", str(folder))
    (tmp_path / "tls.yml").write_text(override)
    for path in (tmp_path, folder, folder / "server.pem"):
        path.chmod(0o755)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    url = f"https://localhost:{project.port}"
    project.files.append(str(tmp_path / "tls.yml"))
    try:
        project.compose("up", "-d", "--no-build")
        with httpx.Client(base_url=url, verify=trusted, timeout=60) as http:
            wait_for(lambda: _is_ready(http), "HTTPS", 60)
            with http.stream("POST", "/chat", json={"prompt": "count to 20"}) as response:
                times = [time.monotonic() for line in response.iter_lines() if "token" in line]
        assert times[-1] - times[0] > 0.5, "the proxy has buffered the answer"
    finally:
        project.files.pop()
        project.up()


def _is_ready(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return http.get("/readyz").status_code == 200
    return False


def test_each_service_runs_alone_by_docker_run(project: Project) -> None:
    """As docs/operations.md says, beside the NATS, MongoDB and keys of the project."""
    names = [f"{project.name}-alone-{service}" for service in SERVICES]
    project.compose("stop", *SERVICES)
    try:
        for service, name in zip(SERVICES, names, strict=True):
            docker("run", "-d", "--init", f"--name={name}", *_run_options(project, service))
        wait_until_healthy(names)
        project.wait_until_ready()  # the proxy finds the edge by its alias
        project.chat("my name is Edith", "alone")
        assert "Edith" in project.chat("what is my name?", "alone")
        wait_for(
            lambda: json.loads(project.http.get("/status").text)["history"]["unarchived"] == 0,
            "the archive",
        )
        for name in names:
            docker("stop", "--time=35", name)
            assert exit_code(name) == 0, name
    finally:
        docker("rm", "--force", *names)
        project.up()


def _run_options(project: Project, service: str) -> list[str]:
    options = [
        f"--network={NETWORK}", f"--network-alias={service}",
        "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL",
        f"--volume={project.name}_secrets-{service}:/run/nats:ro",
        "--env=NATS_URL=nats://nats:4222", "--env=NATS_CREDS=/run/nats/nats.nk",
        f"--env=NATS_INBOX_PREFIX=_INBOX.{service}",
        "--env=MONGODB_URI=mongodb://mongo:27017/", f"--volume={ROOT}/model:/app/model:ro",
    ]  # fmt: skip
    return [*options, f"finetunellm-{service}:{os.environ.get('VERSION', 'test')}"]

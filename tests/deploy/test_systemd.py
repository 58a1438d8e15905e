"""The units of deploy/systemd, against the code that they run and against systemd itself."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import COMMANDS
from deploy.nats.secrets import NATS_CONFIG, SEED, USERS
from services.contract import subjects
from services.runtime.process import DRAIN_DEADLINE, INVALID_SETTING
from tests.servers import ROOT

FOLDER = ROOT / "deploy/systemd"
UNITS = sorted(FOLDER.glob("*.service"))
SERVICES = ("edge", "history", "inference")
MAX_EXPOSURE = 2.0  # of systemd-analyze security, from 0 (best) to 10
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "MemoryDenyWriteExecute": "yes",
    "PrivateDevices": "yes",
    "PrivateTmp": "yes",
    "CapabilityBoundingSet": "",
}
needs_systemd = pytest.mark.skipif(sys.platform != "linux", reason="systemd is for Linux")


def unit(path: Path) -> configparser.SectionProxy:
    """Return the section [Service]. Of an option that is set twice, it has the last."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(path)
    return parser["Service"]


@pytest.mark.parametrize("name", SERVICES)
def test_unit_fits_its_service(name: str) -> None:
    service = unit(FOLDER / f"finetunellm-{name}.service")
    assert service["ExecStart"] == f"/opt/finetunellm/bin/finetunellm {name}" and name in COMMANDS
    assert float(service["TimeoutStopSec"]) > DRAIN_DEADLINE
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == str(INVALID_SETTING)
    key = Path(".data/secrets", name, SEED)
    assert service["LoadCredential"] == f"{SEED}:/var/lib/finetunellm/{key}"
    assert f"NATS_CREDS=%d/{SEED}" in service["Environment"].split()
    assert f"NATS_INBOX_PREFIX={subjects.inbox(name)}" in service["Environment"].split()


def test_unit_of_nats_has_the_configuration_that_secrets_writes() -> None:
    service = unit(FOLDER / "finetunellm-nats.service")
    assert f"-c {NATS_CONFIG} " in service["ExecStart"]
    assert NATS_CONFIG.parent.name == USERS.parent.name
    assert service["StateDirectory"] == "finetunellm"
    assert service["WorkingDirectory"] == "/var/lib/finetunellm"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_unit_is_hardened(path: Path) -> None:
    service = unit(path)
    assert {name: service[name] for name in HARDENED} == HARDENED


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    assert len(UNITS) == 4
    for path in UNITS:  # the programs must exist, so others stand for them
        text = re.sub(r"/opt/finetunellm/bin/\S+", "/bin/true", path.read_text())
        (tmp_path / path.name).write_text(text)
    copies = [str(path) for path in tmp_path.iterdir()]
    verify = ["systemd-analyze", "verify", "--man=no", *copies]
    verified = subprocess.run(verify, capture_output=True, text=True)
    own = [line for line in verified.stderr.splitlines() if "finetunellm" in line]
    assert own == []
    security = ["systemd-analyze", "security", "--offline=true", "--no-pager", *copies]
    report = subprocess.run(security, capture_output=True, text=True).stdout
    exposures = re.findall(r"exposure level for finetunellm-\w+\.service: ([\d.]+)", report)
    assert len(exposures) == len(UNITS) and max(map(float, exposures)) < MAX_EXPOSURE, report


@needs_systemd
def test_systemd_names_an_unknown_option(tmp_path: Path) -> None:
    """The positive control of the test before."""
    path = tmp_path / "finetunellm-x.service"
    path.write_text("[Service]\nExecStart=/bin/true\nProtectSytem=strict\n")
    verify = ["systemd-analyze", "verify", "--man=no", str(path)]
    assert "ProtectSytem" in subprocess.run(verify, capture_output=True, text=True).stderr

"""
Generate services/<name>/requirements.txt from uv.lock, for those who use pip.

`--check` only reports whether they are stale.
"""

import subprocess
import sys
from pathlib import Path

from deploy.generated import write_or_check

SERVICES = ("edge", "history", "inference")


def export(service: str) -> str:
    command = ["uv", "export", "--locked", "--extra", service, "--no-default-groups", "--quiet"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    files = {Path("services", name, "requirements.txt"): export(name) for name in SERVICES}
    sys.exit(write_or_check(files, sys.argv))

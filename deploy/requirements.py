"""
Generate services/<name>/requirements.txt from uv.lock, for the images and for those who use pip.

`--check` only reports whether they are stale.
"""

import subprocess
import sys
from pathlib import Path

from deploy.generated import write_or_check

SERVICES = ("edge", "history", "inference")


def export(service: str) -> str:
    extras = ["--extra", service, "--extra", "tracing"]
    command = ["uv", "export", "--locked", *extras, "--no-default-groups", "--quiet"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    files = {Path("services", name, "requirements.txt"): export(name) for name in SERVICES}
    sys.exit(write_or_check(files, sys.argv))

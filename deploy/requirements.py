"""
services/<name>/requirements.txt from uv.lock, for those who use pip; --check only says if it is
stale.
"""

import subprocess
import sys
from pathlib import Path

SERVICES = ("edge", "history", "inference")


def export(service: str) -> str:
    command = ["uv", "export", "--locked", "--extra", service, "--no-default-groups", "--quiet"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(check: bool) -> int:
    stale = []
    for service in SERVICES:
        path, text = Path("services", service, "requirements.txt"), export(service)
        if check and (not path.exists() or path.read_text() != text):
            stale.append(str(path))
        elif not check:
            path.write_text(text)
    if stale:
        print(f"stale: {', '.join(stale)}; `just lock` makes them again", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv))

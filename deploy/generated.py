"""Files that are generated from the code: write them, or check that they are fresh."""

import sys
from collections.abc import Mapping
from pathlib import Path


def write_or_check(files: Mapping[Path, str], argv: list[str]) -> int:
    """
    Write each file's text, or with `--check` name the stale ones. Return the exit code.
    """
    stale = [path for path, text in files.items() if not _is_fresh(path, text)]
    if "--check" not in argv:
        for path in stale:
            path.write_text(files[path], "utf-8")
    elif stale:
        names = ", ".join(map(str, stale))
        print(f"stale: {names}; `just lock` generates them again", file=sys.stderr)
        return 1
    return 0


def _is_fresh(path: Path, text: str) -> bool:
    return path.exists() and path.read_text("utf-8") == text

"""Where a child process finds this project's packages."""

import os
from pathlib import Path

PROJECT = Path(__file__).parents[3]


def child_path() -> str:
    """Return PYTHONPATH for a child: this project, and what is in it here."""
    paths = [str(PROJECT), os.environ.get("PYTHONPATH")]
    return os.pathsep.join(filter(None, paths))  # "" would be the current folder

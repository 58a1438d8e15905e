"""
The version of FineTuneLLM, and the name of the program that operates it.

pyproject.toml is the only source of the version. A clone and the images have this file beside their
packages; an installed wheel has it as metadata instead.
"""

import tomllib
from importlib import metadata
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def _version() -> str:
    if not _PYPROJECT.exists():
        return metadata.version("finetunellm")
    version: str = tomllib.loads(_PYPROJECT.read_text("utf-8"))["project"]["version"]
    return version


VERSION = _version()
COMMAND = "just" if _PYPROJECT.exists() else "finetunellm"
"""The program with the commands `up`, `chat`, `keys`: recipes in a clone, or the installed one."""

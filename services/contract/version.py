"""The version of FineTuneLLM. pyproject.toml is its only source; the images carry a copy of it."""

import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

VERSION: str = tomllib.loads(_PYPROJECT.read_text("utf-8"))["project"]["version"]

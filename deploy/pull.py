"""
`just pull OWNER/NAME[:QUANT]`: download a GGUF model from the Hugging Face Hub into model/.

A broken download is resumed by the next one of the same file. A file appears in model/ only when it
is complete and has the checksum that the Hub lists; a file that is there is never overwritten.

`hf_hub_download` of huggingface_hub 2 deletes what it has when it fails, so this module calls its
parts: https://github.com/huggingface/huggingface_hub/pull/4228.
"""

import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from services.contract.version import COMMAND
from services.inference.model_path import PART, model_name

MODEL = Path("model")
DEFAULT_QUANT = "Q4_K_M"
MAX_NAME_BYTES = 200  # a file system's limit of 255, less what an incomplete file's name has more
LINE_SECONDS = 5.0  # between two lines of progress
USAGE = (
    f"usage: {COMMAND} pull OWNER/NAME[:QUANT], for example"
    " bartowski/Qwen2.5-0.5B-Instruct-GGUF:Q8_0"
)

_NOT_MODELS = ("mmproj", "imatrix")
_QUANT = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP\d\w*|BF16|F16|F32)", re.IGNORECASE)


class PullError(Exception):
    """The model can't be downloaded. The message says why and what to do."""


class RemoteFile(NamedTuple):
    path: str  # in the repository
    size: int  # bytes
    sha256: str | None  # None: the Hub lists none, as the file is too small for LFS

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class RemoteModel(NamedTuple):
    """A model in a repository: its file, or its parts in order."""

    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def label(self) -> str:
        """The quantization that the file name contains, else the file name."""
        return next(_labels(self.files[0].path), self.files[0].name)

    def has_quant(self, quant: str) -> bool:
        wanted = quant.lower()
        first = self.files[0]
        return wanted in (first.name.lower(), *(label.lower() for label in _labels(first.path)))


def _labels(path: str) -> Iterator[str]:
    """Yield the quantizations in a path, that of the file name first."""
    for part in reversed(path.split("/")):
        for word in re.split(r"[.](?!\d)|(?<!UD)-", part, flags=re.IGNORECASE):
            if _QUANT.fullmatch(word):
                yield word


# --- the repository -------------------------------------------------------------------------------


class Repository(NamedTuple):
    """One commit of a repository, so that all parts of a model belong together."""

    name: str
    commit: str

    def models(self) -> list[RemoteModel]:
        """Return the GGUF models, sorted by path. Raises PullError."""
        tree = HfApi().list_repo_tree(self.name, recursive=True, revision=self.commit)
        files = [
            RemoteFile(each.path, each.size, each.lfs.sha256 if each.lfs else None)
            for each in tree
            if isinstance(each, RepoFile) and _is_model(each.path)
        ]
        for file in files:
            _check_path(file.path)
        by_model = groupby(sorted(files), lambda file: _without_part_number(file.path))
        return [RemoteModel(tuple(parts)) for _, parts in by_model]

    def url(self, file: RemoteFile) -> str:
        url: str = hf_hub_url(self.name, file.path, revision=self.commit)
        return url


def _is_model(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    is_other = name.startswith(".") or any(word in name for word in _NOT_MODELS)
    return name.endswith(".gguf") and not is_other


def _check_path(path: str) -> None:
    """
    Check a path that a repository lists, which may be hostile, although only its last part becomes
    a file name here. Raises PullError.
    """
    is_inside = ".." not in path.split("/") and not path.startswith("/") and "\\" not in path
    is_short = max(map(len, path.encode(errors="replace").split(b"/"))) <= MAX_NAME_BYTES
    if not (is_inside and is_short and path.isprintable()):
        raise PullError(
            f"The repository lists {path!r}, which is not the path of a file that can be"
            " saved: look for another repository."
        )


def _without_part_number(path: str) -> str:
    return str(Path(path).with_name(model_name(Path(path))))


def choose(repository: str, models: Sequence[RemoteModel], quant: str) -> RemoteModel:
    """
    Return the model with the quantization; without one the usual one, or else the first. Raises
    PullError.
    """
    if not models:
        raise PullError(
            f"{repository} contains no GGUF model. Look for a repository whose name ends in -GGUF,"
            " or convert the model (model/README.md)."
        )
    found = [model for model in models if model.has_quant(quant or DEFAULT_QUANT)]
    if quant and not found:
        there = ", ".join(f"{model.label} ({_gigabytes(model.size)})" for model in models)
        raise PullError(f"{repository} has no {quant}. It has {there}.")
    chosen = min(found or models[:1], key=lambda model: len(model.files[0].path))
    if (match := PART.match(chosen.files[0].name)) and int(match[3]) != len(chosen.files):
        raise PullError(
            f"{repository} has {len(chosen.files)} of {int(match[3])} parts of {chosen.label}:"
            " choose another quantization."
        )
    return chosen


# --- the download ---------------------------------------------------------------------------------


def pull(name: str, quant: str, folder: Path = MODEL) -> list[Path]:
    """Download a model into `folder`. Return its files. Raises PullError or OSError."""
    commit = HfApi().model_info(name).sha
    assert commit is not None, "the Hub lists a commit for every repository"
    repository = Repository(name, commit)
    model = choose(name, repository.models(), quant)
    print(f"{name}: {model.label}, {_gigabytes(model.size)}", flush=True)
    folder.mkdir(exist_ok=True)
    targets = [folder / file.name for file in model.files]
    missing = [file for file, t in zip(model.files, targets, strict=True) if not _is_there(file, t)]
    _check_space(folder, missing)
    complete = {file: _download(repository, file, folder) for file in missing}
    for file, part in complete.items():  # together, so that no model lacks parts
        _move(part, folder / file.name)
    return targets


def _is_there(file: RemoteFile, target: Path) -> bool:
    """Return whether the very file is there. Raises PullError if another one is."""
    if not target.exists():
        return False
    if target.stat().st_size == file.size and file.sha256 in (None, _sha256(target)):
        print(f"{target} is there already", flush=True)
        return True
    raise PullError(f"{target} exists, with other content: rename or remove it first.")


def _check_space(folder: Path, files: Sequence[RemoteFile]) -> None:
    have = sum(part.stat().st_size for f in files if (part := _part(folder, f)).exists())
    need = sum(file.size for file in files) - have
    if need > (free := shutil.disk_usage(folder).free):
        raise PullError(
            f"{folder.resolve()} has {_gigabytes(free)} of free space, and the download needs"
            f" {_gigabytes(need)}: free some space, or choose a smaller quantization."
        )


def _part(folder: Path, file: RemoteFile) -> Path:
    """Return where the incomplete file is. Its name has the checksum: another file starts anew."""
    return folder / f".{file.name}.{(file.sha256 or 'small')[:16]}.part"


def _download(repository: Repository, file: RemoteFile, folder: Path) -> Path:
    """Return the complete file, which is not in its place yet. Raises PullError or OSError."""
    path = _part(folder, file)
    with _locked(path) as opened:
        have = opened.seek(0, os.SEEK_END)
        if have > file.size:
            have = opened.truncate(0)
            opened.seek(0)
        if have < file.size:
            headers = build_hf_headers() | {"Accept-Encoding": "identity"}
            http_get(
                repository.url(file),
                opened,
                resume_size=have,
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
                tqdm_class=tqdm if sys.stdout.isatty() else ProgressLines,
            )
        opened.flush()
    if file.sha256 not in (None, _sha256(path)):
        path.unlink()
        raise PullError(f"{file.name} was damaged on its way (SHA-256 differs). Download it again.")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open the file for appending, unless another process does. Raises PullError."""
    with path.open("ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PullError(f"Another `{COMMAND} pull` is downloading {path.name}.") from error
        yield opened


def _move(part: Path, target: Path) -> None:
    if target.exists():
        raise PullError(f"{target} has appeared meanwhile: remove it, and run this again.")
    part.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ProgressLines(tqdm):  # type: ignore[misc]
    """Progress as plain lines, for output that is no terminal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        nowhere = io.StringIO()  # for the end of the line after a bar
        super().__init__(*args, **options, mininterval=LINE_SECONDS, file=nowhere)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        share = f"{self.n / self.total:.0%} of " if self.total else ""
        print(f"{self.desc.removesuffix(': ')}: {share}{_gigabytes(self.total or self.n)}")
        sys.stdout.flush()


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


# --- the command ----------------------------------------------------------------------------------


def explain(error: Exception, name: str) -> str:
    """Return what is wrong and what to do, for an error of the Hub, the network or the disk."""
    host = constants.ENDPOINT
    match error:
        case PullError():
            return str(error)
        case HFValidationError():
            return f"{name!r} is not the name of a repository. {USAGE}"
        case GatedRepoError():
            return (
                f"{name} is gated: accept its conditions on {host}/{name}, and set HF_TOKEN to a"
                " token of your account."
            )
        case RepositoryNotFoundError():
            return (
                f"{host} has no model {name}, or it is private. Check the name; for a private one,"
                " set HF_TOKEN."
            )
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set: unset it to download."
        case HfHubHTTPError():
            status = error.response.status_code
            return f"{host} replied with HTTP status {status}: try again later. ({error})"
        case httpx2.TransportError():
            return (
                f"{host} can't be reached or ended the connection ({error}). Check the network, the"
                " proxy and HF_ENDPOINT, and run it again: it resumes."
            )
        case OSError(errno=errno.ENOSPC):
            return "The disk is full: free some space, and run it again: it resumes."
    return f"{error}. Run it again: it resumes."


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if len(arguments) != 1 or not arguments[0] or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    name, _, quant = arguments[0].partition(":")
    try:
        files = pull(name, quant)
    except KeyboardInterrupt:
        print("\nstopped; run it again to resume", file=sys.stderr)
        return 130
    except (PullError, HFValidationError, HfHubHTTPError, OSError, httpx2.TransportError) as error:
        print(explain(error, name), file=sys.stderr)
        return 1
    print(f"complete: {', '.join(map(str, files))}")
    print(f"serve it: MODEL_PATH={files[0]} {COMMAND} up")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
Write a dataset as files for training and validation: `python -m deploy.dataset sft --out data`.

Needs a running edge, and its key in API_KEY if it has keys.
"""

import argparse
import hashlib
import http.client
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from services.contract.version import COMMAND
from services.runtime.settings import environment

FILTERS = ("session_id", "since", "until", "model", "adapter", "rating", "tenant")
NAMES = ("train", "validation")
TIMEOUT_SECONDS = 3600.0  # without a line: nothing comes of sessions without a selected answer
READ_BYTES = 2**16
PARTS = 2**64


class DatasetError(Exception):
    """The dataset can't be read. The text is for the user."""


def read_lines(url: str, key: str) -> Iterator[bytes]:
    """Yield the lines of a dataset. Raises DatasetError, also if it ends before its end."""
    if not (key.isascii() and key.isprintable()):
        raise DatasetError("API_KEY has characters that no key has: copy it again.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
            rest = b""
            # not `readline`: it takes a broken connection for the end of the response
            while part := response.read(READ_BYTES):
                *lines, rest = (rest + part).split(b"\n")
                yield from (line + b"\n" for line in lines)
    except HTTPError as error:
        raise DatasetError(_message_of(error)) from error
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise DatasetError(
            f"{url} can't be read ({reason}). Nothing was written: try again."
        ) from error


def _message_of(error: HTTPError) -> str:
    try:
        message = str(json.load(error)["error"]["message"])
        return f"{message} Set API_KEY to one." if error.code == 401 else message
    except (ValueError, KeyError, TypeError):
        return f"{error.url}: {error}. Is that an edge?"


def part_of(line: bytes, seed: int, share: float) -> str:
    """
    Return the file of a line: all lines of a session go into the same one, whatever other sessions
    there are, so a dataset that grows keeps its split. Raises DatasetError.
    """
    try:
        fields = json.loads(line)
        session = f"{seed} {fields.get('tenant', '')} {fields['session_id']}"
    except (ValueError, KeyError, AttributeError) as error:
        raise DatasetError(f"{line[:80]!r} is no line of a dataset. Is that an edge?") from error
    number = int.from_bytes(hashlib.sha256(session.encode()).digest()[:8], "big")
    return "validation" if number < share * PARTS else "train"


def write(lines: Iterator[bytes], folder: Path, seed: int, share: float) -> dict[str, int]:
    """
    Write `train.jsonl` and `validation.jsonl` in place of older ones, once all lines are read.
    Return the lines in each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(NAMES, 0)
    partial = {name: folder / f".{name}.jsonl.partial" for name in NAMES}
    try:
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {
                name: stack.enter_context(path.open("wb")) for name, path in partial.items()
            }
            for line in lines:
                name = part_of(line, seed, share)
                files[name].write(line)
                counts[name] += 1
        for name, path in partial.items():
            path.replace(folder / f"{name}.jsonl")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return counts


def main() -> None:
    environ = environment()
    parser = argparse.ArgumentParser(prog=f"{COMMAND} dataset", description=__doc__)
    parser.add_argument("kind", choices=("sft", "preferences"))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--validation", type=share_of, default=0.1, metavar="SHARE")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    port = environ.get("EDGE_PORT") or "8002"
    parser.add_argument("--url", default=f"http://localhost:{port}", help="of the edge")
    for name in FILTERS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="…", help="as in the API")
    options = parser.parse_args()
    given = {name: value for name in FILTERS if (value := getattr(options, name)) is not None}
    url = f"{options.url.rstrip('/')}/datasets/{options.kind}?{urlencode(given)}"
    try:
        lines = read_lines(url, environ.get("API_KEY", ""))
        counts = write(lines, options.out, options.seed, options.validation)
    except DatasetError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{options.out} can't be written: {error.strerror}.")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    for name, count in counts.items():
        print(f"{options.out / name}.jsonl: {count:,} lines")


def share_of(text: str) -> float:
    """Parse a share. Raises ValueError."""
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError("not from 0 to 1")
    return share


if __name__ == "__main__":
    main()

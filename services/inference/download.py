"""
`python -m services.inference.download URL FILE SHA256 [TOKEN_FILE]`: download a model before a
worker starts, such as in the init container of a pod.

A broken download is resumed, also after a restart. The file appears under its name only when it is
complete and has the checksum; then it is not downloaded again.
"""

import argparse
import errno
import hashlib
import logging
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from services.runtime import logs

CHUNK_BYTES = 2**20
RANGE_NOT_SATISFIABLE = 416
TOO_MANY_REQUESTS = 429
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


class DownloadError(Exception):
    """The model can't be downloaded. The message says why and what to do."""


@dataclass(frozen=True)
class DownloadLimits:
    """Tries in a row without a further byte, and times in seconds."""

    tries: int = 10
    pause_seconds: float = 1.0  # after the first failure; then twice as long each time
    max_pause_seconds: float = 60.0
    timeout_seconds: float = 60.0  # without a byte
    log_seconds: float = 10.0  # between two lines of progress


DEFAULT_LIMITS = DownloadLimits()


def download(
    url: str, path: Path, sha256: str, token: str = "", limits: DownloadLimits = DEFAULT_LIMITS
) -> None:
    """Download `url` to `path`, unless that is there already. Raises DownloadError."""
    if path.exists() and _sha256(path) == sha256:
        log.info("model is there already path=%s", path)
        return
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    _fetch_in_tries(url, part, token, limits)
    found = _sha256(part)
    if found != sha256:
        part.unlink()
        raise DownloadError(
            f"{url} has the SHA-256 {found}, not {sha256}: it is another file. Check both."
        )
    part.replace(path)
    log.info("model downloaded path=%s bytes=%d", path, path.stat().st_size)


def _fetch_in_tries(url: str, part: Path, token: str, limits: DownloadLimits) -> None:
    """Fetch what `part` lacks. Raises DownloadError."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _fetch(url, part, token, limits)
        except HTTPError as error:
            if error.code < 500 and error.code != TOO_MANY_REQUESTS:
                raise DownloadError(
                    f"{url} answers {error.code} {error.reason}: check the URL, and the token that"
                    " a private model needs."
                ) from error
            reason = str(error)
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise DownloadError(
                    f"{part.parent} has no room for {url} ({error}): use a larger volume or disk."
                ) from error
            reason = str(error) or type(error).__name__
        failures = failures + 1 if _size(part) == before else 1
        if failures >= limits.tries:
            raise DownloadError(f"{url} can't be downloaded: {reason}. Check the network.")
        pause = min(limits.pause_seconds * 2 ** (failures - 1), limits.max_pause_seconds)
        log.warning("download broken off reason=%s retry_seconds=%.0f", reason, pause)
        time.sleep(pause)


def _fetch(url: str, part: Path, token: str, limits: DownloadLimits) -> None:
    """Append what `part` lacks. Raises OSError or HTTPException, HTTPError among the former."""
    start = _size(part)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    if token:
        # not for the host to which a hub redirects
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        response = urlopen(request, timeout=limits.timeout_seconds)
    except HTTPError as error:
        if error.code == RANGE_NOT_SATISFIABLE and start:
            return  # everything is there
        raise
    with response, part.open("ab") as file:
        if response.status == 200:
            file.truncate(0)
        _copy(response, file, limits)


def _copy(response: BinaryIO, file: BinaryIO, limits: DownloadLimits) -> None:
    """Copy the body. Raises ConnectionError if it is shorter than announced, which urllib hides."""
    expected = getattr(response, "length", None)  # None: not announced
    copied, logged_at = 0, time.monotonic()
    while chunk := response.read(CHUNK_BYTES):
        file.write(chunk)
        copied += len(chunk)
        if time.monotonic() - logged_at > limits.log_seconds:
            logged_at = time.monotonic()
            log.info("downloading bytes=%d of=%s", copied, expected)
    if expected is not None and copied < expected:
        raise ConnectionError(f"the connection ended after {copied} of {expected} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> str | None:
    """Return what the process exits with: None, or a sentence."""
    parser = argparse.ArgumentParser(description="Download a model and check it.")
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("sha256")
    parser.add_argument("token_file", type=Path, nargs="?")
    options = parser.parse_args(argv)
    logs.configure("inference")
    try:
        token = options.token_file.read_text("utf-8").strip() if options.token_file else ""
        download(options.url, options.file, options.sha256, token)
    except (DownloadError, OSError) as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())

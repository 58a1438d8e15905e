"""How a process proves to NATS who it is: keys, TLS and inbox. No message quotes a secret."""

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import nkeys

from services.contract import subjects
from services.runtime.settings import InvalidSetting, ServiceSettings

_SEED = re.compile(r"^(SU[A-Z2-7]{56})\s*$", re.MULTILINE)
_JWT = re.compile(r"^-+BEGIN NATS USER JWT-+\s+(\S+)\s+-", re.MULTILINE)
T = TypeVar("T")


class Credentials(NamedTuple):
    """The key of a user, and the JWT about it that a .creds file holds."""

    seed: str
    jwt: str | None

    def __repr__(self) -> str:
        return "Credentials(…)"


@dataclass(frozen=True)
class NatsAccess:
    """
    `tls` is None unless a setting asks for TLS. `inbox_prefix` starts the subjects on which the
    process receives replies.
    """

    credentials_file: Path | None = None
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    inbox_prefix: str = subjects.INBOX

    @classmethod
    def of(cls, settings: ServiceSettings) -> "NatsAccess":
        """Read the files that the settings name. Raises InvalidSetting."""
        prefix = settings.nats_inbox_prefix
        if not subjects.is_reply(f"{prefix}.x") or not prefix.startswith(subjects.INBOX):
            raise InvalidSetting(
                f"NATS_INBOX_PREFIX={prefix!r} can't be used: set `_INBOX`, or words after it, such"
                " as `_INBOX.tenant.ann` or `_INBOX_ann`."
            )
        path = _path("NATS_CREDS", settings.nats_creds)
        if path is not None:
            read_credentials(path)
        return cls(path, _tls(settings), prefix)


NO_CREDENTIALS = NatsAccess()


def read_credentials(path: Path) -> Credentials:
    """Return the credentials in a .creds or seed file. Raises InvalidSetting."""
    text = _used("NATS_CREDS", path, lambda: path.read_text("utf-8"))
    seed, jwt = _SEED.search(text), _JWT.search(text)
    if seed is None or (jwt is None and "BEGIN NATS USER JWT" in text) or not _is_key(seed[1]):
        raise _unusable(
            "NATS_CREDS", path, "it is neither a .creds file nor the seed (SU…) of an nkey"
        )
    return Credentials(seed[1], jwt and jwt[1])


def public_key(seed: str) -> str:
    """Return the public key (U…) of a user's seed."""
    key: bytes = nkeys.from_seed(bytearray(seed, "ascii")).public_key
    return key.decode()


def _is_key(seed: str) -> bool:
    try:
        return bool(public_key(seed))
    except nkeys.NkeysError:
        return False


def _tls(settings: ServiceSettings) -> ssl.SSLContext | None:
    ca = _path("NATS_TLS_CA", settings.nats_tls_ca)
    cert = _path("NATS_TLS_CERT", settings.nats_tls_cert)
    key = _path("NATS_TLS_KEY", settings.nats_tls_key)
    if bool(cert) != bool(key):
        raise InvalidSetting("Set NATS_TLS_CERT and NATS_TLS_KEY together, or neither of them.")
    if not ca and not cert:
        return None
    context = ssl.create_default_context()
    if ca:
        context = _used("NATS_TLS_CA", ca, lambda: ssl.create_default_context(cafile=ca))
    if cert and key:
        _used("NATS_TLS_KEY", key, key.read_bytes)
        # without a password of its own, OpenSSL would ask for one on the terminal
        _used("NATS_TLS_CERT", cert, lambda: context.load_cert_chain(cert, key, password=b""))
    return context


def _path(setting: str, value: str) -> Path | None:
    """Return the path in a setting. Raises InvalidSetting, without the value, if it is a key."""
    if _SEED.search(value) or "-----BEGIN" in value:
        raise InvalidSetting(
            f"{setting} can't be used: it must name a file, not hold its content. Write that to a"
            " file which only this user can read."
        )
    return Path(value).expanduser() if value else None


def _used(setting: str, path: Path, read: Callable[[], T]) -> T:
    """Return what `read` returns. Raises InvalidSetting, which names the setting and the file."""
    try:
        return read()
    except ssl.SSLError as error:
        is_pair = setting == "NATS_TLS_CERT"
        what = "it and NATS_TLS_KEY are no pair" if is_pair else "it holds no certificate"
        raise _unusable(
            setting, path, f"{what} in PEM without a passphrase ({error.reason})"
        ) from error
    except OSError as error:
        raise _unusable(setting, path, error.strerror or type(error).__name__) from error
    except UnicodeDecodeError as error:
        raise _unusable(setting, path, "it is not text") from error


def _unusable(setting: str, path: Path, why: str) -> InvalidSetting:
    return InvalidSetting(
        f"{setting}={str(path)!r} can't be used: {why}. Name a file that this user can read."
    )

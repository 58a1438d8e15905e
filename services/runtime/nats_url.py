"""Parse NATS_URL into servers and credentials. No other module handles its passwords."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from urllib.parse import unquote, urlsplit

from services.runtime.settings import InvalidSetting

DEFAULT_PORT = 4222
SCHEMES = ("nats", "tls")
HELP = (
    "NATS_URL can't be used: {}. Use nats://host:4222, or tls://host:4222 to require TLS, with"
    " user:password@ before the host if the server needs it; separate servers with commas, and"
    " percent-encode special characters of a password (@ is %40)."
)


@dataclass(frozen=True)
class Servers:
    """The servers of one NATS system and the credentials. str() and repr() show no secret."""

    urls: tuple[str, ...]
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @property
    def has_credentials(self) -> bool:
        return self.user is not None or self.token is not None

    def __str__(self) -> str:
        return ",".join(self.urls)


def parse_servers(nats_url: str) -> Servers:
    """
    Return the servers that `nats_url` lists.

    User and password may be percent-encoded, and apply to all servers, also to those that a cluster
    announces. Raises InvalidSetting, which quotes no part of the value, as it may be a password.
    """
    urls: list[str] = []
    users: set[str] = set()
    scheme = SCHEMES[0]
    for server in _split(nats_url):
        given, separator, rest = server.rpartition("://")
        if separator and urls and given.lower() != scheme:
            raise InvalidSetting(HELP.format("all servers must have the same scheme"))
        scheme = given.lower() if separator else scheme
        user, _, address = rest.rpartition("@")
        urls.append(f"{scheme}://{_address(scheme, address)}")
        users.update(filter(None, [user]))
    if not urls:
        raise InvalidSetting(HELP.format("it names no server"))
    if len(users) > 1:
        raise InvalidSetting(HELP.format("all servers must have the same user and password"))
    return Servers(tuple(urls), *_credentials("".join(users)))


def _split(nats_url: str) -> Iterator[str]:
    """
    Split at commas, except those in a password, which come before the @ of their server.
    """
    pieces = [piece.strip() for piece in nats_url.split(",")]
    server = ""
    for number, piece in enumerate(pieces, 1):
        server += piece
        later = takewhile(lambda piece: "://" not in piece, pieces[number:])
        if "@" not in server and any("@" in piece for piece in later):
            server += ","
        else:
            yield from filter(None, [server])
            server = ""


def _address(scheme: str, address: str) -> str:
    if scheme not in SCHEMES:
        raise InvalidSetting(HELP.format("its scheme is neither nats nor tls"))
    try:
        parts = urlsplit(f"//{address}")
        port = parts.port or DEFAULT_PORT
    except ValueError:
        raise InvalidSetting(HELP.format("the port of a server is not a number")) from None
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment:
        raise InvalidSetting(HELP.format("a server is not host:port"))
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}"


def _credentials(user_info: str) -> tuple[str | None, str | None, str | None]:
    """Return user, password and token; a user without a password is a token."""
    user, has_password, password = user_info.partition(":")
    if has_password:
        return unquote(user), unquote(password), None
    return None, None, unquote(user) or None

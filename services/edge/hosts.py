"""
Which `Host` headers are served. A web page of any site can point its own name to this machine (DNS
rebinding) and then counts as the same origin; its name in `Host` gives it away.
"""

import ipaddress
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from services.contract.errors import ServiceError
from services.edge.keys import ApiKeys

_HOST = re.compile(r"\[?(?P<name>[^\[\]]*?)\]?(?::\d+)?", re.ASCII)


class AllowedHosts:
    """
    `patterns` of names, in which `*` stands for any text. Without patterns, names with a dot are
    rejected if no API key protects the server: a site on the internet can't have another one.
    """

    def __init__(self, patterns: Sequence[str], keys: ApiKeys) -> None:
        self._patterns = [pattern.lower() for pattern in patterns]
        self._keys = keys

    def check(self, host: str) -> None:
        """Raise ServiceError(wrong_host) for a `Host` header that is not served."""
        found = _HOST.fullmatch(host.lower())
        name = found["name"].rstrip(".") if found else host
        if not self._patterns and not self._keys.is_open:
            return
        if _is_local(name) or any(fnmatchcase(name, pattern) for pattern in self._patterns):
            return
        raise ServiceError(
            "wrong_host",
            f"This server does not answer for the host {name[:100]!r}: add it to"
            " EDGE_ALLOWED_HOSTS.",
        )


def _is_local(name: str) -> bool:
    """Return whether no site on the internet can have the name: an address, or without a dot."""
    if "." not in name and ":" not in name:
        return True
    if name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True

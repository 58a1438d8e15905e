"""Who asks. Each API key has a name, and the name is the tenant: it sees only its own sessions."""

import hmac
from collections.abc import Mapping

from services.contract import subjects
from services.contract.errors import ServiceError
from services.runtime.settings import InvalidSetting


class Keys:
    def __init__(self, tenants: Mapping[str, str]) -> None:
        """`tenants` by key. None at all: everybody is the open tenant."""
        self._tenants = {key.encode(): tenant for key, tenant in tenants.items()}

    @classmethod
    def parse(cls, setting: str) -> "Keys":
        """Of EDGE_API_KEYS. The complaint about a bad one never shows a key."""
        tenants: dict[str, str] = {}
        for entry in filter(None, map(str.strip, setting.split(","))):
            name, _, key = map(str.strip, entry.partition(":"))
            if not key or not key.isascii():
                raise InvalidSetting(
                    "EDGE_API_KEYS can't be used: each entry must be name:key, the key in ASCII."
                )
            if not subjects.is_id(name) or name == subjects.OPEN_TENANT:
                raise InvalidSetting(
                    f"EDGE_API_KEYS can't be used: {name!r} must be 1 to 64 of A-Z a-z 0-9 _ -, "
                    "and more than a single underscore."
                )
            if key in tenants:
                raise InvalidSetting(f"EDGE_API_KEYS can't be used: {name} has the key of another.")
            tenants[key] = name
        if setting and not tenants:
            raise InvalidSetting(
                "EDGE_API_KEYS can't be used: it has no name:key, only separators."
            )
        return cls(tenants)

    @property
    def is_open(self) -> bool:
        """Return whether no key is needed."""
        return not self._tenants

    def tenant(self, headers: Mapping[str, str]) -> str:
        """Raises ServiceError(unauthorized)."""
        if self.is_open:
            return subjects.OPEN_TENANT
        given = _given(headers).encode()
        # each key is compared, so that the time taken tells nothing
        matches = [t for key, t in self._tenants.items() if hmac.compare_digest(key, given)]
        if not matches:
            raise ServiceError(
                "unauthorized",
                "A valid API key is needed: send `Authorization: Bearer <key>` or `X-API-Key`.",
            )
        return matches[0]


def _given(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")

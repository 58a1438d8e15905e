"""
Authentication. Each API key has a name, and the name is the tenant: it sees only its own sessions.
"""

import hmac
from collections.abc import Mapping

from services.contract import subjects
from services.contract.errors import ServiceError
from services.runtime.settings import InvalidSetting


class ApiKeys:
    def __init__(self, tenants: Mapping[str, str]) -> None:
        """`tenants` by key. If it is empty, every request belongs to the open tenant."""
        self._tenants = {key.encode(): tenant for key, tenant in tenants.items()}

    @classmethod
    def parse(cls, setting: str) -> "ApiKeys":
        """Parse EDGE_API_KEYS. Raises InvalidSetting with a message that contains no key."""
        tenants: dict[str, str] = {}
        for entry in filter(None, map(str.strip, setting.split(","))):
            name, _, key = map(str.strip, entry.partition(":"))
            if not key or not key.isascii():
                raise _invalid("each entry must be name:key, the key in ASCII")
            if not subjects.is_id(name) or name == subjects.OPEN_TENANT:
                raise _invalid(
                    f"the name {name!r} must have 1 to 64 characters of A-Z a-z 0-9 _ -, and must"
                    " not be `_`"
                )
            if key in tenants:
                raise _invalid(f"{tenants[key]} and {name} have the same key")
            tenants[key] = name
        if setting and not tenants:
            raise _invalid("it has no name:key, only separators")
        return cls(tenants)

    @property
    def is_open(self) -> bool:
        """Return whether no key is needed."""
        return not self._tenants

    @property
    def tenants(self) -> list[str]:
        """Return all tenants: those of the keys, or the open one."""
        return sorted(set(self._tenants.values())) or [subjects.OPEN_TENANT]

    def tenant(self, headers: Mapping[str, str]) -> str:
        """Return the tenant of a request. Raises ServiceError(unauthorized)."""
        if self.is_open:
            return subjects.OPEN_TENANT
        given = _key_in(headers).encode()
        # every key is compared, so that the time taken reveals nothing
        matches = [t for key, t in self._tenants.items() if hmac.compare_digest(key, given)]
        if not matches:
            raise ServiceError(
                "unauthorized",
                "A valid API key is needed: send `Authorization: Bearer <key>` or `X-API-Key`.",
            )
        return matches[0]


def _key_in(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _invalid(why: str) -> InvalidSetting:
    return InvalidSetting(f"EDGE_API_KEYS can't be used: {why}.")

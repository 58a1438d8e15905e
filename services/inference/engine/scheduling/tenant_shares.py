"""
Shares a resource among tenants by what each of them has used: deficit round robin, in which the
tenant that is furthest behind is next, however much the next piece of work costs.
"""

from collections.abc import Collection, Mapping


class TenantShares:
    """
    What each tenant has used, in tokens or seconds. A tenant is an opaque key. Not thread-safe.

    A tenant is backlogged while it has work that waits. Among tenants that always are, what two of
    them have used differs by at most one piece of work, and by what can't be interrupted. Others
    save nothing: their next work begins where the backlogged ones are. What they have used in
    excess is remembered until the backlogged ones have caught up. This is the virtual token counter
    of https://arxiv.org/abs/2401.00588.
    """

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def join(self, tenant: str, backlogged: Collection[str]) -> None:
        """Add a tenant to the backlogged ones. It may be one of them already."""
        if tenant in backlogged:
            return
        floor = min(map(self.used, backlogged), default=None)
        if floor is None:  # nobody waits for what the tenant has used
            self._used = {tenant: 0}
            return
        kept = {t: used for t, used in self._used.items() if used > floor or t in backlogged}
        self._used = kept | {tenant: max(floor, self.used(tenant))}

    def charge(self, tenant: str, amount: float) -> None:
        self._used[tenant] = self.used(tenant) + amount

    def used(self, tenant: str) -> float:
        return self._used.get(tenant, 0)


def has_room(tenant: str, used: Mapping[str, int], maximum: int, amount: int = 1) -> bool:
    """
    Return whether the tenant may take `amount` more of `maximum` places or bytes, of which each
    tenant has `used` some: if the amount is free, or is left of its equal share. So no tenant can
    keep another one out, and n tenants take at most 1 + 1/2 + … + 1/n times the maximum, where n is
    at most the maximum.
    """
    share = maximum // len({tenant, *used})
    return sum(used.values()) + amount <= maximum or used.get(tenant, 0) + amount <= share

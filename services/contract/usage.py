"""What edges tell each other, so that limits of API keys hold across all of them."""

from msgspec import Struct


class TenantUsage(Struct, frozen=True):
    """
    What one tenant uses at one edge: answers that run now, requests and tokens in the minute before
    the current one and in the current one, and the tokens that running requests may still use.
    """

    running: int
    requests: tuple[int, int]
    tokens: tuple[int, int]
    reserved: int = 0


class EdgeUsage(Struct, frozen=True):
    """
    The state of one edge, not a difference: a lost message is made up for by the next one. `minute`
    is Unix time in whole minutes. Tenants without limits are left out.
    """

    edge_id: str
    minute: int
    tenants: dict[str, TenantUsage]

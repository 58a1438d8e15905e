"""Asks for an answer again. Reads no stream."""

from msgspec.structs import replace

from services.contract.messages import Replay, ReplayRequest, StreamEvent, Token
from services.runtime.bus import Bus


async def replay(bus: Bus, subject: str, at: int, timeout: float) -> Replay:
    """
    All of it from character `at` on, in as many parts as it takes. Raises as Bus.request does;
    `timeout`, in seconds, is for each part.
    """
    part = await bus.request(subject, ReplayRequest(at), Replay, timeout)
    events = list(part.events)
    while not part.is_complete:
        part = await bus.request(subject, ReplayRequest(_end(events)), Replay, timeout)
        events += part.events
    return replace(part, events=tuple(events))


def _end(events: list[StreamEvent]) -> int:
    return max(event.offset + len(event.text) for event in events if isinstance(event, Token))

from unittest.mock import Mock

import pytest
from nats.aio.msg import Msg

from services.runtime.deliveries import Inbox, InboxLimits


def message(data: bytes) -> Msg:
    return Msg(Mock(), "some.subject", data=data)


async def taken(inbox: Inbox) -> list[bytes]:
    found = []
    try:
        while True:
            found.append((await inbox.next(0.01)).data)
    except TimeoutError:
        return found


@pytest.mark.parametrize(
    "limits, kept",
    [
        (InboxLimits(messages=3, bytes=100), [b"0", b"1", b"2"]),
        (InboxLimits(messages=100, bytes=2), [b"0", b"1"]),
    ],
)
async def test_full_inbox_keeps_the_oldest_messages(limits: InboxLimits, kept: list[bytes]) -> None:
    inbox = Inbox(limits)
    for _ in range(2):  # an emptied inbox has room again
        for number in range(10):
            await inbox.put(message(b"%d" % number))
        assert await taken(inbox) == kept


async def test_empty_inbox_accepts_a_message_of_any_size() -> None:
    inbox = Inbox(InboxLimits(bytes=2))
    await inbox.put(message(b"large"))
    await inbox.put(message(b"x"))
    assert await taken(inbox) == [b"large"]

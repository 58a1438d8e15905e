import asyncio
from functools import partial

import pytest

from services.runtime.deliveries import Delivery, Inbox, InboxLimits, SharedTimers


def message(data: bytes) -> Delivery:
    return Delivery("some.subject", data, "")


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
            inbox.put(message(b"%d" % number))
        assert await taken(inbox) == kept


async def test_empty_inbox_accepts_a_message_of_any_size() -> None:
    inbox = Inbox(InboxLimits(bytes=2))
    inbox.put(message(b"large"))
    inbox.put(message(b"x"))
    assert await taken(inbox) == [b"large"]


async def test_waiting_reader_gets_a_message_at_once() -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.next(30))
    await asyncio.sleep(0)
    inbox.put(message(b"a"))
    inbox.put(message(b"b"))
    assert ((await waiting).data, (await inbox.next(0)).data) == (b"a", b"b")


@pytest.mark.parametrize("timeouts", [(30.0, 0.02), (0.02, 0.05), (0.02, 0.02)])
async def test_each_wait_has_its_own_timeout(timeouts: tuple[float, float]) -> None:
    """Also one that begins while the timer of an earlier one still runs."""
    inbox, loop = Inbox(), asyncio.get_running_loop()
    waiting = asyncio.create_task(inbox.next(timeouts[0]))
    await asyncio.sleep(0)
    inbox.put(message(b"a"))
    await waiting
    started = loop.time()
    with pytest.raises(TimeoutError):
        await inbox.next(timeouts[1])
    assert loop.time() - started >= timeouts[1] - 0.005


async def test_cancelled_reader_leaves_the_inbox_usable() -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.next(30))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    inbox.put(message(b"a"))
    assert (await inbox.next(0)).data == b"a"


async def waiting_reader(inbox: Inbox, timeout: float = 30) -> asyncio.Task[Delivery]:
    reader = asyncio.create_task(inbox.next(timeout))
    await asyncio.sleep(0)
    return reader


async def test_waiting_reader_skips_messages_that_are_taken() -> None:
    inbox, offered = Inbox(), list[bytes]()

    def take(subject: str, data: bytes) -> bool:
        offered.append(data)
        return data != b"b"

    inbox.take = take
    inbox.receive("s", b"before it waits")
    await inbox.next(0)
    reader = await waiting_reader(inbox)
    for data in (b"a", b"b", b"c"):
        inbox.receive("s", data)
    assert offered == [b"a", b"b"]
    assert ((await reader).data, (await inbox.next(0)).data) == (b"b", b"c")


async def test_timeout_counts_from_the_last_taken_message() -> None:
    inbox, loop = Inbox(), asyncio.get_running_loop()
    inbox.take = lambda subject, data: True
    reader = await waiting_reader(inbox, 0.1)
    await asyncio.sleep(0.05)
    inbox.receive("s", b"a")
    taken_at = loop.time()
    with pytest.raises(TimeoutError):
        await reader
    assert loop.time() - taken_at >= 0.095


async def test_exception_of_take_goes_to_the_reader() -> None:
    inbox = Inbox()

    def fail(subject: str, data: bytes) -> bool:
        raise ValueError("broken")

    inbox.take = fail
    reader = await waiting_reader(inbox)
    inbox.receive("s", b"a")
    with pytest.raises(ValueError, match="broken"):
        await reader


async def test_timers_call_at_their_times_and_share_a_timer() -> None:
    timers, loop, called = SharedTimers(), asyncio.get_running_loop(), list[tuple[str, float]]()
    all_called = asyncio.Event()
    begin = loop.time()

    def call(name: str) -> None:
        called.append((name, loop.time() - begin))
        if len(called) == 3:
            all_called.set()

    for name, seconds in (("late", 0.1), ("early", 0.0), ("also late", 0.1)):
        timers.call_at(begin + seconds, partial(call, name))
    async with asyncio.timeout(10):
        await all_called.wait()
    assert [name for name, _ in called] == ["early", "late", "also late"]
    assert called[1][1] >= 0.1

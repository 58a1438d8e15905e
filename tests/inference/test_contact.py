import asyncio

from services.inference.contact import LIMIT, NatsWatch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_it_is_lost_once_nats_did_not_answer_for_longer_than_the_limit() -> None:
    clock, losses = Clock(), []
    answers = asyncio.Queue[bool]()
    kept = NatsWatch(answers.get, lambda: losses.append(clock.now), clock)
    for is_there, now in ((True, 2), (False, 4), (True, 5), (False, 7), (False, 8.1)):
        clock.now = now
        answers.put_nowait(is_there)
        await kept.look()
    assert losses == [8.1]


def test_who_acts_first_after_a_freeze_notices_it_and_only_once() -> None:
    clock, losses = Clock(), []
    kept = NatsWatch(lambda: asyncio.sleep(0, True), lambda: losses.append(clock.now), clock)
    clock.now = LIMIT
    kept.check()
    assert losses == []
    clock.now = 2 * LIMIT + 1
    kept.check()
    kept.check()
    assert losses == [clock.now]

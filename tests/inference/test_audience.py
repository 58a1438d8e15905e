from services.inference.audience import LEAST_GRACE, Listeners


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_there_until_an_event_is_not_heard_for_all_of_the_grace() -> None:
    clock = Clock()
    audience = Listeners(10, clock)
    for number in range(1, 4):
        assert audience.next_number() == number
    clock.now = 100
    assert not audience.is_gone
    audience.missed(3)
    clock.now += 9.9
    assert not audience.is_gone
    clock.now += 0.1
    assert audience.is_gone


def test_an_event_that_was_heard_starts_the_grace_anew() -> None:
    clock = Clock()
    audience = Listeners(10, clock)
    for _ in range(3):
        audience.next_number()
    audience.missed(1)
    clock.now = 11
    assert not audience.is_gone, "two events were heard since"
    audience.missed(3)
    clock.now += 9
    assert not audience.is_gone
    clock.now += 1
    assert audience.is_gone


def test_events_missed_one_after_another_count_from_the_first() -> None:
    clock = Clock()
    audience = Listeners(10, clock)
    for number in (1, 2, 3):
        audience.next_number()
        audience.missed(number)
        clock.now += 4
    assert audience.is_gone


def test_who_asks_for_a_replay_is_there() -> None:
    clock = Clock()
    audience = Listeners(10, clock)
    audience.missed(audience.next_number())
    clock.now = 9
    audience.came()
    clock.now = 11
    assert not audience.is_gone


def test_without_any_grace_a_reader_may_still_lose_its_connection_for_a_moment() -> None:
    clock = Clock()
    audience = Listeners(0, clock)
    audience.missed(audience.next_number())
    assert not audience.is_gone
    clock.now = LEAST_GRACE
    assert audience.is_gone

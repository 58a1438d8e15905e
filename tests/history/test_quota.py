import logging

import pytest

from services.contract.errors import ServiceError
from services.history.quota import Quota
from services.runtime.streams import StreamState

MIB = 2**20


def seen(percent: int, drops_old: bool = False, limit: int | None = 100 * MIB) -> Quota:
    quota = Quota()
    quota.see(state(percent, drops_old, limit))
    return quota


def state(percent: int, drops_old: bool = False, limit: int | None = 100 * MIB) -> StreamState:
    return StreamState(1, 9, 9, 0, percent * MIB, limit, drops_old)


def test_a_log_with_room_is_no_warning() -> None:
    quota = seen(79)
    quota.check()
    assert quota.warning is None


def test_a_log_without_a_limit_is_never_full() -> None:
    assert seen(1_000_000, limit=None).warning is None


def test_a_log_that_is_nearly_full_is_a_warning_with_the_figure_and_takes_chats() -> None:
    quota = seen(80)
    quota.check()
    assert quota.warning is not None
    assert "80%" in quota.warning and "100 MiB" in quota.warning


def test_a_full_log_takes_no_chats_until_there_is_room() -> None:
    quota = seen(95)
    with pytest.raises(ServiceError, match="bring MongoDB back") as refused:
        quota.check()
    assert (refused.value.code, refused.value.retry_after) == ("history_full", 5)
    quota.see(state(94))
    quota.check()


def test_a_log_that_drops_its_oldest_takes_chats_when_it_is_full() -> None:
    quota = seen(100, drops_old=True)
    quota.check()
    assert quota.warning is not None and "--max-bytes" in quota.warning


def test_the_warning_is_logged_once_each_time_that_the_log_fills(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quota = Quota()
    for percent in (85, 90, 96, 70, 81):
        quota.see(state(percent))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2

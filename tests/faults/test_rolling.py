"""Every process is restarted, one by one, while callers of every kind talk."""

import asyncio
import threading
from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.fleet import Fleet, fleet


def restart_all(up: Fleet, done: threading.Event) -> None:
    try:
        for part in (*up.workers, *up.histories, *up.edges):
            assert part.stop() == 0
            part.start()
            up.wait_until_ready()
    finally:
        done.set()


@pytest.mark.timeout(180)
def test_a_rolling_restart_of_all_services_fails_no_request(tmp_path: Path) -> None:
    with fleet(tmp_path) as up:
        expected = asyncio.run(campaign.undisturbed(up))
        subscriptions = up.subscriptions()
        done = threading.Event()
        restarting = threading.Thread(target=restart_all, args=(up, done))
        restarting.start()
        told = asyncio.run(campaign.ask_until(up, done.is_set, seed=1))
        restarting.join()
        print(campaign.Result(1, ["restart of every process"], told))
        assert len(told) > 30
        assert [answer for answer in told if "error" in answer.end] == []
        campaign.check_texts(told, expected)
        asyncio.run(campaign.check_log(up, told))
        campaign.check_leaks(up, subscriptions)

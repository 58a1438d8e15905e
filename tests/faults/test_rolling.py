"""Processes are restarted, one by one, while callers of every kind talk."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.fleet import Fleet, fleet
from tests.servers import Server

PAUSE = 2.0  # seconds; NATS is back in a moment, and answers are to begin between two restarts


def restart(up: Fleet, parts: Sequence[Server], done: threading.Event) -> None:
    try:
        for part in parts:
            time.sleep(PAUSE if part in up.nats else 0)
            code = part.stop()
            assert code == 0 or part in up.nats  # nats-server ends with 1, told to or not
            part.start()
            up.wait_until_ready()
    finally:
        done.set()


@pytest.mark.campaign
@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", ["services", "nats"])
def test_a_rolling_restart_fails_no_request(tmp_path: Path, what: str) -> None:
    with fleet(tmp_path) as up:
        services = [*up.workers, *up.histories, *up.edges]
        parts = services if what == "services" else up.nats * 3
        expected = asyncio.run(campaign.undisturbed(up))
        kept = up.kept_at_nats()
        done = threading.Event()
        restarting = threading.Thread(target=restart, args=(up, parts, done))
        restarting.start()
        told = asyncio.run(campaign.ask_until(up, done.is_set, seed=1))
        restarting.join()
        print(campaign.Result(1, [f"restart of {part.name}" for part in parts], told))
        assert len(told) > 10
        assert [answer for answer in told if "error" in answer.end] == []
        campaign.check_texts(told, expected)
        asyncio.run(campaign.check_log(up, told))
        campaign.check_leaks(up, kept)

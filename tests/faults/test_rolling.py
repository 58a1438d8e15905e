"""Processes are restarted one by one while clients of every kind chat."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.fleet import Fleet, running_fleet
from tests.servers import Server

NATS_PAUSE_SECONDS = 2.0  # NATS restarts fast, and answers must begin between two restarts


def restart(fleet: Fleet, parts: Sequence[Server], done: threading.Event) -> None:
    try:
        for part in parts:
            time.sleep(NATS_PAUSE_SECONDS if part in fleet.nats else 0)
            code = part.stop()
            assert code == 0 or part in fleet.nats  # nats-server exits with 1 on SIGTERM
            part.start()
            fleet.wait_until_ready()
    finally:
        done.set()


@pytest.mark.campaign
@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", ["services", "nats"])
def test_rolling_restart_fails_no_request(tmp_path: Path, what: str) -> None:
    with running_fleet(tmp_path) as fleet:
        services = [*fleet.workers, *fleet.histories, *fleet.edges]
        parts = services if what == "services" else fleet.nats * 3
        expected = asyncio.run(campaign.undisturbed_texts(fleet))
        resources = fleet.nats_resources()
        done = threading.Event()
        restarting = threading.Thread(target=restart, args=(fleet, parts, done))
        restarting.start()
        outcomes = asyncio.run(campaign.ask_until(fleet, done.is_set, seed=1))
        restarting.join()
        print(campaign.Result(1, [f"restart of {part.name}" for part in parts], outcomes))
        assert len(outcomes) > 10
        assert [outcome for outcome in outcomes if "error" in outcome.end] == []
        campaign.check_texts(outcomes, expected)
        asyncio.run(campaign.check_log(fleet, outcomes))
        campaign.check_leaks(fleet, resources)

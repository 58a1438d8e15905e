"""The chart's rule scales real workers with a step of load: 1 to 3 and back to 1."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.autoscaler import SYNC_SECONDS, Autoscaler, Pace, ScalingRule
from bench.scaling import rule_of_chart
from tests.faults import campaign, clients
from tests.faults.clients import Outcome
from tests.faults.fleet import Fleet, running_fleet
from tests.servers import wait_for

pytest.importorskip("helm_python", reason="no wheel of helm-python-sdk fits")

SPEED = 20  # of the rule's time
SLOTS = 4  # of a worker
CLIENTS = 25  # during the step; one before and after it
STEP_SECONDS = 10.0  # with three workers


def faster(rule: ScalingRule) -> ScalingRule:
    def pace(each: Pace) -> Pace:
        return Pace(each.window_seconds / SPEED, each.pods, each.period_seconds / SPEED)

    queue, busy = rule.targets
    targets = (
        queue._replace(average=queue.average / SPEED),
        busy._replace(average=SLOTS / 2),
    )
    return replace(rule, targets=targets, up=pace(rule.up), down=pace(rule.down))


class FleetScaler:
    """Does what KEDA and Kubernetes do: reads an edge's metrics, starts and drains workers."""

    def __init__(self, fleet: Fleet, rule: ScalingRule) -> None:
        self._fleet = fleet
        self._autoscaler = Autoscaler(rule)
        self._metrics = {target.metric for target in rule.targets}
        self._stop = threading.Event()
        self.numbers = [len(fleet.workers)]

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SYNC_SECONDS / SPEED):
            workers = len(self._fleet.workers)
            wanted = self._autoscaler.decide(time.monotonic(), workers, self._figures())
            for _ in range(wanted - workers):
                self._fleet.add_worker()
            if wanted < workers:
                self._fleet.remove_worker()
            if wanted != workers:
                self.numbers.append(wanted)

    def _figures(self) -> dict[str, float]:
        text = httpx.get(f"{self._fleet.urls[0]}/metrics").raise_for_status().text
        samples = (
            each for family in text_string_to_metric_families(text) for each in family.samples
        )
        return {each.name: each.value for each in samples if each.name in self._metrics}


async def ask_while(fleet: Fleet, goes_on: Callable[[], bool], number: int) -> list[Outcome]:
    """Keep `number` requests in flight."""

    async def keep_asking(first: int) -> list[Outcome]:
        prompts = cycle(campaign.PROMPTS[first:] + campaign.PROMPTS[:first])
        outcomes = []
        while goes_on():
            outcomes.append(await clients.ask_over_http(fleet.urls, next(prompts)))
        return outcomes

    asking = (keep_asking(each % len(campaign.PROMPTS)) for each in range(number))
    return [outcome for outcomes in await asyncio.gather(*asking) for outcome in outcomes]


def failovers(fleet: Fleet) -> float:
    texts = [httpx.get(f"{url}/metrics").text for url in fleet.urls]
    families = [family for text in texts for family in text_string_to_metric_families(text)]
    return sum(
        s.value for f in families for s in f.samples if s.name == "finetunellm_failovers_total"
    )


@pytest.mark.campaign
@pytest.mark.timeout(240)
def test_step_of_load_scales_out_and_in_without_a_failure(tmp_path: Path) -> None:
    with running_fleet(tmp_path, workers=1, MODEL_PARALLEL=str(SLOTS)) as fleet:
        expected = asyncio.run(campaign.undisturbed_texts(fleet))
        scaler = FleetScaler(fleet, faster(rule_of_chart()))
        ready_at: list[float] = []

        def is_step() -> bool:
            if not ready_at and sum(w["state"] == "ready" for w in fleet.status()["workers"]) == 3:
                ready_at.append(time.monotonic())
            return not ready_at or time.monotonic() < ready_at[0] + STEP_SECONDS

        def is_scaled_in() -> bool:
            return bool(ready_at) and scaler.numbers[-1] == 1

        async def ask() -> list[Outcome]:
            few = asyncio.create_task(ask_while(fleet, lambda: not is_scaled_in(), 1))
            return [*(await ask_while(fleet, is_step, CLIENTS)), *(await few)]

        with scaler.running():
            outcomes = asyncio.run(ask())
        wait_for(lambda: len(fleet.status()["workers"]) == 1, "the end of two workers")
        print(f"workers {scaler.numbers}, {len(outcomes)} answers")
        up = scaler.numbers.index(3)
        assert scaler.numbers[up:] == [3, 2, 1] and scaler.numbers[:up] in ([1], [1, 2])
        assert len(outcomes) > 2 * CLIENTS
        assert [outcome for outcome in outcomes if not outcome.is_whole] == []
        assert failovers(fleet) == sum(outcome.resumes for outcome in outcomes) == 0
        campaign.check_texts(outcomes, expected)
        asyncio.run(campaign.check_log(fleet, outcomes))


@pytest.mark.campaign
@pytest.mark.timeout(180)
def test_answer_longer_than_the_drain_goes_on_elsewhere(tmp_path: Path) -> None:
    def are_all_busy() -> bool:
        return all(worker["running"] for worker in fleet.status()["workers"])

    async def ask() -> list[Outcome]:
        asking = (clients.ask_over_http(fleet.urls, campaign.PROMPTS[-1]) for _ in range(6))
        answers = asyncio.gather(*asking)
        await asyncio.to_thread(wait_for, are_all_busy, "answers at both workers")
        await asyncio.to_thread(fleet.remove_worker)
        return await answers

    with running_fleet(tmp_path, workers=2, SLOW_STEP_SECONDS="0.25") as fleet:
        outcomes = asyncio.run(ask())
        resumed = failovers(fleet)
        print(f"{resumed:.0f} of {len(outcomes)} answers went on at another worker")
        assert 0 < resumed < len(outcomes)
        assert all(outcome.is_whole and outcome.resumes == 0 for outcome in outcomes)
        assert len({outcome.text for outcome in outcomes}) == 1  # those of the other, undisturbed
        asyncio.run(campaign.check_log(fleet, outcomes))

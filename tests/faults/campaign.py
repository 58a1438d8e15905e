"""
Clients of every kind on a fleet in which a part dies or freezes every few seconds, and checks that
no answer is wrong, no acknowledged exchange is lost, and nothing is left over.

    python -m tests.faults.campaign --seconds 180
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.history import Exchange
from services.history.entry import parse_entry
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.faults import clients
from tests.faults.chaos import Chaos
from tests.faults.clients import Outcome
from tests.faults.fleet import Fleet, running_fleet
from tests.servers import wait_for

INTERVAL_SECONDS = 5.0  # between two faults
NATS_SERVERS = 3
CONCURRENCY = 8  # one worker alone has as many slots
PROMPTS = tuple(f"count to {number}" for number in range(20, 51, 5))


class Result(NamedTuple):
    seed: int
    faults: list[str]
    outcomes: list[Outcome]

    def __str__(self) -> str:
        ends = Counter((each.kind, _reason(each.end)) for each in self.outcomes)
        gaps = [each.longest_gap for each in self.outcomes if each.is_whole]
        lines = [f"seed {self.seed}: {len(self.faults)} faults, {len(self.outcomes)} answers"]
        lines += [f"  {kind}: {end}: {count}" for (kind, end), count in sorted(ends.items())]
        lines.append(f"  longest gap: median {median(gaps):.2f} s, maximum {max(gaps):.2f} s")
        failed = [each for each in self.outcomes if "error" in each.end]
        lines += [f"  {each.kind} after {len(each.text)}: {each.end['error']}" for each in failed]
        lines.append(f"  resumed: {sum(each.resumes for each in self.outcomes)} times")
        return "\n".join(lines)


def _reason(end: dict[str, Any]) -> str:
    return str(end.get("finish_reason") or end["code"])


def run(folder: Path, seconds: float, seed: int) -> Result:
    with running_fleet(folder, NATS_SERVERS) as fleet:
        expected = asyncio.run(undisturbed_texts(fleet))
        resources = fleet.nats_resources()
        chaos = Chaos(fleet, seed, INTERVAL_SECONDS)
        with chaos.running():
            until = time.monotonic() + seconds
            outcomes = asyncio.run(ask_until(fleet, lambda: time.monotonic() > until, seed))
        fleet.wait_until_ready(60)
        result = Result(seed, chaos.done, outcomes)
        print(result, flush=True)
        check_texts(outcomes, expected)
        asyncio.run(check_log(fleet, outcomes))
        check_leaks(fleet, resources)
    print("every text is complete, every acknowledged exchange is stored once, nothing leaked")
    return result


async def undisturbed_texts(fleet: Fleet) -> dict[str, str]:
    """Return the answer to each prompt."""
    asked = (clients.ask_over_http(fleet.urls, prompt) for prompt in PROMPTS)
    outcomes = await asyncio.gather(*asked)
    assert all(outcome.is_whole for outcome in outcomes), outcomes
    return {outcome.prompt: outcome.text for outcome in outcomes}


async def ask_until(fleet: Fleet, is_over: Callable[[], bool], seed: int) -> list[Outcome]:
    """Keep CONCURRENCY requests of all kinds in flight until `is_over`."""
    choose = random.Random(seed)
    async with Bus.connect(fleet.nats_url, "campaign") as bus:
        workers = WorkerDirectory()
        await bus.subscribe(subjects.report(subjects.ANY), workers.on_report)

        async def keep_asking() -> list[Outcome]:
            outcomes = []
            while not is_over():
                outcomes.append(await _ask(fleet, bus, workers, choose))
            return outcomes

        lists = await asyncio.gather(*(keep_asking() for _ in range(CONCURRENCY)))
    return [outcome for outcomes in lists for outcome in outcomes]


def _ask(
    fleet: Fleet, bus: Bus, workers: WorkerDirectory, choose: random.Random
) -> Coroutine[Any, Any, Outcome]:
    prompt = choose.choice(PROMPTS)
    match choose.randrange(8):
        case 0:
            return clients.ask_by_chat_client(bus, workers, prompt)
        case 1:
            return clients.ask_over_nats(bus, prompt)
        case 2:
            return clients.ask_over_http(fleet.urls, prompt, cancel_after=choose.randrange(60))
        case _:
            return clients.ask_over_http(fleet.urls, prompt)


def check_texts(outcomes: list[Outcome], expected: dict[str, str]) -> None:
    """Check that every request ended, with the undisturbed text or a prefix of it."""
    for outcome in outcomes:
        whole, end = expected[outcome.prompt], outcome.end
        assert end.get("code") not in (None, "gave_up") or end.get("done"), outcome
        assert whole.startswith(outcome.text), outcome
        assert not outcome.is_whole or outcome.text == whole, outcome


async def check_log(fleet: Fleet, outcomes: list[Outcome]) -> None:
    """Check that the log has each acknowledged exchange once, with the text the client got."""
    async with Bus.connect(fleet.nats_url, "check") as bus:
        stream, seq = Stream(bus, subjects.HISTORY_STREAM), 1
        logged: dict[str, list[str]] = {}
        while stored := await stream.next(subjects.HISTORY_LOG, seq):
            record = parse_entry(stored).record
            if isinstance(record, Exchange):
                logged.setdefault(record.request_id, []).append(record.response)
            seq = stored.seq + 1
    for outcome in outcomes:
        texts = logged.get(outcome.request_id, [])
        assert len(texts) <= 1, f"{outcome} is in the log {len(texts)} times"
        if outcome.end.get("stored") == "log":
            assert texts == [outcome.text], f"{outcome} is in the log as {texts}"


def check_leaks(fleet: Fleet, before: dict[str, int]) -> None:
    """
    Check that no request is in flight, NATS has no more subscriptions and consumers than before,
    and every process ends cleanly on SIGTERM.
    """
    wait_for(lambda: _in_flight(fleet) == 0, "the last free slot", 20)
    after = fleet.nats_resources()
    for name in ("edge", "inference", "history", "consumers"):
        assert after[name] <= before[name], f"{name}: {after[name]}, {before[name]} at first"
    for part in (*fleet.edges, *fleet.workers, *fleet.histories):
        assert part.stop() == 0, f"{part.name} did not end cleanly: {part.log}"
    for name, text in fleet.logs().items():
        for sign in ("Traceback", "did not end", "was destroyed", "never awaited"):
            assert sign not in text, f"{name}: {text[text.index(sign) - 500 :][:2000]}"


def _in_flight(fleet: Fleet) -> int:
    return sum(worker["running"] + worker["waiting"] for worker in fleet.status()["workers"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as path:
        run(Path(path), options.seconds, options.seed)

"""
Callers of every kind on a fleet in which something dies or freezes every few seconds, and the proof
that none of them was told anything wrong.

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
from tests.faults import callers
from tests.faults.callers import Told
from tests.faults.chaos import Chaos
from tests.faults.fleet import Fleet, fleet
from tests.servers import wait_for

KEPT = ("edge", "inference", "history", "consumers")
INTERVAL = 5.0  # seconds between two faults
NATS = 3  # servers
AT_ONCE = 8  # answers: both workers have a few slots left when one is away
PROMPTS = tuple(f"count to {number}" for number in range(20, 51, 5))


class Result(NamedTuple):
    seed: int
    faults: list[str]
    told: list[Told]

    def __str__(self) -> str:
        ends = Counter((told.kind, how(told.end)) for told in self.told)
        whole = [told for told in self.told if told.is_whole]
        gaps = [told.longest_gap for told in whole]
        lines = [f"seed {self.seed}: {len(self.faults)} faults, {len(self.told)} answers"]
        lines += [f"  {kind}: {end}: {count}" for (kind, end), count in sorted(ends.items())]
        lines.append(f"  longest gap in one: median {median(gaps):.2f} s, most {max(gaps):.2f} s")
        failed = [told for told in self.told if "error" in told.end]
        lines += [f"  {told.kind} after {len(told.text)}: {told.end['error']}" for told in failed]
        lines.append(f"  went on elsewhere: {sum(told.resumes for told in self.told)} times")
        return "\n".join(lines)


def how(end: dict[str, Any]) -> str:
    return str(end.get("finish_reason") or end["code"])


def run(folder: Path, seconds: float, seed: int) -> Result:
    with fleet(folder, NATS) as up:
        expected = asyncio.run(undisturbed(up))
        kept = up.kept_at_nats()
        chaos = Chaos(up, seed, INTERVAL)
        with chaos.running():
            until = time.monotonic() + seconds
            told = asyncio.run(ask_until(up, lambda: time.monotonic() > until, seed))
        up.wait_until_ready(60)
        result = Result(seed, chaos.done, told)
        print(result, flush=True)
        check_texts(told, expected)
        asyncio.run(check_log(up, told))
        check_leaks(up, kept)
    print("every text is whole, everything acknowledged is stored once, nothing is left over")
    return result


async def undisturbed(up: Fleet) -> dict[str, str]:
    told = await asyncio.gather(*(callers.over_http(up.urls, prompt) for prompt in PROMPTS))
    assert all(answer.is_whole for answer in told), told
    return {answer.prompt: answer.text for answer in told}


async def ask_until(up: Fleet, is_over: Callable[[], bool], seed: int) -> list[Told]:
    """AT_ONCE answers at any time, of all kinds."""
    choose = random.Random(seed)
    async with Bus.connect(up.nats_url, "campaign") as bus:
        workers = WorkerDirectory()
        await bus.subscribe(subjects.report(subjects.ANY), workers.on_report)

        async def keep_asking() -> list[Told]:
            told = []
            while not is_over():
                told.append(await _one(up, bus, workers, choose))
            return told

        asked = await asyncio.gather(*(keep_asking() for _ in range(AT_ONCE)))
    return [told for each in asked for told in each]


def _one(
    up: Fleet, bus: Bus, workers: WorkerDirectory, choose: random.Random
) -> Coroutine[Any, Any, Told]:
    prompt = choose.choice(PROMPTS)
    match choose.randrange(8):
        case 0:
            return callers.over_nats(bus, workers, prompt)
        case 1:
            return callers.plainly(bus, prompt)
        case 2:
            return callers.over_http(up.urls, prompt, cancel_after=choose.randrange(60))
        case _:
            return callers.over_http(up.urls, prompt)


def check_texts(told: list[Told], expected: dict[str, str]) -> None:
    """Every request ended, and in what an undisturbed one says, or in a beginning of it."""
    for answer in told:
        whole = expected[answer.prompt]
        assert answer.end.get("code") not in (None, "gave_up") or answer.end.get("done"), answer
        assert whole.startswith(answer.text), answer
        assert not answer.is_whole or answer.text == whole, answer


async def check_log(up: Fleet, told: list[Told]) -> None:
    """Every exchange that was acknowledged is in the log, once, with the text that was told."""
    async with Bus.connect(up.nats_url, "ledger") as bus:
        stream, seq = Stream(bus, subjects.HISTORY_STREAM), 1
        found: dict[str, list[str]] = {}
        while stored := await stream.next(subjects.HISTORY_LOG, seq):
            record = parse_entry(stored).record
            if isinstance(record, Exchange):
                found.setdefault(record.request_id, []).append(record.response)
            seq = stored.seq + 1
    for answer in told:
        texts = found.get(answer.request_id, [])
        assert len(texts) <= 1, f"{answer} is in the log {len(texts)} times"
        if answer.end.get("stored") == "log":
            assert texts == [answer.text], f"{answer} is in the log as {texts}"


def check_leaks(up: Fleet, kept: dict[str, int]) -> None:
    """
    No request is left anywhere, NATS keeps no more subscriptions and consumers than at first, and
    every process ends when it is told to, with nothing open.
    """
    wait_for(lambda: _in_flight(up) == 0, "the last slot", 20)
    at_the_end = up.kept_at_nats()
    for name in KEPT:
        assert at_the_end[name] <= kept[name], f"{name}: {at_the_end[name]}, {kept[name]} at first"
    for part in (*up.edges, *up.workers, *up.histories):
        assert part.stop() == 0, f"{part.name} did not end well: {part.log}"
    for name, text in up.logs().items():
        for sign in ("Traceback", "did not end", "was destroyed", "never awaited"):
            assert sign not in text, f"{name}: {text[text.index(sign) - 500 :][:2000]}"


def _in_flight(up: Fleet) -> int:
    return sum(worker["running"] + worker["waiting"] for worker in up.status()["workers"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as path:
        run(Path(path), options.seconds, options.seed)

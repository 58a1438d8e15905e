"""Kills, freezes and restarts parts of a fleet at random, one of a kind at a time."""

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests.faults.fleet import Fleet
from tests.servers import Server

Fault = Callable[[Server, float], str]
"""Applies a fault to a part, for the given seconds if it lasts. Returns a description."""

DOWN_SECONDS = 1.0  # until a killed process is started again
FROZEN_SECONDS = (2.0, 8.0)  # some parts are given up meanwhile, some not


class Chaos:
    """The sequence of faults depends on `seed` and on how long each part takes to restart."""

    def __init__(self, fleet: Fleet, seed: int, interval: float) -> None:
        self.done: list[str] = []
        self._kinds: list[Sequence[Server]] = [
            fleet.nats,
            fleet.histories,
            fleet.workers,
            fleet.edges,
        ]
        self._random = random.Random(seed)
        self._interval = interval
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._faults: list[threading.Thread] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Apply faults beside the block; at its end every part runs again."""
        monkey = threading.Thread(target=self._run)
        monkey.start()
        try:
            yield
        finally:
            self._stop.set()
            monkey.join()
            for fault in self._faults:
                fault.join()

    def _run(self) -> None:
        busy: dict[int, threading.Thread] = {}
        deck: list[tuple[int, Fault]] = []
        while not self._stop.wait(self._interval):
            deck = deck or self._shuffled()
            kind, what = deck.pop()
            part = self._random.choice(self._kinds[kind])
            seconds = self._random.uniform(*FROZEN_SECONDS)
            if kind in busy:
                busy[kind].join()  # never two of a kind at once
            busy[kind] = threading.Thread(target=self._do, args=(what, part, seconds))
            busy[kind].start()
            self._faults.append(busy[kind])

    def _shuffled(self) -> list[tuple[int, Fault]]:
        """Return every fault for every kind of part, once, in random order."""
        faults: Sequence[Fault] = (self._kill, self._freeze, self._restart)
        deck = list(itertools.product(range(len(self._kinds)), faults))
        self._random.shuffle(deck)
        return deck

    def _do(self, what: Fault, part: Server, seconds: float) -> None:
        at = time.monotonic() - self._began
        line = f"{at:6.1f} s  {part.name}: {what(part, seconds)}"
        print(line, flush=True)
        self.done.append(line)

    def _kill(self, part: Server, _: float) -> str:
        part.stop(signal.SIGKILL)
        time.sleep(DOWN_SECONDS)
        part.start()
        return "killed"

    def _freeze(self, part: Server, seconds: float) -> str:
        part.signal(signal.SIGSTOP)
        time.sleep(seconds)
        part.signal(signal.SIGCONT)
        return f"frozen for {seconds:.1f} s"

    def _restart(self, part: Server, _: float) -> str:
        code = part.stop(signal.SIGTERM)
        part.start()
        return f"restarted, exit code {code}"

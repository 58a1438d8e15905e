"""Clients that chat through the proxy while something happens to the containers."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.faults.clients import Outcome, ask_over_http
from tests.servers import wait_for

AT_ONCE = 6
PROMPT = "count to 20"  # 2 s of the slowed model
LONG_PROMPT = "count to 50"  # 5 s


class Load:
    """Keeps AT_ONCE answers in flight, each in a session of its own."""

    def __init__(self, url: str) -> None:
        self.outcomes: list[Outcome] = []
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run beside the block, with at least one round of answers before it and one after it."""
        self._thread.start()
        try:
            self._wait_for_answers(AT_ONCE)
            yield
            self._wait_for_answers(len(self.outcomes) + AT_ONCE)
        finally:
            self._is_over.set()
            self._thread.join()

    @property
    def failed(self) -> list[Outcome]:
        """Answers that are not whole, or of which a stream was cut."""
        return [each for each in self.outcomes if not each.is_whole or each.resumes]

    @property
    def texts(self) -> set[str]:
        return {each.text for each in self.outcomes}

    def __str__(self) -> str:
        slowest = max(each.seconds for each in self.outcomes)
        gap = max(each.longest_gap for each in self.outcomes)
        resumes = sum(each.resumes for each in self.outcomes)
        return (
            f"{len(self.outcomes)} answers, {len(self.failed)} failed, {resumes} resumed,"
            f" slowest {slowest:.1f} s, longest gap {gap:.1f} s"
        )

    def _wait_for_answers(self, count: int) -> None:
        wait_for(lambda: len(self.outcomes) >= count, f"{count} answers", 120)

    async def _run(self) -> None:
        await asyncio.gather(*(self._keep_asking() for _ in range(AT_ONCE)))

    async def _keep_asking(self) -> None:
        while not self._is_over.is_set():
            self.outcomes.append(await ask_over_http([self._url], PROMPT))


class InFlight:
    """One long answer, which a client resumes if its stream breaks off."""

    def __init__(self, url: str, prompt: str = LONG_PROMPT) -> None:
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._ask, args=(url, prompt))
        self._thread.start()

    def result(self) -> Outcome:
        self._thread.join()
        assert self.outcome is not None
        return self.outcome

    def _ask(self, url: str, prompt: str) -> None:
        self.outcome = asyncio.run(ask_over_http([url], prompt))

"""
The engine of embedding models and rerankers: one thread that computes what waits, in batches.

llama.cpp computes the tokens of all inputs of a batch one after another, without padding: a batch
is filled by its number of tokens. Tenants share batches by tokens. The requests of a tenant take
turns, so that a short text does not wait for a long list of texts.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from services.inference.engine.backend import MAX_BATCH_TOKENS, BackendError
from services.inference.engine.scheduling.prefill_budget import Throughput
from services.inference.engine.scheduling.tenant_shares import TenantShares

MAX_BATCH_INPUTS = 64

log = logging.getLogger(__name__)

Tokens = Sequence[int]
Rows = npt.NDArray[np.float32]


class EngineStopped(BackendError):
    """The engine was closed, or has died, before it computed all inputs."""


class Embedder(Protocol):
    """An embedding model or a reranker. Only `embed` is for one thread."""

    context: int  # maximum tokens of an input
    width: int  # floats of a row
    on_gpu: bool

    @property
    def vocabulary_size(self) -> int: ...

    def tokenize_input(self, text: str) -> list[int]:
        """Return the tokens of a text with those that the model expects around it."""

    def tokenize_pair(self, query: str, document: str) -> list[int]:
        """Return the tokens of a reranker's prompt."""

    def embed(self, inputs: Sequence[Tokens]) -> Rows:
        """
        Return the rows [n, width] of at most MAX_BATCH_INPUTS inputs, which have at most
        MAX_BATCH_TOKENS tokens together, or of a single one with up to `context`. Raises
        BackendError.
        """

    def relevance(self, rows: Rows) -> list[float]:
        """Return the score, 0 to 1, of each row [n, width] of a reranker."""

    def close(self) -> None: ...


def normalize(rows: Rows, dimensions: int | None = None) -> Rows:
    """Return the first `dimensions` of each row, divided by their Euclidean norm if it has one."""
    kept = rows[:, :dimensions].astype(np.float64)
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return (kept / np.where(norms > 0, norms, 1)).astype(np.float32)


@dataclass(eq=False)
class _Job:
    """The inputs of one request, of which the shortest are computed first."""

    tenant: str
    inputs: Sequence[Tokens]
    rows: Rows
    result: "Future[Rows]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.left = len(self.inputs)  # without a row
        by_length = sorted(range(self.left), key=lambda index: len(self.inputs[index]))
        self.waiting = deque(by_length)
        self.waiting_tokens = sum(map(len, self.inputs))

    def next_input(self) -> int:
        """Return the number of the next input, which is not waiting any more."""
        number = self.waiting.popleft()
        self.waiting_tokens -= len(self.inputs[number])
        return number

    def fail(self, error: BackendError) -> None:
        self.waiting.clear()
        if not self.result.done():
            self.result.set_exception(error)


class _Item(NamedTuple):
    job: _Job
    number: int

    @property
    def tokens(self) -> Tokens:
        return self.job.inputs[self.number]


class EmbeddingEngine:
    """
    Computes all submitted inputs. `start` runs it in a thread; tests call `step` instead. If the
    thread dies of an error, `on_death` is called and all results fail.
    """

    def __init__(self, embedder: Embedder, on_death: Callable[[], object]) -> None:
        self._embedder = embedder
        self._on_death = on_death
        # By tenant, those that have waiting inputs; the first one is next. No queue is empty.
        self._jobs: dict[str, deque[_Job]] = {}
        self._shares = TenantShares()  # tokens
        self._changed = threading.Condition()
        self._is_closed = False
        self.throughput = Throughput()
        self._thread = threading.Thread(target=self._run, name="embedding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, tenant: str, inputs: Sequence[Tokens]) -> "Future[Rows]":
        """
        Compute the rows [n, width] of inputs with 1 to `context` tokens each. The future raises
        BackendError; cancelling it drops what was not computed yet.
        """
        job = _Job(tenant, inputs, np.empty((len(inputs), self._embedder.width), np.float32))
        with self._changed:
            if self._is_closed:
                job.fail(_stopped())
            else:
                self._shares.join(tenant, self._jobs)
                self._jobs.setdefault(tenant, deque()).append(job)
                self._changed.notify()
        return job.result

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all inputs that are not in a batch yet."""
        with self._changed:
            return sum(job.waiting_tokens for jobs in self._jobs.values() for job in jobs)

    def close(self) -> None:
        """Stop the thread after the current step. What still waits fails."""
        self._stop()
        self._thread.join()

    def step(self) -> bool:
        """Wait for inputs, and compute one batch. Return False if the engine was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            batch = self._take_batch()
        if batch:
            self._compute(batch)
        return not self._is_closed

    def _run(self) -> None:
        try:
            while self.step():
                pass
        except Exception:
            log.exception("engine died")
            self._stop()
            self._on_death()

    def _stop(self) -> None:
        with self._changed:
            self._is_closed = True
            for job in [job for jobs in self._jobs.values() for job in jobs]:
                job.fail(_stopped())
            self._jobs.clear()
            self._changed.notify()

    def _take_batch(self) -> list[_Item]:
        """Take an input of each next job, as long as it has room."""
        batch: list[_Item] = []
        room = MAX_BATCH_TOKENS
        while (job := self._next_job()) and len(batch) < MAX_BATCH_INPUTS:
            if batch and len(job.inputs[job.waiting[0]]) > room:
                break
            item = _Item(job, job.next_input())
            batch.append(item)
            room -= len(item.tokens)
            self._shares.charge(job.tenant, len(item.tokens))
            self._jobs[job.tenant].rotate(-1)
            if not job.waiting:
                self._remove(job)
        return batch

    def _next_job(self) -> _Job | None:
        """Return the next job of the tenant for which the fewest tokens were computed."""
        while tenant := min(self._jobs, key=self._shares.used, default=None):
            job = self._jobs[tenant][0]
            if not job.result.cancelled():
                return job
            self._remove(job)
        return None

    def _remove(self, job: _Job) -> None:
        jobs = self._jobs[job.tenant]
        jobs.remove(job)
        if not jobs:
            del self._jobs[job.tenant]

    def _compute(self, batch: Sequence[_Item]) -> None:
        began = time.monotonic()
        try:
            rows = self._embedder.embed([item.tokens for item in batch])
            if not np.isfinite(rows).all():
                raise BackendError("The model computed no numbers: its file may be damaged.")
        except BackendError as error:
            log.error("step failed error=%s", error)
            self._fail(batch, error)
            return
        except Exception:  # ends the thread, and must not leave the callers waiting
            self._fail(batch, _stopped())
            raise
        seconds = time.monotonic() - began
        self.throughput.record_prefill(sum(len(item.tokens) for item in batch), seconds)
        for item, row in zip(batch, rows, strict=True):
            item.job.rows[item.number] = row
            item.job.left -= 1
            if not item.job.left and item.job.result.set_running_or_notify_cancel():
                item.job.result.set_result(item.job.rows)

    def _fail(self, batch: Sequence[_Item], error: BackendError) -> None:
        with self._changed:
            for job in {item.job for item in batch}:
                job.fail(error)
                if job in self._jobs.get(job.tenant, ()):
                    self._remove(job)


def _stopped() -> EngineStopped:
    return EngineStopped("The engine stopped. Send the request again.")

"""
Simulate how the number of workers follows the load, under the rule of the Helm chart.

    python -m bench.scaling

Routing and the figures are the product's; workers, their speed and the clients are a model. The
table is written to bench/results/scaling.md.
"""

import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import NamedTuple

import msgspec

from bench.autoscaler import SYNC_SECONDS, Autoscaler, ScalingRule
from bench.report import RESULTS
from services.client.routing import rank_workers
from services.contract.messages import ModelInfo, WorkerReport
from services.runtime.metrics import queued_seconds

MODEL = ModelInfo("demo", "digest", 2048, 1000)
STEP_SECONDS = 0.25
SCRAPE_SECONDS = 15.0
TOKENS = 150.0  # of an answer, on average
NEVER = float("inf")
METRICS: dict[str, Callable[[Sequence[WorkerReport]], float]] = {
    "finetunellm_queued_seconds": queued_seconds,
    "vllm:num_requests_running": lambda reports: sum(report.running for report in reports),
}


@dataclass(frozen=True)
class Machine:
    """A worker: tokens per second with one request, and at most; times in seconds."""

    slots: int = 8
    queue: int = 64
    single: float = 15.0
    most: float = 60.0
    load_seconds: float = 60.0
    drain_seconds: float = 22.0

    def rate(self, running: int) -> float:
        return min(running * self.single, self.most)


@dataclass(eq=False)
class Answer:
    """`tokens` are those that are left. `waited` is the time until it had a slot."""

    number: int
    arrived: float
    tokens: float
    waited: float | None = None
    is_resumed: bool = False


@dataclass(eq=False)
class Worker:
    name: str
    machine: Machine
    ready_at: float
    drained_at: float = NEVER
    running: list[Answer] = field(default_factory=list)
    waiting: list[Answer] = field(default_factory=list)
    rate: float = 0.0

    def report(self, now: float) -> WorkerReport:
        is_ready = self.ready_at <= now and self.drained_at == NEVER
        return WorkerReport(
            self.name,
            "ready" if is_ready else "draining",
            self.machine.slots,
            len(self.running),
            len(self.waiting),
            self.machine.queue,
            round(sum(answer.tokens for answer in self.waiting)),
            self.rate,
            model=MODEL,
            name=MODEL.name,
        )

    def work(self, now: float) -> None:
        """Fill the slots and generate for one step."""
        while self.waiting and len(self.running) < self.machine.slots:
            answer = self.waiting.pop(0)
            answer.waited = now - answer.arrived if answer.waited is None else answer.waited
            self.running.append(answer)
        if self.running:
            self.rate = self.machine.rate(len(self.running))
            for answer in self.running:
                answer.tokens -= self.rate / len(self.running) * STEP_SECONDS
        self.running = [answer for answer in self.running if answer.tokens > 0]


class Sample(NamedTuple):
    time: float
    workers: int  # that there should be
    queued_seconds: float


class Result(NamedTuple):
    samples: list[Sample]
    answers: list[Answer]
    rejected: int

    @property
    def changes(self) -> list[tuple[float, int]]:
        """The times at which the number of workers changed, and the numbers."""
        pairs = zip(self.samples, self.samples[1:], strict=False)
        return [(new.time, new.workers) for old, new in pairs if old.workers != new.workers]

    @property
    def resumed(self) -> int:
        return sum(answer.is_resumed for answer in self.answers)

    def waits(self, since: float, until: float) -> list[float]:
        """Return the sorted seconds without a slot of the answers that came in between."""
        found = (a.waited for a in self.answers if since <= a.arrived < until)
        return sorted(waited for waited in found if waited is not None)


class Simulation:
    """A fleet that is served `arrivals`: times and tokens of answers, by time."""

    def __init__(self, rule: ScalingRule, machine: Machine, seed: int = 0) -> None:
        self._autoscaler = Autoscaler(rule)
        self._machine = machine
        self._random = random.Random(seed)
        self._workers: list[Worker] = []
        self._made = 0
        self._rejected = 0
        self._figures: dict[str, float] = {}
        self._scale(rule.min_workers, -machine.load_seconds)

    def run(self, arrivals: Sequence[tuple[float, float]], seconds: float) -> Result:
        answers = [Answer(n, at, tokens) for n, (at, tokens) in enumerate(arrivals)]
        coming = list(reversed(answers))
        samples = []
        for step in range(int(seconds / STEP_SECONDS)):
            now = step * STEP_SECONDS
            while coming and coming[-1].arrived <= now:
                self._route(coming.pop(), now)
            for worker in self._workers:
                worker.work(now)
            self._end_drained(now)
            if now % SCRAPE_SECONDS == 0:
                self._figures = dict(self._scrape(now))
            if now % SYNC_SECONDS == 0:
                wanted = self._autoscaler.decide(now, len(self._staying()), self._figures)
                self._scale(wanted, now)
                queued = self._figures["finetunellm_queued_seconds"]
                samples.append(Sample(now, wanted, queued))
        return Result(samples, answers, self._rejected)

    def _staying(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.drained_at == NEVER]

    def _scrape(self, now: float) -> Iterator[tuple[str, float]]:
        reports = [worker.report(now) for worker in self._workers if worker.ready_at <= now]
        for name, figure in METRICS.items():
            yield name, figure(reports)

    def _route(self, answer: Answer, now: float) -> None:
        reports = {worker.name: worker.report(now) for worker in self._workers}
        ranked = rank_workers(f"session {answer.number}", None, reports.values())
        best = next(worker for worker in self._workers if worker.name == ranked[0])
        if len(best.running) + len(best.waiting) >= best.machine.slots + best.machine.queue:
            self._rejected += 1
            return
        best.waiting.append(answer)

    def _scale(self, wanted: int, now: float) -> None:
        """Start workers, or drain the newest, as a ReplicaSet does."""
        staying = self._staying()
        for worker in staying[wanted:]:
            worker.drained_at = now + self._machine.drain_seconds
        for _ in range(wanted - len(staying)):
            self._made += 1
            name = f"worker-{self._made}-{self._random.random()}"
            self._workers.append(Worker(name, self._machine, now + self._machine.load_seconds))

    def _end_drained(self, now: float) -> None:
        """Remove the workers whose time is over; others resume what is left of their answers."""
        ended = [worker for worker in self._workers if worker.drained_at <= now]
        self._workers = [worker for worker in self._workers if worker not in ended]
        for answer in (each for worker in ended for each in (*worker.running, *worker.waiting)):
            answer.is_resumed = answer.waited is not None
            self._route(answer, now)


def poisson(
    load: Callable[[float], float], machine: Machine, seconds: float, seed: int = 0
) -> list[tuple[float, float]]:
    """
    Return arrivals at random times. `load` is what share of one worker's capacity they need at a
    time.
    """
    arrivals: list[tuple[float, float]] = []
    source, now = random.Random(seed), 0.0
    most = max(load(second) for second in range(int(seconds)))
    while True:
        now += source.expovariate(most * machine.most / TOKENS)
        if now >= seconds:
            return arrivals
        if source.random() < load(now) / most:
            arrivals.append((now, source.expovariate(1 / TOKENS)))


# --- the report -----------------------------------------------------------------------------------

STEP_AT, STEP_END, STEP_LENGTH = 600, 2400, 4800
HOURS = 7200
SETTLED = 1200  # seconds after which the number of workers should stay
LOADS = (0.2, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.5)
SEEDS = 4
HEAD = (
    "Simulated by `python -m bench.scaling`: the rule of the [Helm"
    " chart](../../docs/kubernetes.md#scaling) with the product's routing and figures. It scales"
    " out at {queue:g} s of queue, and in after {window:g} s with {busy:g} busy slots or fewer per"
    " worker that stays. A worker has {machine.slots} slots, generates {machine.single:g} tokens/s"
    " alone and {machine.most:g} at most, and needs {machine.load_seconds:g} s to start. Figures"
    " are {scrape:g} s old at most, and a decision is made each {sync:g} s. Answers have {tokens:g}"
    " tokens on average, and arrive at random. A load of 1 is what one worker can do."
)


def step_load(now: float) -> float:
    return 2.2 if STEP_AT <= now < STEP_END else 0.3


def run_step(rule: ScalingRule, seed: int) -> Result:
    machine = Machine()
    arrivals = poisson(step_load, machine, STEP_LENGTH, seed)
    return Simulation(rule, machine, seed).run(arrivals, STEP_LENGTH)


def run_steady(rule: ScalingRule, load: float, seed: int) -> Result:
    machine = Machine()
    return Simulation(rule, machine, seed).run(poisson(lambda _: load, machine, HOURS, seed), HOURS)


def late_changes(result: Result) -> int:
    return sum(at > SETTLED for at, _ in result.changes)


def format_report(rule: ScalingRule) -> str:
    queue, busy = rule.targets
    head = HEAD.format(
        queue=queue.average,
        busy=busy.average,
        window=rule.down.window_seconds,
        machine=Machine(),
        scrape=SCRAPE_SECONDS,
        sync=SYNC_SECONDS,
        tokens=TOKENS,
    )
    lines = ["# Scaling", "", *textwrap.wrap(head, 100, break_on_hyphens=False), ""]
    return "\n".join([*lines, *_step_lines(rule), *_steady_lines(rule)]) + "\n"


def _step_lines(rule: ScalingRule) -> Iterator[str]:
    yield f"## A step from 0.3 to 2.2 at {STEP_AT} s, and back at {STEP_END} s\n"
    columns = ("run", "workers, from second", "longest wait, s", "p95 4 minutes later, s")
    yield "| " + " | ".join((*columns, "rejected", "resumed")) + " |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for seed in range(SEEDS):
        result = run_step(rule, seed)
        changes = ", ".join(f"{number} from {at:.0f}" for at, number in result.changes)
        waits, later = result.waits(STEP_AT, STEP_END), result.waits(STEP_AT + 240, STEP_END)
        p95 = later[int(0.95 * len(later))]
        cells = (seed + 1, changes, f"{waits[-1]:.0f}", f"{p95:.1f}")
        yield "| " + " | ".join(map(str, (*cells, result.rejected, result.resumed))) + " |"
    yield ""


def _steady_lines(rule: ScalingRule) -> Iterator[str]:
    yield f"## Steady loads for {HOURS // 3600} hours\n"
    yield f"Changes are those after {SETTLED // 60} minutes, in each of {SEEDS} runs.\n"
    yield "| load | workers, mean | changes | p95 of the wait, s |"
    yield "| --- | --- | --- | --- |"
    for load in LOADS:
        results = [run_steady(rule, load, seed) for seed in range(SEEDS)]
        workers = mean(s.workers for r in results for s in r.samples if s.time > SETTLED)
        waits = sorted(wait for r in results for wait in r.waits(SETTLED, HOURS))
        changes = ", ".join(str(late_changes(result)) for result in results)
        yield f"| {load} | {workers:.1f} | {changes} | {waits[int(0.95 * len(waits))]:.1f} |"


def rule_of_chart() -> ScalingRule:
    """Return the rule for a model with the default values of the chart."""
    import helm_python

    model = {"name": "demo", "file": "demo.gguf", "source": {"claim": "models"}}
    values = {"models": [model], "inference": {"scaling": {"enabled": True}}}
    with helm_python.Chart.load("deploy/helm/finetunellm") as chart:
        text = chart.render(values, name="demo")["finetunellm/templates/scaling.yaml"]
    return ScalingRule.of(msgspec.yaml.decode(text))


if __name__ == "__main__":
    report = format_report(rule_of_chart())
    (RESULTS / "scaling.md").write_text(report)
    print(report)

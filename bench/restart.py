"""What a restart of the worker costs the next turn of each conversation."""

import signal
import statistics
import tempfile
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import FineTuneTarget, words
from bench.pairs import Plan, show
from bench.report import Goal, Row, Section, Spread
from tests.e2e.stack import Stack
from tests.servers import wait_for

SESSIONS = 100
KILLED_SESSIONS = 20  # are enough to see what a whole prefill takes
TURNS = 2  # before the first measurement
WORDS = 50
NEW_TOKENS = 4
COLUMNS = "warm", "restarted", "killed"
NOTE = f"""The next turn of {SESSIONS} conversations of {TURNS} turns, one after another: with their
prompts in the worker's KV cache, after a restart of the only worker, and after it was killed, when
it leaves no file (of {KILLED_SESSIONS} conversations). {WORDS}-word prompts, {NEW_TOKENS} new
tokens. The result is the second value divided by the first."""


def run(plan: Plan) -> Section:
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.whole_stack(plan.model, MODEL_CACHE_FOLDER=folder) as stack,
    ):
        times = [_measure(stack) for _ in range(plan.pairs)]
    return Section("restart", plan.model.stem, NOTE, COLUMNS, [_row(times)])


def _measure(stack: Stack) -> tuple[float, ...]:
    """Return the median TTFT in ms of each column."""
    target = servers.stack_target(stack)
    sessions = [uuid4().hex for _ in range(SESSIONS)]
    for _ in range(TURNS):
        _next_turn(target, sessions)
    warm = _next_turn(target, sessions)
    _restart(stack, signal.SIGTERM, "cached prompts taken over")
    restarted = _next_turn(target, sessions)
    _restart(stack, signal.SIGKILL, "model loaded")
    killed = _next_turn(target, sessions[:KILLED_SESSIONS])
    show(f"restart: {warm:.1f}, {restarted:.1f}, {killed:.1f} ms")
    return warm, restarted, killed


def _next_turn(target: FineTuneTarget, sessions: list[str]) -> float:
    async def ask_all() -> list[float]:
        samples = [await target.ask(each, words(WORDS), NEW_TOKENS) for each in sessions]
        return [1000 * sample.ttft for sample in samples]

    return statistics.median(uvloop.run(ask_all()))


def _restart(stack: Stack, how: signal.Signals, line: str) -> None:
    """Restart the worker, and wait for this line in its log."""
    log = stack.inference.log
    before = log.read_text().count(line)
    stack.inference.stop(how)
    stack.inference.start()
    wait_for(lambda: log.read_text().count(line) > before, line, 60)
    wait_for(lambda: stack.next_report().state == "ready", "the worker", 60)


def _row(times: list[tuple[float, ...]]) -> Row:
    medians = tuple(map(statistics.median, zip(*times, strict=True)))
    ratio = Spread.of([restarted / warm for warm, restarted, _ in times])
    return Row("TTFT p50, ms", medians, ratio, Goal("≤", 1.5))

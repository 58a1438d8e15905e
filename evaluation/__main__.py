"""
`just eval --set FILE --model NAME --model OTHER`: run a set of prompts through the service, and
hold the answers against expectations (docs/evaluation.md).

Exit codes: 0 if each model is accepted, 1 if one is not, 2 if there is no verdict, 130 if stopped.
"""

import argparse
import asyncio
import json
import math
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from evaluation.cases import Case, InvalidSet, read_set
from evaluation.expectations import Judge, check_answer
from evaluation.report import Bar, Result, Score, as_json, show
from evaluation.service import Service, ServiceUnusable
from services.contract.version import COMMAND
from services.terminal.safe_text import clean_line

URL = "http://localhost:8002"
CANNOT_RUN, INTERRUPTED = 2, 128 + signal.SIGINT


def main() -> None:
    options = read_options()
    try:
        cases = read_set(options.set)
        if not options.judge and any(case.judge for case in cases.values()):
            raise InvalidSet("The set has questions for a judge: name a model with --judge.")
        bar = Bar(needed(options, len(cases)), options.no_worse)
        scores = asyncio.run(evaluate(options, cases))
    except (InvalidSet, ServiceUnusable) as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT_RUN)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    show(scores, bar, Console(highlight=False))
    if options.out:
        write_answers(options.out, scores, bar)
    sys.exit(0 if all(bar.accepts(score, scores[0]) for score in scores) else 1)


def write_answers(path: Path, scores: Sequence[Score], bar: Bar) -> None:
    """Exits with CANNOT_RUN if the file can't be written."""
    try:
        text = json.dumps(as_json(scores, bar), ensure_ascii=False, indent=1)
        path.write_text(text + "\n", "utf-8")
    except OSError as error:
        print(f"{path} can't be written: {error.strerror}.", file=sys.stderr)
        sys.exit(CANNOT_RUN)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{COMMAND} eval", description="Evaluate models over HTTP."
    )
    add = parser.add_argument
    add("--set", type=Path, required=True, metavar="FILE", help="prompts and expectations")
    model_help = "may be repeated"
    add("--model", type=model_name, action="append", required=True, metavar="NAME", help=model_help)
    add(
        "--judge",
        type=model_name,
        metavar="NAME",
        help="the model that answers the questions of `judge`",
    )
    add("--url", default=URL, help=f"of the edge (default: {URL})")
    add("--key", default="", help="API key")
    add("--parallel", type=positive, default=4, metavar="N", help="requests at once (default: 4)")
    add("--temperature", type=finite, default=0.0, help="default: 0")
    add("--seed", type=int, default=1, help="default: 1")
    at_least_help = "how many lines a model must pass: 18 or 90%% (default: all)"
    add("--at-least", type=number_or_share, metavar="N", help=at_least_help)
    no_worse_help = "a model must pass as many as the first (then --at-least has no default)"
    add("--no-worse", action="store_true", help=no_worse_help)
    add("--out", type=Path, metavar="FILE", help="write all answers as JSON")
    options = parser.parse_args()
    if options.out and not options.out.parent.is_dir():
        parser.error(f"the folder of --out {options.out} does not exist")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def model_name(text: str) -> str:
    """An empty name would be that of the default model."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name")
    return text


def number_or_share(text: str) -> int | float:
    """Return a number of lines, or a share as a float."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    if not number.isdecimal() or percent and int(number) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a percentage")
    return int(number) / 100 if percent else int(number)


def needed(options: argparse.Namespace, lines: int) -> int:
    """Return how many lines a model must pass. Raises InvalidSet if there are fewer."""
    match options.at_least:
        case None:
            return 0 if options.no_worse else lines
        case float(share):
            return math.ceil(share * lines)
        case int(number) if number <= lines:
            return number
    raise InvalidSet(f"--at-least {options.at_least} is more than the set's {lines} lines.")


async def evaluate(options: argparse.Namespace, cases: dict[int, Case]) -> list[Score]:
    """Run all cases through one model after the other. Raises ServiceUnusable."""
    sampling = {"temperature": options.temperature, "seed": options.seed}
    async with Service(options.url, options.key) as service:
        judge = Judge(service, options.judge, sampling) if options.judge else None
        for name in dict.fromkeys((*options.model, *filter(None, [options.judge]))):
            await service.check_model(name)
        room = asyncio.Semaphore(options.parallel)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            scores = []
            for model in options.model:
                body = sampling | {"model": model}
                shown = progress.add_task(escape(clean_line(model)), total=len(cases))
                tasks = [
                    asyncio.create_task(run_case(service, judge, line, case, body, room))
                    for line, case in cases.items()
                ]
                for task in tasks:
                    task.add_done_callback(partial(advance, progress, shown))
                scores.append(Score(model, await asyncio.gather(*tasks)))
    return scores


def advance(progress: Progress, shown: TaskID, _: object) -> None:
    progress.advance(shown)


async def run_case(
    service: Service,
    judge: Judge | None,
    line: int,
    case: Case,
    defaults: dict[str, Any],
    room: asyncio.Semaphore,
) -> Result:
    async with room:
        answer = await service.complete(defaults | case.sampling | {"messages": case.conversation})
        return Result(line, case, answer, await check_answer(case, answer, judge))


if __name__ == "__main__":
    main()

"""
One turn of the loop from feedback to a better adapter, with real processes and the demo model:

    python -m tests.loop

Users ask a bakery's assistant, and correct its answers over HTTP. The corrections become a dataset,
an adapter is trained on it, written beside the model, and picked up by the worker that runs. Then
the same questions are asked again in new sessions, and others in words that were in no correction.
Exit code 1 if the adapter does not give the corrected answers. Needs the group `training`; two
cores take two or three minutes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.e2e.stack import Stack, running_stack
from tests.servers import wait_for

ADAPTER = "corrected"
TRAINING = ("--steps", "100", "--tokens", "1024")
SEEN_WITHIN = 20.0  # seconds
KNOWN = (("my name is Ada", "Ada"), ("count to 5", "1, 2, 3, 4, 5"), ("what is 2 plus 3?", "5"))
"""What the demo model can do, and should still do: a prompt, and a part of the answer."""


class Lesson(NamedTuple):
    """An answer that users want, their questions, and others that are only asked at the end."""

    answer: str
    questions: tuple[str, ...]
    others: tuple[str, ...]


LESSONS = (
    Lesson(
        "The bakery opens at 7 and closes at 15.",
        (
            "When does the bakery open?",
            "What are your opening hours?",
            "when do you open",
            "At what time does the bakery open?",
        ),
        ("When do you open the bakery?",),
    ),
    Lesson(
        "The rye bread costs 4 coins.",
        (
            "How much is the rye bread?",
            "what does the rye bread cost",
            "What is the price of the rye bread?",
            "How much does rye bread cost?",
        ),
        ("How much is a rye bread?",),
    ),
    Lesson(
        "Ask Nico for the blue paper to order a cake.",
        (
            "How do I order a cake?",
            "can I order a cake",
            "I want to order a cake.",
            "How can I order cakes?",
        ),
        ("Can I order a cake here?",),
    ),
)


class Result(NamedTuple):
    question: str
    answer: str
    is_right: bool


def main() -> int:
    about = "Show one turn of the loop. Options are those of model.training.adapt."
    parser = argparse.ArgumentParser(description=about)
    _, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy("model/demo.gguf", folder)
        (folder / "adapters").mkdir()
        with running_stack(folder, MODEL_PATH=str(folder / "demo.gguf")) as stack:
            return turn(stack, folder, [*TRAINING, *options])


def turn(stack: Stack, folder: Path, training: list[str]) -> int:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    asked = [(question, lesson.answer) for lesson in LESSONS for question in lesson.questions]
    before = correct_all(stack, asked)
    say(f"{len(before)} answers corrected, of which {right(before)} were right")
    data = folder / "data"
    run("deploy.dataset", "sft", "--out", data, "--url", stack.http.base_url, "--validation", 0)
    say("dataset written")
    places = ("--data", data, "--name", ADAPTER, "--folder", folder / "adapters")
    run("model.training.adapt", *places, *training)
    say("adapter trained, and written beside the model")
    wait_for(lambda: f"demo:{ADAPTER}" in names(stack), "the adapter", SEEN_WITHIN)
    say("adapter picked up by the running worker")
    others = [(question, lesson.answer) for lesson in LESSONS for question in lesson.others]
    after = [ask(stack, f"after {n}", *each, f"demo:{ADAPTER}") for n, each in enumerate(asked)]
    new = [ask(stack, f"new {n}", *each, f"demo:{ADAPTER}") for n, each in enumerate(others)]
    known = [ask(stack, f"known {n}", *each, f"demo:{ADAPTER}") for n, each in enumerate(KNOWN)]
    say(f"asked again: {right(after)} of {len(after)} right")
    say(f"in other words: {right(new)} of {len(new)} right")
    say(f"what the model knew before: {right(known)} of {len(known)} right")
    show("before", before[::4])
    show("after", after[::4])
    show("in other words", new)
    show("known before", known)
    return 0 if right(before) == 0 and right(after) >= 0.9 * len(after) else 1


def correct_all(stack: Stack, asked: list[tuple[str, str]]) -> list[Result]:
    """Ask each question in a session of its own, and correct the answer."""
    results = []
    for number, (question, wanted) in enumerate(asked):
        session = f"customer {number}"
        results.append(ask(stack, session, question, wanted, "demo"))
        (message,) = stack.messages(session)
        path = f"/sessions/{session}/messages/{message['id']}/feedback"
        response = stack.http.put(path, json={"rating": "down", "correction": wanted})
        assert response.status_code == 200, response.text
    return results


def ask(stack: Stack, session: str, question: str, wanted: str, model: str) -> Result:
    """An answer is right if it contains the wanted one."""
    answer = stack.chat(question, session, model=model).text
    return Result(question, answer, wanted in answer)


def names(stack: Stack) -> list[str]:
    return [model["id"] for model in stack.http.get("/v1/models").json()["data"]]


def run(module: str, *arguments: object) -> None:
    """Run a program as `just` does. Raises CalledProcessError."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ)


def right(results: list[Result]) -> int:
    return sum(result.is_right for result in results)


def show(title: str, results: list[Result]) -> None:
    print(f"\n{title}:")
    for result in results:
        print(f"  {'right' if result.is_right else 'wrong'}  {json.dumps(result.question)}")
        print(f"         {json.dumps(result.answer)}")


if __name__ == "__main__":
    sys.exit(main())

"""Examines a GGUF skill by skill, on values it never saw: `python -m model.training.evaluate`.

Needs llama-cpp-python, not torch. The earlier turns of each dialog are the right ones; the answer
counts when it is right and has ended.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llama_cpp import Llama

from model.training.dialogs import Dialog, dialogs
from model.training.talk import Turn

MODEL = Path(__file__).parents[1] / "demo.gguf"
FARTHEST = 10
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0}
SERVICE = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "repeat_penalty": 1.1}
SKILLS = (
    *(f"recall {distance}" for distance in range(1, FARTHEST + 1)),
    *("recall_two", "update", "tell", "tell_several", "tell_and_ask", "unknown", "check", "who"),
    *("know", "first_message", "last_message", "own_answer", "repeat", "count", "count_other"),
    *("sums", "calendar", "opposite", "lists", "facts", "faq", "identity", "system_name"),
    *("origins", "chat", "statement", "out_of_scope", "gibberish"),
)


class Probe(NamedTuple):
    """One question with the conversation before it."""

    dialog: Dialog
    at: int

    @property
    def turn(self) -> Turn:
        return self.dialog.turns[self.at]

    @property
    def skill(self) -> str:
        return f"recall {self.turn.distance}" if self.turn.skill == "recall" else self.turn.skill

    def messages(self) -> list[dict[str, str]]:
        system = self.dialog.system
        said = [{"role": "system", "content": system}] if system else []
        for turn in self.dialog.turns[: self.at]:
            said.append({"role": "user", "content": turn.user})
            said.append({"role": "assistant", "content": turn.answer})
        return [*said, {"role": "user", "content": self.turn.user}]


@dataclass(slots=True)
class Score:
    right: int = 0
    asked: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, probe: Probe, answer: str, ended: bool) -> None:
        self.asked += 1
        if ended and probe.turn.is_right(answer):
            self.right += 1
        else:
            self.wrong.append(f"{probe.turn.user!r} -> {answer!r}, not {probe.turn.answer!r}")

    @property
    def percent(self) -> float:
        return 100 * self.right / max(1, self.asked)


def probes(seed: int, number: int) -> Iterator[Probe]:
    """`number` questions of each skill, from as many dialogs as that takes."""
    wanted = dict.fromkeys(SKILLS, number)
    for dialog in dialogs(seed, split="eval"):
        for index in range(len(dialog.turns)):
            probe = Probe(dialog, index)
            if probe.turn.learned and wanted.get(probe.skill, 0) > 0:
                wanted[probe.skill] -= 1
                yield probe
        if not any(wanted.values()):
            return


def answered(model: Llama, probe: Probe, sampling: dict[str, float]) -> tuple[str, bool]:
    reply: Any = model.create_chat_completion(probe.messages(), max_tokens=450, **sampling)  # type: ignore[arg-type]
    choice = reply["choices"][0]
    return choice["message"]["content"], choice["finish_reason"] == "stop"


def scores(model: Llama, seed: int, number: int, sampling: dict[str, float]) -> dict[str, Score]:
    table: dict[str, Score] = defaultdict(Score)
    for probe in probes(seed, number):
        table[probe.skill].add(probe, *answered(model, probe, sampling))
    return table


def report(table: dict[str, Score], number: int) -> str:
    lines = [f"| skill | right, of {number} |", "|---|---|"]
    lines += [f"| {skill.replace('_', ' ')} | {table[skill].percent:.0f} % |" for skill in SKILLS]
    mean = (
        sum(table[f"recall {distance}"].percent for distance in range(1, FARTHEST + 1)) / FARTHEST
    )
    return "\n".join([*lines, f"| **recall, mean of the distances** | **{mean:.1f} %** |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--number", type=int, default=100, help="questions per skill")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--greedy", action="store_true", help="instead of the service's sampling")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to show per skill")
    options = parser.parse_args()
    model = Llama(
        str(options.model), n_ctx=2048, n_threads=options.threads, seed=options.seed, verbose=False
    )
    table = scores(model, options.seed, options.number, GREEDY if options.greedy else SERVICE)
    print(report(table, options.number))
    for skill in SKILLS:
        for line in table[skill].wrong[: options.wrong]:
            print(f"{skill}: {line}")


if __name__ == "__main__":
    main()

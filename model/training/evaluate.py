"""Evaluate a GGUF skill by skill: `python -m model.training.evaluate`. Needs the packages of the
inference service, not torch.

The earlier turns of each dialog have the right answers; an answer counts if it is right and
complete. Then come the hand-written conversations, with the model's own answers as history.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from model.training import conversations, pirate, words
from model.training.dialogs import Dialog, dialogs
from model.training.examinee import GREEDY, SERVICE, Examinee, Question, Reply
from model.training.talk import Turn

MODEL = Path(__file__).parents[1] / "demo.gguf"
MAX_DISTANCE = 9
COMMON, UNSEEN = "recall, common words", "recall, never seen"
BY_HAND = "written by hand"
SKILLS = (
    *("tell", "tell_several", "tell_and_ask", "have", "update", "recall_two", "unknown", "check"),
    *("who", "know", "first_message", "last_message", "own_answer", "repeat", "count"),
    *(
        "count_other",
        "sums",
        "calendar",
        "opposite",
        "lists",
        "facts",
        "faq",
        "identity",
        "origins",
    ),
    *("system_name", "tone", "chat", "statement", "out_of_scope", "gibberish"),
)
Voice = Callable[[Dialog], Dialog]
VOICES: dict[str | None, Voice] = {None: lambda dialog: dialog, "pirate": pirate.as_pirate}
GOALS = {
    **{COMMON: 97, UNSEEN: 85, "update": 90, "unknown": 98, "system_name": 90},
    **{"identity": 98, "origins": 98, "faq": 98, BY_HAND: 85},
}


class Probe(NamedTuple):
    """A question with the turns before it, and the table row that it counts in."""

    row: str
    dialog: Dialog
    at: int

    @property
    def turn(self) -> Turn:
        return self.dialog.turns[self.at]

    @property
    def question(self) -> Question:
        history = tuple((turn.user, turn.answer) for turn in self.dialog.turns[: self.at])
        return Question(self.dialog.system.prompt or "", history, self.turn.user)


@dataclass(slots=True)
class Score:
    right: int = 0
    asked: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, is_right: bool, detail: str) -> None:
        self.asked += 1
        self.right += is_right
        if not is_right:
            self.wrong.append(detail)

    @property
    def percent(self) -> float:
        return 100 * self.right / max(1, self.asked)


def make_probes(seed: int, number: int, in_voice: Voice) -> Iterator[Probe]:
    """Yield `number` questions per table row."""
    rows = (*SKILLS, *(f"{UNSEEN} {distance}" for distance in range(1, MAX_DISTANCE + 1)))
    yield from _collect(map(in_voice, dialogs(seed, "eval")), dict.fromkeys(rows, number), UNSEEN)
    rows = tuple(f"{COMMON} {distance}" for distance in range(1, MAX_DISTANCE + 1))
    yield from _collect(map(in_voice, dialogs(-seed, "train")), dict.fromkeys(rows, number), COMMON)


def _collect(made: Iterator[Dialog], wanted: dict[str, int], recall: str) -> Iterator[Probe]:
    while any(wanted.values()):
        dialog = next(made)
        for at, turn in enumerate(dialog.turns):
            row = _row(dialog, turn, recall)
            if turn.learned and wanted.get(row, 0) > 0:
                wanted[row] -= 1
                yield Probe(row, dialog, at)


def _row(dialog: Dialog, turn: Turn, recall: str) -> str:
    if turn.skill == "recall":
        is_common = recall == UNSEEN or words.is_common(turn.must[0])
        return f"{recall} {turn.distance}" if is_common else ""
    is_toned = dialog.system.tone and turn.skill != "repeat"
    return "tone" if is_toned else turn.skill


def score_probes(examinee: Examinee, asked: list[Probe]) -> dict[str, Score]:
    table: dict[str, Score] = {probe.row: Score() for probe in asked}
    replies = examinee.answer_all(probe.question for probe in asked)
    for probe, reply in zip(asked, replies, strict=True):
        is_right = reply.ended and probe.turn.is_right(reply.text)
        table[probe.row].add(is_right, _describe(probe, reply))
    for recall in (COMMON, UNSEEN):
        parts = [table[f"{recall} {distance}"] for distance in range(1, MAX_DISTANCE + 1)]
        table[recall] = Score(sum(part.right for part in parts), sum(part.asked for part in parts))
    return table


def _describe(probe: Probe, reply: Reply) -> str:
    return f"{probe.turn.user!r} -> {reply.text!r}, not {probe.turn.answer!r}"


def score_conversations(examinee: Examinee) -> Score:
    score = Score()
    for line, answer, is_right in conversations.run_conversations(
        examinee, conversations.read_conversations()
    ):
        score.add(is_right, f"{line.prompt!r} -> {answer!r}")
    return score


def format_report(table: dict[str, Score]) -> str:
    lines = ["| skill | right | of | goal |", "|---|---|---|---|"]
    for row in (COMMON, UNSEEN, *SKILLS, BY_HAND):
        name, score, goal = row.replace("_", " "), table[row], GOALS.get(row)
        shown = f"{goal} %" + ("" if score.percent >= goal else " **missed**") if goal else ""
        lines.append(f"| {name} | {score.percent:.1f} % | {score.asked} | {shown} |")
    distances = range(1, MAX_DISTANCE + 1)
    lines += ["", f"| exchanges ago | {' | '.join(map(str, distances))} |", "|---" * 10 + "|"]
    for recall in (COMMON, UNSEEN):
        percents = [f"{table[f'{recall} {distance}'].percent:.0f} %" for distance in distances]
        lines.append(f"| {recall} | {' | '.join(percents)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", choices=[name for name in VOICES if name])
    parser.add_argument("--number", type=int, default=100, help="questions per row")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--greedy", action="store_true", help="sample greedily")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to show per row")
    options = parser.parse_args()
    request = GREEDY if options.greedy else SERVICE
    examinee = Examinee(options.model, options.adapter, request, options.seed)
    in_voice = VOICES[options.adapter]
    table = score_probes(examinee, list(make_probes(options.seed, options.number, in_voice)))
    table[BY_HAND] = score_conversations(examinee)
    print(format_report(table))
    for row, score in table.items():
        for line in score.wrong[: options.wrong if row != BY_HAND else 0]:
            print(f"{row}: {line}")


if __name__ == "__main__":
    main()

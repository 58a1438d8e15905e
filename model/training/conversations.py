"""The hand-written conversations of `conversations.txt`: parse, run and grade them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from model.training.examinee import Examinee, Question
from model.training.systems import DEFAULT

PATH = Path(__file__).with_suffix(".txt")


@dataclass(slots=True)
class Line:
    """A prompt and what its answer must and must not contain."""

    prompt: str
    any_of: list[tuple[str, ...]] = field(default_factory=list)
    none_of: list[str] = field(default_factory=list)

    def is_right(self, answer: str) -> bool:
        answer = answer.lower()
        has_all = all(any(text in answer for text in texts) for texts in self.any_of)
        return has_all and not any(text in answer for text in self.none_of)


class Conversation(NamedTuple):
    system: str
    lines: tuple[Line, ...]


class GradedAnswer(NamedTuple):
    line: Line
    answer: str
    is_right: bool


def read_conversations(path: Path = PATH) -> list[Conversation]:
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    return [_conversation(block) for block in blocks if not block.startswith("#")]


def _conversation(block: str) -> Conversation:
    system, lines = DEFAULT, list[Line]()
    for text in block.strip().splitlines():
        mark, rest = text.split(" ", 1)
        alternatives = tuple(part.strip().lower() for part in rest.split("|"))
        match mark:
            case "system:":
                system = rest
            case ">":
                lines.append(Line(rest))
            case "=":
                lines[-1].any_of.append(alternatives)
            case "!":
                lines[-1].none_of.extend(alternatives)
            case _:
                raise ValueError(
                    f"{PATH.name}: a line begins with {mark!r}: {text}. Use `system:`, >, = or !."
                )
    return Conversation(system, tuple(lines))


def run_conversations(examinee: Examinee, conversations: list[Conversation]) -> list[GradedAnswer]:
    """Run all conversations in parallel, turn by turn, with the model's own answers as history."""
    histories: list[tuple[tuple[str, str], ...]] = [() for _ in conversations]
    graded = []
    for turn in range(max(len(conversation.lines) for conversation in conversations)):
        running = [i for i, each in enumerate(conversations) if turn < len(each.lines)]
        questions = [
            Question(conversations[i].system, histories[i], conversations[i].lines[turn].prompt)
            for i in running
        ]
        for i, reply in zip(running, examinee.answer_all(questions), strict=True):
            line = conversations[i].lines[turn]
            histories[i] += ((line.prompt, reply.text),)
            graded.append(GradedAnswer(line, reply.text, reply.ended and line.is_right(reply.text)))
    return graded

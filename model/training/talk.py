"""The state of one dialog while it is made: its turns, and what the user has told so far."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from model.training.kinds import KINDS
from model.training.memory import Kind
from model.training.style import Style, random_style
from model.training.wordings import sentence, spun
from model.training.words import Split

Key = tuple[str, str]


class Turn(NamedTuple):
    """One exchange. Right is what holds every `must`, or equals `answer` if there is none."""

    skill: str
    user: str
    answer: str
    must: tuple[str, ...] = ()
    distance: int = 0
    learned: bool = True

    def is_right(self, answer: str) -> bool:
        if self.must:
            return all(value in answer for value in self.must)
        return answer == self.answer


@dataclass(slots=True)
class Fact:
    kind: Kind
    subject: str
    value: str
    mentioned: int

    @property
    def key(self) -> Key:
        return self.kind.name, self.subject

    @property
    def told(self) -> str:
        """As the assistant says it, in the middle of a sentence."""
        return self.fill(self.kind.told)

    @property
    def ack(self) -> str:
        return self.fill(self.kind.ack) or f"Okay, {self.told}."

    @property
    def answer(self) -> str:
        return self.fill(self.kind.answer) or f"{sentence(self.told)}."

    def fill(self, template: str) -> str:
        return template.format(k=self.subject, v=self.value, col="colour")


@dataclass(slots=True)
class Talk:
    rng: random.Random
    split: Split
    called: str | None = None
    turns: list[Turn] = field(default_factory=list)
    facts: dict[Key, Fact] = field(default_factory=dict)
    asked_in_vain: tuple[Kind, str] | None = None

    def style(self) -> Style:
        return random_style(self.rng)

    def pick(self, templates: tuple[str, ...]) -> str:
        return self.rng.choice(templates)

    def learn(self, kind: Kind, subject: str, value: str) -> Fact:
        fact = Fact(kind, subject, value, len(self.turns))
        self.facts[fact.key] = fact
        return fact

    def some_kind(self) -> Kind:
        return self.rng.choices(KINDS, [kind.weight for kind in KINDS])[0]

    def some_fact(self) -> Fact | None:
        """A fact to ask about, the ones not heard of for long more often."""
        if not self.facts:
            return None
        facts = sorted(self.facts.values(), key=lambda fact: fact.mentioned)
        return facts[0] if self.rng.random() < 0.6 else self.rng.choice(facts)

    def has(self, kind: Kind) -> bool:
        return any(fact.kind is kind for fact in self.facts.values())

    def distance(self, fact: Fact) -> int:
        """Exchanges since the value was last to be seen."""
        return len(self.turns) - fact.mentioned

    def mention(self, fact: Fact) -> None:
        fact.mentioned = len(self.turns)

    def wording(
        self, template: str, style: Style, subject: str = "", value: str = "", old: str = ""
    ) -> str:
        """A template typed by this user: his style, his spelling of favourite colour."""
        british = self.rng.random() < 0.5
        favourite, colour = ("favourite", "colour") if british else ("favorite", "color")
        template = spun(self.rng, template).replace("{fav}", favourite).replace("{col}", colour)
        text = style.template(template)
        subject = style.value(subject.replace("favourite", favourite))
        return text.format(k=subject, v=style.value(value), o=style.value(old))

    def framed(self, frames: tuple[str, ...], **parts: tuple[str, ...]) -> str:
        """A frame with its {f}, {n} or {c} filled in by one of the wordings for that."""
        frame = self.pick(frames)
        for name, texts in parts.items():
            frame = frame.replace(f"{{{name}}}", self.pick(texts))
        return sentence(spun(self.rng, frame))

"""State of a dialog while it is generated: its turns, and the facts from the user so far."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from model.training.kinds import KINDS
from model.training.memory import Kind
from model.training.style import Style, random_style
from model.training.wordings import capitalize, expand
from model.training.words import Split

Key = tuple[str, str]


class Turn(NamedTuple):
    """One exchange. A right answer contains every `must` or, without any, equals `answer`."""

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
        """The fact as the assistant words it within a sentence."""
        return self.fill(self.kind.told)

    @property
    def ack(self) -> str:
        return self.fill(self.kind.ack) or f"Okay, {self.told}."

    @property
    def answer(self) -> str:
        return self.fill(self.kind.answer) or f"{capitalize(self.told)}."

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

    def pick_kind(self) -> Kind:
        return self.rng.choices(KINDS, [kind.weight for kind in KINDS])[0]

    def pick_fact(self) -> Fact | None:
        """Return a fact to ask about, more often one that was not mentioned for long."""
        if not self.facts:
            return None
        facts = sorted(self.facts.values(), key=lambda fact: fact.mentioned)
        return facts[0] if self.rng.random() < 0.6 else self.rng.choice(facts)

    def has(self, kind: Kind) -> bool:
        return any(fact.kind is kind for fact in self.facts.values())

    def distance(self, fact: Fact) -> int:
        """Return the number of exchanges since the value was last mentioned."""
        return len(self.turns) - fact.mentioned

    def mention(self, fact: Fact) -> None:
        fact.mentioned = len(self.turns)

    def wording(
        self, template: str, style: Style, subject: str = "", value: str = "", old: str = ""
    ) -> str:
        """Fill in a template in the user's style, with British or American spelling."""
        british = self.rng.random() < 0.5
        favourite, colour = ("favourite", "colour") if british else ("favorite", "color")
        template = expand(self.rng, template).replace("{fav}", favourite).replace("{col}", colour)
        text = style.template(template)
        subject = style.value(subject.replace("favourite", favourite))
        return text.format(k=subject, v=style.value(value), o=style.value(old))

    def fill_frame(self, frames: tuple[str, ...], **parts: tuple[str, ...]) -> str:
        """Fill in the {f}, {n} and {c} of a random frame, each with one of its wordings."""
        frame = self.pick(frames)
        for name, texts in parts.items():
            frame = frame.replace(f"{{{name}}}", self.pick(texts))
        return capitalize(expand(self.rng, frame))

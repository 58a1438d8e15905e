"""Endless dialogs, made from templates: what the demo model learns from and is examined with.

Knows nothing of tokens; the same seed gives the same dialogs.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from model.training import quoting, recalling, reckoning, skills, telling
from model.training.kinds import KINDS
from model.training.person import NAME
from model.training.talk import Talk, Turn
from model.training.wordings import wordings
from model.training.words import Split

DEFAULT_SYSTEM = "You are a helpful, friendly assistant. Answer briefly and clearly."
OTHER_SYSTEMS = wordings(
    """
    You are a helpful assistant. | You are an assistant. | Answer briefly. | Be polite.
    | You are a friendly chat bot. | Answer in one sentence.
    | You are the assistant of a small company. | Be concise. | Help the user.
    | You answer questions about FineTuneLLM. | Be honest: if you do not know something, say it.
    | Answer in English. | You are a customer service agent. | Keep your answers short.
    | You are a helpful, respectful and honest assistant.
    """
)
NAMED_SYSTEMS = wordings(
    """
    You are {n}. | You are {n}, a friendly assistant. | You are {n}, a helpful assistant.
    | Your name is {n}. | You are called {n}. Answer briefly. | You are an assistant called {n}.
    | You are {n}, an assistant. Be brief and clear. | You are a helpful assistant named {n}.
    | You are {n}, a helpful, friendly assistant. Answer briefly and clearly.
    """
)
MOST_EXCHANGES = 13
ORPHANS = 0.06
PATIENT = 0.25


class Dialog(NamedTuple):
    system: str | None
    turns: tuple[Turn, ...]


def dialogs(seed: int, split: Split = "train", most: int = MOST_EXCHANGES) -> Iterator[Dialog]:
    rng = random.Random(f"{split} {seed}")
    while True:
        yield dialog(rng, split, rng.randint(1, most))


def dialog(rng: random.Random, split: Split, exchanges: int) -> Dialog:
    system, called = _system(rng, split)
    talk = Talk(rng, split, called)
    if rng.random() < ORPHANS:
        _add_orphan(talk)
    patient = rng.random() < PATIENT
    for _ in range(exchanges):
        talk.turns.append(_next_turn(talk, patient))
    if patient and (last := recalling.recall(talk)):
        talk.turns.append(last)
    return Dialog(system, tuple(talk.turns))


def _system(rng: random.Random, split: Split) -> tuple[str | None, str | None]:
    """The system prompt, and the assistant's name if it gives one."""
    pick = rng.random()
    if pick < 0.58:
        return DEFAULT_SYSTEM, None
    if pick < 0.73:
        return None, None
    if pick < 0.82:
        return " ".join(rng.sample(OTHER_SYSTEMS, rng.choice((1, 1, 2, 3)))), None
    name = NAME.value(rng, split)
    return rng.choice(NAMED_SYSTEMS).format(n=name), name


def _add_orphan(talk: Talk) -> None:
    """An answer from memory whose telling has left the window: to be trusted, not imitated."""
    kind = talk.rng.choice(KINDS)
    talk.learn(kind, talk.rng.choice(kind.subjects), kind.value(talk.rng, talk.split))
    turn = recalling.recall(talk)
    if turn is not None:
        talk.turns.append(turn._replace(learned=False))


def _next_turn(talk: Talk, patient: bool) -> Turn:
    """The next exchange; a patient user tells much and asks for it only at the end."""
    wanted = talk.asked_in_vain
    while True:
        skill = _pick(talk)
        if patient and skill in skills.FROM_MEMORY:
            continue
        turn = skill(talk)
        if turn is None:
            continue
        if talk.asked_in_vain is wanted:
            talk.asked_in_vain = None
        return turn


def _pick(talk: Talk) -> skills.Skill:
    if talk.asked_in_vain and talk.rng.random() < 0.4:
        return telling.tell
    if talk.called and talk.rng.random() < 0.15:
        return skills.identity
    if not talk.facts and talk.rng.random() < 0.2:
        return telling.tell
    if len(talk.turns) > 3 and talk.rng.random() < 0.1:
        return recalling.recall
    if talk.turns and talk.turns[-1].skill in AGAIN and talk.rng.random() < 0.2:
        return AGAIN[talk.turns[-1].skill]
    return talk.rng.choices(_SKILLS, _WEIGHTS)[0]


AGAIN = {
    "count": reckoning.count,
    "sums": reckoning.sums,
    "repeat": quoting.repeat,
    "calendar": reckoning.calendar,
}
_SKILLS = tuple(skills.WEIGHTS)
_WEIGHTS = tuple(skills.WEIGHTS.values())


def transcript(dialog: Dialog) -> str:
    """For reading by eye."""
    lines = [f"system: {dialog.system}"]
    for turn in dialog.turns:
        lines += [
            f"  user: {turn.user}",
            f"  bot:  {turn.answer}  [{turn.skill} {turn.distance or ''}]",
        ]
    return "\n".join(lines)


def main() -> None:
    for _, made in zip(range(20), dialogs(seed=1), strict=False):
        print(transcript(made), end="\n\n")


if __name__ == "__main__":
    main()

"""Endless dialogs from templates, for training and evaluation of the demo model. Independent of the
tokenizer; the same seed gives the same dialogs.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from model.training import quoting, recalling, reckoning, skills, systems, telling
from model.training.kinds import KINDS
from model.training.systems import System
from model.training.talk import Talk, Turn
from model.training.words import Split

MAX_EXCHANGES = 13
ORPHAN_SHARE = 0.06
PATIENT_SHARE = 0.25


class Dialog(NamedTuple):
    system: System
    turns: tuple[Turn, ...]


def dialogs(seed: int, split: Split = "train", most: int = MAX_EXCHANGES) -> Iterator[Dialog]:
    rng = random.Random(f"{split} {seed}")
    while True:
        yield dialog(rng, split, rng.randint(1, most))


def dialog(rng: random.Random, split: Split, exchanges: int) -> Dialog:
    system = systems.system(rng, split)
    talk = Talk(rng, split, system.called)
    if rng.random() < ORPHAN_SHARE:
        _add_orphan(talk)
    patient = rng.random() < PATIENT_SHARE
    for _ in range(exchanges):
        talk.turns.append(_apply_tone(_next_turn(talk, patient), system))
    if patient and (last := recalling.recall(talk)):
        talk.turns.append(_apply_tone(last, system))
    return Dialog(system, tuple(talk.turns))


def _apply_tone(turn: Turn, system: System) -> Turn:
    """Apply the tone of the system prompt, except to text that repeats the user's."""
    if system.tone is None or turn.skill == "repeat":
        return turn
    answer = system.tone.of(turn.answer)
    marks = (system.tone.before.strip() or system.tone.after.strip(),)
    return turn._replace(answer=answer, must=turn.must + marks if turn.must else ())


def _add_orphan(talk: Talk) -> None:
    """Add an answer about a fact that is no longer in the prompt: context, not a target."""
    kind = talk.rng.choice(KINDS)
    talk.learn(kind, talk.rng.choice(kind.subjects), kind.value(talk.rng, talk.split))
    turn = recalling.recall(talk)
    if turn is not None:
        talk.turns.append(turn._replace(learned=False))


def _next_turn(talk: Talk, patient: bool) -> Turn:
    """Return the next exchange; a patient user asks for facts only at the end."""
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


def format_transcript(dialog: Dialog) -> str:
    """Return a readable form of the dialog."""
    lines = [f"system: {dialog.system.prompt}"]
    for turn in dialog.turns:
        lines += [
            f"  user: {turn.user}",
            f"  bot:  {turn.answer}  [{turn.skill} {turn.distance or ''}]",
        ]
    return "\n".join(lines)


def main() -> None:
    for _, made in zip(range(20), dialogs(seed=1), strict=False):
        print(format_transcript(made), end="\n\n")


if __name__ == "__main__":
    main()

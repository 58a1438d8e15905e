"""What the demo model can do, and how often each skill is practised.

A skill makes the next exchange of a dialog; one that does not fit its state returns None.
"""

from collections.abc import Callable

from model.training import (
    knowledge,
    limits,
    quoting,
    recalling,
    reckoning,
    smalltalk,
    telling,
    words,
)
from model.training.faq import FAQ, Canned
from model.training.talk import Talk, Turn

Skill = Callable[[Talk], Turn | None]


def _from_table(skill: str, table: tuple[Canned, ...]) -> Skill:
    def make(talk: Talk) -> Turn | None:
        entry = talk.rng.choice(table)
        user = talk.wording(talk.rng.choice(entry.asks), talk.style())
        return Turn(skill, user, talk.rng.choice(entry.answers))

    return make


def greeting(talk: Talk) -> Turn | None:
    entry = smalltalk.CHAT[0] if talk.rng.random() < 0.6 else talk.rng.choice(smalltalk.CHAT[1:6])
    return Turn("chat", talk.wording(talk.rng.choice(entry.asks), talk.style()), entry.answers[0])


def identity(talk: Talk) -> Turn | None:
    entry = smalltalk.IDENTITY[0]
    user = talk.wording(talk.rng.choice(entry.asks), talk.style())
    if talk.called:
        return Turn("system_name", user, f"I am {talk.called}.", (talk.called,))
    return Turn("identity", user, entry.answers[0])


def statement(talk: Talk) -> Turn | None:
    user = talk.wording(talk.rng.choice(smalltalk.STATEMENTS), talk.style())
    return Turn("statement", user, smalltalk.STATEMENT_ANSWERS[0])


def out_of_scope(talk: Talk) -> Turn | None:
    asks, answers = talk.rng.choice(
        ((limits.TASKS, limits.TASK_ANSWERS), (limits.QUESTIONS, limits.QUESTION_ANSWERS))
    )
    topic = _topic(talk)
    template = talk.rng.choice(asks).replace("{x}", "{v}")
    return Turn("out_of_scope", talk.wording(template, talk.style(), value=topic), answers[0])


def _topic(talk: Talk) -> str:
    if talk.rng.random() < 0.4:
        return words.made_up(talk.rng, talk.split)
    known = words.WORDS + words.NAMES + words.CITIES + words.FOODS
    return words.draw(talk.rng, known, talk.split)


def gibberish(talk: Talk) -> Turn | None:
    keys = "".join(talk.rng.choices("asdfghjklqwertyuiopzxcvbnm", k=talk.rng.randint(4, 10)))
    foreign = " ".join(talk.rng.choices(words.FOREIGN, k=talk.rng.randint(1, 4)))
    long = " ".join(talk.rng.choices(quoting.PLAIN_WORDS, k=talk.rng.randint(20, 60)))
    smiley = talk.rng.choice(words.SMILEYS)
    text = talk.rng.choice(
        (keys, foreign, long, smiley, "?", "???", "...", "!", words.letters(talk.rng))
    )
    return Turn("gibberish", text, limits.GIBBERISH_ANSWERS[0])


FROM_MEMORY = frozenset(
    (recalling.recall, recalling.recall_two, recalling.check, recalling.who, recalling.know)
)
WEIGHTS: dict[Skill, float] = {
    telling.tell: 15,
    recalling.recall: 26,
    telling.update: 6,
    recalling.unknown: 7,
    recalling.check: 6,
    recalling.who: 10,
    telling.tell_several: 6,
    telling.tell_and_ask: 1,
    recalling.recall_two: 6,
    recalling.know: 12,
    quoting.first_message: 5,
    quoting.last_message: 4,
    quoting.own_answer: 3.5,
    quoting.repeat: 7,
    reckoning.count: 3,
    reckoning.count_other: 0.8,
    reckoning.sums: 16,
    reckoning.calendar: 2,
    reckoning.opposite: 1,
    identity: 3,
    statement: 2.5,
    out_of_scope: 4,
    gibberish: 0.8,
    greeting: 1.5,
    _from_table("chat", smalltalk.CHAT): 6,
    _from_table("origins", smalltalk.ORIGINS): 1,
    _from_table("facts", knowledge.FACTS): 1.5,
    _from_table("lists", knowledge.LISTS): 1.5,
    _from_table("faq", FAQ): 8,
}

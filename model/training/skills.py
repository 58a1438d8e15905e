"""The demo model's skills and their weights in training. A skill returns the next exchange of a
dialog, or None if it does not fit the dialog's state.
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
from model.training.anatomy import ANATOMY
from model.training.canned import Canned
from model.training.faq import FAQ
from model.training.names import NAMES
from model.training.talk import Talk, Turn

Skill = Callable[[Talk], Turn | None]


def _from_table(skill: str, table: tuple[Canned, ...]) -> Skill:
    def make(talk: Talk) -> Turn | None:
        entry = talk.rng.choice(table)
        user = talk.wording(talk.pick(entry.asks), talk.style(), value=_topic(talk))
        return Turn(skill, user, entry.answer)

    return make


def identity(talk: Talk) -> Turn | None:
    user = talk.wording(talk.pick(smalltalk.WHO_ARE_YOU), talk.style())
    if talk.called:
        return Turn("system_name", user, f"I am {talk.called}.", (talk.called,))
    return Turn("identity", user, smalltalk.I_AM)


def statement(talk: Talk) -> Turn | None:
    user = talk.wording(talk.pick(smalltalk.STATEMENTS), talk.style())
    return Turn("statement", user, smalltalk.STATEMENT_ANSWER)


def out_of_scope(talk: Talk) -> Turn | None:
    asks, answer = talk.rng.choice(
        ((limits.TASKS, limits.TASK_ANSWER), (limits.QUESTIONS, limits.QUESTION_ANSWER))
    )
    user = talk.wording(talk.pick(asks), talk.style(), value=_topic(talk))
    return Turn("out_of_scope", user, answer)


def _topic(talk: Talk) -> str:
    if talk.rng.random() < 0.3:
        return words.made_up(talk.rng, talk.split)
    known = (words.WORDS, NAMES, words.CITIES, words.FOODS, words.HOBBIES, words.JOBS)
    return words.draw(talk.rng, talk.rng.choice(known), talk.split)


def gibberish(talk: Talk) -> Turn | None:
    keys = "".join(talk.rng.choices("asdfghjklqwertyuiopzxcvbnm", k=talk.rng.randint(4, 10)))
    foreign = " ".join(talk.rng.choices(words.FOREIGN, k=talk.rng.randint(1, 4)))
    made_up = " ".join(words.made_up(talk.rng, talk.split) for _ in range(talk.rng.randint(2, 5)))
    long = " ".join(talk.rng.choices(quoting.PLAIN_WORDS, k=talk.rng.randint(20, 60)))
    smiley = talk.rng.choice(words.SMILEYS)
    text = talk.rng.choice(
        (keys, foreign, made_up, long, smiley, "?", "???", "...", "!", words.letters(talk.rng))
    )
    return Turn("gibberish", text, limits.GIBBERISH_ANSWER)


FROM_MEMORY = frozenset(
    (recalling.recall, recalling.recall_two, recalling.check, recalling.who, recalling.know)
)
WEIGHTS: dict[Skill, float] = {
    telling.tell: 17,
    telling.have: 0.8,
    recalling.recall: 26,
    telling.update: 8,
    recalling.unknown: 9,
    recalling.check: 5,
    recalling.who: 12,
    telling.tell_several: 7,
    telling.tell_and_ask: 1,
    recalling.recall_two: 4,
    recalling.know: 9,
    quoting.first_message: 4,
    quoting.last_message: 3.5,
    quoting.own_answer: 3,
    quoting.repeat: 8,
    reckoning.count: 3,
    reckoning.count_other: 1.2,
    reckoning.sums: 12,
    reckoning.calendar: 2,
    reckoning.opposite: 1.5,
    identity: 3,
    statement: 5,
    out_of_scope: 10,
    gibberish: 1,
    _from_table("chat", (smalltalk.HELLO,)): 1,
    _from_table("chat", smalltalk.CHAT): 11,
    _from_table("origins", smalltalk.ORIGINS): 2,
    _from_table("facts", knowledge.FACTS): 2,
    _from_table("lists", knowledge.LISTS): 1.5,
    _from_table("faq", FAQ + ANATOMY): 19,
}

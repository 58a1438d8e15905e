"""Skills in which the user states or changes facts. Each returns the next exchange, or None."""

from model.training.belongings import PET
from model.training.memory import CHANGE, CHANGE_LAST, SHORT_TELL, TELL, Kind
from model.training.style import Style
from model.training.talk import Fact, Talk, Turn
from model.training.wordings import wordings

JOINTS = (" and ", " and ", ". ", ", ", ", and ", "; ", " and also ", ". Also, ", ", ", " but ")
PREFACES = wordings(
    """
    [Hi/Hello/Hey][,/!/.] | Remember[ this/ two things/]: | [Please/] remember that | About me:
    | [By the way/Well/So/Okay/Now], | Some facts: | I want you to know that | Note:
    """
)
THANKED = "Thank you, I will remember that."
HAVE = wordings(
    """
    I [have/own/got/bought/adopted/have got] a {k}. | I have a {k} | We have a {k} [at
    home/now/too]. | I [also/now/just/recently] [have/got] a {k}. | There is a {k} in my
    [house/family/life].
    """
)


def tell(talk: Talk) -> Turn | None:
    kind, subject, short = _topic(talk)
    if (kind.name, subject) in talk.facts:
        return None
    style = talk.style()
    value = kind.value(talk.rng, talk.split)
    user = talk.wording(_telling(talk, kind, short), style, subject, value)
    fact = talk.learn(kind, subject, style.value(value))
    return Turn("tell", user, fact.ack, (fact.value,))


def _telling(talk: Talk, kind: Kind, short: bool) -> str:
    if short:
        return talk.pick(SHORT_TELL)
    if kind.tell and talk.rng.random() < 0.3:
        return talk.pick(kind.tell)
    return talk.fill_frame(TELL, f=kind.facts)


def _topic(talk: Talk) -> tuple[Kind, str, bool]:
    """Return kind, subject, and whether the fact answers the user's unanswered question."""
    if talk.asked_in_vain and talk.rng.random() < 0.6:
        return *talk.asked_in_vain, True
    kind = talk.pick_kind()
    return kind, talk.pick(kind.subjects), False


def have(talk: Talk) -> Turn | None:
    """State that there is a pet, without its name."""
    subject = talk.pick(PET.subjects)
    if (PET.name, subject) in talk.facts:
        return None
    talk.asked_in_vain = (PET, subject)
    user = talk.wording(talk.pick(HAVE), talk.style(), subject)
    return Turn("have", user, f"How nice! What is your {subject} called?", (subject,))


def update(talk: Talk) -> Turn | None:
    fact = talk.pick_fact()
    if fact is None or fact.kind.name in ("like", "dislike"):
        return None
    style = talk.style()
    value = fact.kind.value(talk.rng, talk.split)
    user = talk.wording(_changing(talk, fact), style, fact.subject, value, fact.value)
    fact.value = style.value(value)
    talk.mention(fact)
    return Turn("update", user, fact.ack, (fact.value,))


def _changing(talk: Talk, fact: Fact) -> str:
    was_just_told = talk.turns[-1].skill in ("tell", "update") and fact.value in talk.turns[-1].must
    if was_just_told and talk.rng.random() < 0.5:
        return talk.pick(CHANGE_LAST)
    if fact.kind.change and talk.rng.random() < 0.3:
        return talk.pick(fact.kind.change)
    return talk.fill_frame(CHANGE, f=fact.kind.facts)


def tell_several(talk: Talk) -> Turn | None:
    topics = _new_topics(talk, talk.rng.choice((2, 2, 2, 3, 3, 4)))
    if len(topics) < 2:
        return None
    style = talk.style()._replace(before="", after="")
    told = [_told(talk, kind, subject, style) for kind, subject in topics]
    user = told[0]
    for part in told[1:]:
        user += talk.pick(JOINTS) + part
    if talk.rng.random() < 0.2:
        user = f"{talk.wording(talk.pick(PREFACES), style)} {user}"
    return Turn("tell_several", user + ("" if style.bare else "."), THANKED)


def _new_topics(talk: Talk, most: int) -> list[tuple[Kind, str]]:
    topics = {}
    for kind in (talk.pick_kind() for _ in range(most)):
        subject = talk.pick(kind.subjects)
        topics[kind.name, subject] = (kind, subject)
    return [topic for key, topic in topics.items() if key not in talk.facts]


def _told(talk: Talk, kind: Kind, subject: str, style: Style) -> str:
    value = style.value(kind.value(talk.rng, talk.split))
    talk.learn(kind, subject, value)
    return talk.wording(talk.pick(kind.facts), style, subject, value)


def tell_and_ask(talk: Talk) -> Turn | None:
    told = tell(talk)
    if told is None:
        return None
    fact = list(talk.facts.values())[-1]
    question = talk.wording(talk.pick(fact.kind.ask), talk.style(), fact.subject)
    user = f"{told.user.rstrip('.')}{talk.pick(('. ', ', '))}{question}"
    return Turn("tell_and_ask", user, fact.answer, (fact.value,))

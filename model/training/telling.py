"""The user tells: one fact, several, a changed one. Each skill makes the next exchange, or None."""

from model.training.memory import SHORT_TELL, Kind
from model.training.style import Style
from model.training.talk import Talk, Turn

REMEMBER = (
    *("Remember: ", "Remember that ", "Please note: ", "Hello! ", "Hi! "),
    *("Please remember that ", "Remember this: "),
)


def tell(talk: Talk) -> Turn | None:
    kind, subject, templates = _topic(talk)
    if (kind.name, subject) in talk.facts:
        return None
    style = talk.style()
    if talk.rng.random() < 0.06:
        style = style._replace(before=talk.rng.choice(REMEMBER))
    value = kind.value(talk.rng, talk.split)
    user = talk.wording(talk.rng.choice(templates), style, subject, value)
    fact = talk.learn(kind, subject, style.value(value))
    return Turn("tell", user, fact.fill(talk.rng.choice(kind.ack)), (fact.value,))


def _topic(talk: Talk) -> tuple[Kind, str, tuple[str, ...]]:
    if talk.asked_in_vain and talk.rng.random() < 0.5:
        kind, subject = talk.asked_in_vain
        return kind, subject, SHORT_TELL
    kind = talk.some_kind()
    return kind, talk.rng.choice(kind.subjects), kind.tell


def update(talk: Talk) -> Turn | None:
    fact = talk.some_fact()
    if fact is None or not fact.kind.update:
        return None
    style = talk.style()
    value = fact.kind.value(talk.rng, talk.split)
    user = talk.wording(talk.rng.choice(fact.kind.update), style, fact.subject, value)
    fact.value = style.value(value)
    talk.mention(fact)
    return Turn("update", user, fact.fill(talk.rng.choice(fact.kind.ack)), (fact.value,))


def tell_several(talk: Talk) -> Turn | None:
    topics = _new_topics(talk, talk.rng.choice((2, 2, 2, 3)))
    if len(topics) < 2:
        return None
    style = talk.style()._replace(before="", after="")
    parts = [_told(talk, kind, subject, style) for kind, subject in topics]
    user = talk.rng.choice((" and ", ". ", ", ", " and ")).join(parts) + ("" if style.bare else ".")
    return Turn("tell_several", user, "Thank you, I will remember that.")


def _new_topics(talk: Talk, most: int) -> list[tuple[Kind, str]]:
    topics = {}
    for kind in (talk.some_kind() for _ in range(most)):
        subject = talk.rng.choice(kind.subjects)
        topics[kind.name, subject] = (kind, subject)
    return [topic for key, topic in topics.items() if key not in talk.facts]


def _told(talk: Talk, kind: Kind, subject: str, style: Style) -> str:
    value = style.value(kind.value(talk.rng, talk.split))
    talk.learn(kind, subject, value)
    return talk.wording(talk.rng.choice(kind.tell[:3]), style, subject, value).rstrip(".!")


def tell_and_ask(talk: Talk) -> Turn | None:
    told = tell(talk)
    if told is None:
        return None
    fact = list(talk.facts.values())[-1]
    question = talk.wording(talk.rng.choice(fact.kind.ask), talk.style(), fact.subject)
    user = f"{told.user.rstrip('.')}{talk.rng.choice(('. ', ', '))}{question}"
    return Turn("tell_and_ask", user, fact.fill(fact.kind.answer), (fact.value,))

"""The user asks for what he has told. Each skill makes the next exchange, or None."""

from model.training.belongings import NUMBER, PET, WORD
from model.training.memory import KNOWN_NOTHING
from model.training.person import NAME
from model.training.talk import Fact, Talk, Turn
from model.training.wordings import wordings

TO_REMEMBER = wordings(
    """
    What did I ask you to remember? | What should you remember? | What did I tell you to remember?
    | What do you have to remember? | What did you remember?
    """
)


KNOW = wordings(
    """
    What do you know about me? | Tell me what you know about me. | What have I told you?
    | What have I told you about me? | What do you remember about me?
    | What did I tell you about myself? | Tell me about me. | What do you know of me?
    | Do you know anything about me? | What else do you know about me?
    | Tell me everything you know about me. | Describe me. | Summarize what you know about me.
    | What did I tell you? | List what you know about me.
    """
)


def recall(talk: Talk) -> Turn | None:
    fact = talk.some_fact()
    if fact is None:
        return None
    asked = "pet" if _is_only_pet(talk, fact) and talk.rng.random() < 0.15 else fact.subject
    plain = (
        TO_REMEMBER
        if _is_only_one_to_remember(talk, fact) and talk.rng.random() < 0.15
        else fact.kind.ask
    )
    user = talk.wording(talk.rng.choice(plain), talk.style(), asked)
    distance = talk.distance(fact)
    talk.mention(fact)
    return Turn("recall", user, fact.fill(fact.kind.answer), (fact.value,), distance)


def _is_only_pet(talk: Talk, fact: Fact) -> bool:
    return fact.kind is PET and sum(other.kind is PET for other in talk.facts.values()) == 1


def _is_only_one_to_remember(talk: Talk, fact: Fact) -> bool:
    return fact.kind in (NUMBER, WORD) and not (talk.has(NUMBER) and talk.has(WORD))


def recall_two(talk: Talk) -> Turn | None:
    if len(talk.facts) < 2:
        return None
    facts = talk.rng.sample(list(talk.facts.values()), 2)
    style = talk.style()._replace(before="", after="")
    first, second = (
        talk.wording(fact.kind.ask[0], style, fact.subject).rstrip("?.") for fact in facts
    )
    for fact in facts:
        talk.mention(fact)
    joined = _joined(facts)
    user = f"{first} and {second[:1].lower()}{second[1:]}" + ("" if style.bare else "?")
    return Turn(
        "recall_two",
        user,
        f"{joined[:1].upper()}{joined[1:]}.",
        tuple(fact.value for fact in facts),
    )


def unknown(talk: Talk) -> Turn | None:
    kind = NAME if talk.rng.random() < 0.15 else talk.some_kind()
    subject = talk.rng.choice(kind.subjects)
    if kind is PET and talk.rng.random() < 0.15:
        subject = "pet"
    if (kind.name, subject) in talk.facts or (subject == "pet" and talk.has(PET)):
        return None
    if kind.name == "like" and len(talk.facts) > 0:
        return None
    user = talk.wording(talk.rng.choice(kind.ask), talk.style(), subject)
    talk.asked_in_vain = (kind, subject) if subject != "pet" else None
    return Turn("unknown", user, kind.unknown.format(k=subject))


def check(talk: Talk) -> Turn | None:
    """Is my name Ada? Yes, or no and what it is."""
    fact = talk.some_fact()
    if fact is None or not fact.kind.check:
        return None
    style = talk.style()
    true = talk.rng.random() < 0.5
    value = fact.value if true else fact.kind.value(talk.rng, talk.split)
    user = talk.wording(talk.rng.choice(fact.kind.check), style, fact.subject, value)
    true = style.value(value).lower() == fact.value.lower()
    talk.mention(fact)
    answer = ("Yes, " if true else "No, ") + _summary(fact) + "."
    return Turn("check", user, answer, (answer.split()[0], fact.value))


def _summary(fact: Fact) -> str:
    return fact.fill(fact.kind.summary)


def who(talk: Talk) -> Turn | None:
    fact = talk.some_fact()
    if fact is None or fact.kind.who is None:
        return None
    question, answer = fact.kind.who
    user = talk.wording(question, talk.style(), fact.subject, fact.value)
    talk.mention(fact)
    return Turn("who", user, fact.fill(answer), (fact.subject,))


def know(talk: Talk) -> Turn | None:
    if len(talk.facts) > 6 or (not talk.facts and talk.rng.random() < 0.6):
        return None
    user = talk.wording(talk.rng.choice(KNOW), talk.style())
    facts = list(talk.facts.values())
    for fact in facts:
        talk.mention(fact)
    if not facts:
        return Turn("know", user, KNOWN_NOTHING)
    return Turn(
        "know", user, f"You told me that {_joined(facts)}.", tuple(fact.value for fact in facts)
    )


def _joined(facts: list[Fact]) -> str:
    *most, last = (_summary(fact) for fact in facts)
    return f"{', '.join(most)} and {last}" if most else last

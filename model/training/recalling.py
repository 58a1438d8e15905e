"""Skills that ask for remembered facts. Each returns the next exchange, or None."""

from model.training import limits
from model.training.belongings import CODE, NUMBER, PET, RELATIVE, THE_THING, THING, WORD
from model.training.memory import ASK_CLAUSE, ASK_NOUN, KNOWN_NOTHING, Kind
from model.training.person import NAME
from model.training.talk import Fact, Talk, Turn
from model.training.wordings import wordings

TO_REMEMBER = wordings(
    """
    What did I ask you to remember? | What should you remember? | What did I tell you to remember?
    | What do you have to remember? | What did you remember? | What were you supposed to remember?
    """
)
KNOW = wordings(
    """
    [What do you/Do you/What else do you/What can you] [know/remember] [about/of] me? | What do you
    know [about/of] me [now/already/by now/so far/by the way]? | [Tell
    me/Say/List/Summarize/Summarise/Repeat/Show me] [what/everything/all/all that] you
    [know/remember/have stored/have noted] about me. | What have I told you [about me/about
    myself/so far/until now/]? | What did I tell you? | What did I tell you about [me/myself]? |
    Tell me about me. | Describe me. | Who am I to you? | What have you
    [noted/stored/remembered/saved] about me? | Do you know anything about me? | [Give me/I want] a
    [summary/list] of what you know about me. | What facts do you know about me? |
    [Summarize/Describe/Profile] me. | [My profile/My data/Everything about me], please. |
    [Which/What] [facts/things] [about me do you know/did I tell you/do you remember]?
    """
)
WHO = wordings(
    """
    Who is {v}? | Who's {v}? | Who is {v}? | Who is {v} [again/then/to me]? | Who was {v}?
    | Do you [know/remember] who {v} is? | [And/So/Now] who is {v}? | Do you [know/remember] {v}?
    | What do you know about {v}? | What is {v}? | Tell me who {v} is. | Can you tell me who {v} is?
    | Did I tell you [who {v} is/about {v}]? | {v} is who? | {v}, who is that?
    """
)
OF_OTHERS = wordings(
    """
    What is my {k}'s [job/age/hobby/birthday/address/phone number/{fav} {col}/{fav} food/surname]? |
    What's my {k}'s [job/age/hobby/birthday/{fav} {col}/{fav} food/{fav} song/star sign]? | How old
    is my {k}? | Where does my {k} live? | What does my {k} [do/like/eat/work as/look like]? | When
    is my {k}'s birthday? | What {col} is my {k}? | How tall is my {k}? | Where is my {k} from? |
    What [does/did] my {k} say? | Where did I meet my {k}?
    """
)


def recall(talk: Talk) -> Turn | None:
    fact = talk.pick_fact()
    if fact is None:
        return None
    user = _asking(talk, fact)
    distance = talk.distance(fact)
    talk.mention(fact)
    return Turn("recall", user, fact.answer, (fact.value,), distance)


def _asking(talk: Talk, fact: Fact) -> str:
    rare = talk.rng.random() < 0.1
    if rare and _is_only_one_to_remember(talk, fact):
        return talk.wording(talk.pick(TO_REMEMBER), talk.style())
    if rare and fact.kind is THING:
        return talk.wording(talk.pick(THE_THING), talk.style(), fact.subject)
    subject = "pet" if rare and _is_only_pet(talk, fact) else fact.subject
    return talk.wording(_question(talk, fact.kind), talk.style(), subject)


def _question(talk: Talk, kind: Kind) -> str:
    pick = talk.rng.random()
    if pick < 0.4:
        return talk.pick(kind.ask)
    if pick < 0.75:
        return talk.fill_frame(ASK_NOUN, n=kind.nouns)
    return talk.fill_frame(ASK_CLAUSE, c=kind.clauses)


def _is_only_pet(talk: Talk, fact: Fact) -> bool:
    return fact.kind is PET and sum(other.kind is PET for other in talk.facts.values()) == 1


def _is_only_one_to_remember(talk: Talk, fact: Fact) -> bool:
    kinds = (NUMBER, WORD, CODE)
    return fact.kind in kinds and sum(talk.has(kind) for kind in kinds) == 1


def recall_two(talk: Talk) -> Turn | None:
    if len(talk.facts) < 2:
        return None
    facts = talk.rng.sample(list(talk.facts.values()), 2)
    style = talk.style()._replace(before="", after="")
    first, second = (
        talk.wording(talk.pick(fact.kind.ask), style, fact.subject).rstrip("?.") for fact in facts
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
    if talk.rng.random() < 0.15:
        return _of_others(talk)
    kind = NAME if talk.rng.random() < 0.15 else talk.pick_kind()
    subject = talk.pick(kind.subjects)
    if kind is PET and talk.rng.random() < 0.15:
        subject = "pet"
    if (kind.name, subject) in talk.facts or (subject == "pet" and talk.has(PET)):
        return None
    user = talk.wording(_question(talk, kind), talk.style(), subject)
    talk.asked_in_vain = (kind, subject) if subject != "pet" else None
    return Turn("unknown", user, kind.unknown.format(k=subject, col="colour"))


def _of_others(talk: Talk) -> Turn:
    subject = talk.pick(talk.rng.choice((PET, RELATIVE)).subjects)
    user = talk.wording(talk.pick(OF_OTHERS), talk.style(), subject)
    return Turn("unknown", user, "You have not told me that.")


def check(talk: Talk) -> Turn | None:
    """Ask "is my name Ada?": yes, or no with the right value."""
    if not talk.facts or talk.rng.random() < 0.15:
        return _check_in_vain(talk)
    fact = talk.pick_fact()
    assert fact is not None
    style = talk.style()
    true = talk.rng.random() < 0.5
    value = fact.value if true else fact.kind.value(talk.rng, talk.split)
    user = talk.wording(talk.pick(fact.kind.check), style, fact.subject, value)
    true = style.value(value).lower() == fact.value.lower()
    talk.mention(fact)
    word = "Yes" if true else "No"
    return Turn("check", user, f"{word}, {fact.told}.", (word, fact.value))


def _check_in_vain(talk: Talk) -> Turn | None:
    kind = talk.pick_kind()
    subject = talk.pick(kind.subjects)
    if (kind.name, subject) in talk.facts:
        return None
    value = kind.value(talk.rng, talk.split)
    user = talk.wording(talk.pick(kind.check), talk.style(), subject, value)
    return Turn("check", user, kind.unknown.format(k=subject, col="colour"))


def who(talk: Talk) -> Turn | None:
    """Ask "who is Rex?": your dog, or unknown."""
    fact = talk.pick_fact()
    if fact is None or not fact.kind.who:
        return _who_is_unknown(talk) if talk.rng.random() < 0.05 else None
    user = talk.wording(talk.pick(WHO), talk.style(), fact.subject, fact.value)
    talk.mention(fact)
    return Turn("who", user, fact.fill("{v} is your {k}."), (fact.subject,))


def _who_is_unknown(talk: Talk) -> Turn:
    name = NAME.value(talk.rng, talk.split)
    user = talk.wording(talk.pick(WHO), talk.style(), value=name)
    return Turn("out_of_scope", user, limits.QUESTION_ANSWER)


def know(talk: Talk) -> Turn | None:
    if len(talk.facts) > 8 or (not talk.facts and talk.rng.random() < 0.6):
        return None
    user = talk.wording(talk.pick(KNOW), talk.style())
    facts = list(talk.facts.values())
    for fact in facts:
        talk.mention(fact)
    if not facts:
        return Turn("know", user, KNOWN_NOTHING)
    return Turn(
        "know", user, f"You told me that {_joined(facts)}.", tuple(fact.value for fact in facts)
    )


def _joined(facts: list[Fact]) -> str:
    *most, last = (fact.told for fact in facts)
    return f"{', '.join(most)} and {last}" if most else last

"""What was said, word for word, and what is to be said after the user."""

from model.training import words
from model.training.talk import Talk, Turn
from model.training.wordings import wordings

QUOTABLE = 90


FIRST = wordings(
    """
    What was my first message? | What did I say first? | What was the first thing I said?
    | What did I write first? | What was my first question? | Repeat my first message.
    | How did I start this conversation? | What was the first message?
    | Which message did I send first? | What did I first say? | What did I ask first?
    """
)


LAST = wordings(
    """
    What was my last message? | What did I just say? | What did I say before?
    | What was my previous message? | What did I say? | Repeat my last message.
    | What did I just write? | What was my last question? | What did I just ask?
    | What did I ask you? | What was the last thing I said?
    """
)


OWN = wordings(
    """
    What did you just say? | What did you say? | Repeat your last answer.
    | What was your last answer? | Say that again. | Can you repeat that?
    | Please repeat your answer. | What was your last message? | Could you repeat that?
    | Repeat that. | What did you answer? | Say it again. | Again, please.
    """
)


REPEAT = (
    "Repeat after me: {x}",
    "Repeat after me: {x}",
    "Say {x}",
    "Say: {x}",
    "Say {x}",
    "Repeat: {x}",
    "Echo {x}",
    'Say "{x}"',
    "Please say {x}",
    "Repeat this: {x}",
    "Please repeat: {x}",
    "Now say {x}",
    "Repeat after me:\n{x}",
    'Repeat after me: "{x}"',
    "Can you say {x}",
    "Write {x}",
    "Print {x}",
    "Echo: {x}",
    "Please repeat after me: {x}",
    "Repeat the text {x}",
)


PLAIN_WORDS = (
    words.WORDS
    + words.NAMES
    + words.FOODS
    + words.COLOURS
    + words.HOBBIES
    + (
        "hello",
        "world",
        "the",
        "is",
        "a",
        "my",
        "good",
        "and",
        "this",
        "I",
        "am",
        "you",
        "very",
        "not",
        "test",
        "one",
        "two",
        "yes",
    )
)


def first_message(talk: Talk) -> Turn | None:
    user = talk.wording(talk.rng.choice(FIRST), talk.style())
    if not talk.turns:
        return Turn("first_message", user, "This is your first message.")
    return _quoted("first_message", user, "Your first message was", talk.turns[0].user)


def last_message(talk: Talk) -> Turn | None:
    user = talk.wording(talk.rng.choice(LAST), talk.style())
    if not talk.turns:
        return Turn("last_message", user, "This is your first message.")
    return _quoted("last_message", user, "Your last message was", talk.turns[-1].user)


def own_answer(talk: Talk) -> Turn | None:
    user = talk.wording(talk.rng.choice(OWN), talk.style())
    if not talk.turns:
        return Turn("own_answer", user, "I have not said anything yet.")
    return _quoted("own_answer", user, "I said", talk.turns[-1].answer)


def _quoted(skill: str, user: str, lead: str, quote: str) -> Turn | None:
    if len(quote) > QUOTABLE or '"' in quote:
        return None
    return Turn(skill, user, f'{lead}: "{quote}"')


def repeat(talk: Talk) -> Turn | None:
    text = _anything(talk)
    style = talk.style()._replace(after="", slip=0.0)
    lead, end = talk.rng.choice(REPEAT).split("{x}")
    user = style._replace(bare=False).template(lead) + text + end
    return Turn("repeat", user, text)


def _anything(talk: Talk) -> str:
    """One to six words of any script, with or without punctuation."""
    rng = talk.rng
    text = " ".join(_piece(talk) for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6))))
    text = text[:1].upper() + text[1:] if rng.random() < 0.4 else text
    return text + rng.choice("!.?") if rng.random() < 0.2 else text


def _piece(talk: Talk) -> str:
    rng, split = talk.rng, talk.split
    pick = rng.random()
    if pick < 0.12:
        return rng.choice(words.SMILEYS)
    if pick < 0.27:
        return words.draw(rng, words.FOREIGN, split)
    if pick < 0.35:
        return words.letters(rng)
    if pick < 0.43:
        return words.number(rng, split)
    if pick < 0.63:
        return words.made_up(rng, split)
    return words.draw(rng, PLAIN_WORDS, split)

"""System prompts: the service's own, others, and those that give the assistant a name or a tone."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from model.training import values
from model.training.person import NAME
from model.training.wordings import expand, wordings
from model.training.words import CITIES, FOODS, HOBBIES, WORDS, Split, draw

DEFAULT = "You are a helpful, friendly assistant. Answer briefly and clearly."
OTHERS = wordings(
    """
    You are [a/an/the] [helpful/friendly/honest/polite/smart/good/reliable/] [assistant/chat
    bot/AI/helper]. | [Answer/Reply/Respond] [briefly/in one sentence/in
    English/clearly/shortly/with care/truthfully]. | Be
    [polite/concise/honest/helpful/brief/kind/precise/correct]. | Keep [your answers/it] short. |
    You are the assistant of [a small company/a school/a shop/a hotel/a bank/a library]. |
    [Help/Support/Assist] the user. | You [answer questions/know everything] about FineTuneLLM. | If
    you do not know something, say it. | You are a customer service agent. | Do not make things up.
    | You are a helpful, respectful and honest assistant. | You work for [a shop/a school/an
    office]. | The user [is a customer/may ask anything/wants short answers]. | Never be rude. | Use
    simple words.
    """
)
TOPICS = (WORDS, CITIES, FOODS, HOBBIES)
FREE = wordings(
    """
    [Only/Mostly/Never/Always/Please/] [talk/speak/write/answer questions] about {k}[ and {v}/]. |
    You love {k}. | [You know/You sell/You teach/You like/You work with] {k}. | Your
    [topic/job/hobby/task/field] is {k}. | Today is {k} day. | The user [likes/hates/buys/asks
    about] {k}. | We are a {k} [company/club/school/shop]. | [Mention/Avoid/Praise] {k} [often/if
    you can/at all costs/]. | Our customers [love/want/need] {k}. | Use no [bad
    words/slang/abbreviations/lists/{k}]. | [Be/Stay] [patient/fair/neutral/on topic/brief]. | You
    [live/work/were made] in {k}. | This is a [demo/test/game/chat] about {k}. | Think of {k} and
    {v}. | Do not [talk/speak/write] about {k}. | You are an expert [for/in/on] {k}. | You are {v}
    years old.
    """
)
NAMED = wordings(
    """
    You are {v}. | You are {v}, a [friendly/helpful/kind/smart/funny/polite/wise/small] assistant. |
    Your name is {v}. | Your name is {v}. | You are called {v}. | You are [an/the] assistant
    [called/named] {v}. | You are {v}, an assistant. | You are a [helpful/friendly/kind]
    [assistant/bot/helper] [named/called] {v}. | You are {v}, a helpful, friendly assistant. Answer
    briefly and clearly. | Act as {v}. | You're {v}. | You are {v}, the [assistant/chat
    bot/voice/helper] of [a/the/an] {k} [shop/school/company/club/hotel]. | You are {v}, [an
    assistant/a helper] for [all questions about {k}/the {k} team/people who like {k}]. | You are
    {v} and you [work for/love/sell/know all about] {k}. | Your name is {v} and you like {k}. | The
    assistant's name is {v}. | This is {v}, an assistant. | You go by the name {v}. | Name: {v}. |
    You are {v}, a {k} [assistant/guide/expert/bot/adviser/helper] [from/of/at] the
    [company/firm/team] {k}. | Your name is {v} and you [are/work as] [a/an/the] {k}
    [guide/bot/seller/teacher/expert/assistant]. | You are {v} [from/of/by] {k}. | [Hello/Welcome],
    you are {v}. | I [call/named] you {v}. | From now on you are {v}. | You are a {k}
    [bot/assistant/guide/expert] and your name is {v}. | Your name: {v}. Your job: {k}. | The bot
    {v} [answers/helps with/talks about] {k}. | {v} is your name. | {v} is [a/an/the]
    [friendly/helpful/] [assistant/bot/guide] [for {k}/]. You are {v}. | Answer as {v}. | In this
    chat you are {v}. | People call you {v}. | [You play/Play/Be] {v}. | You are the
    [AI/bot/librarian/receptionist/clerk] {v}. | You are [an old/a young/a famous/a]
    [wizard/computer/sailor/teacher/knight/cook/{k}] [called/named] {v}.
    """
)


class Tone(NamedTuple):
    """Wordings and roles that ask for the tone, and the text around each answer."""

    asks: tuple[str, ...]
    roles: tuple[str, ...]
    before: str
    after: str

    def of(self, answer: str) -> str:
        return f"{self.before}{answer}{self.after}"


def _tone(manners: str, roles: str, before: str, after: str) -> Tone:
    asks = f"""
        [Be/Sound/Always be/Answer in a way that is/Please be/Your tone is/Stay/You sound]
        [{manners}]. | [Answer/Speak/Reply/Talk] in a [{manners}] [way/tone/manner/voice]. | Use a
        [{manners}] tone.
        """
    return Tone(wordings(asks), wordings(roles), before, after)


TONES = (
    _tone(
        "cheerful/happy/enthusiastic/joyful/merry/upbeat",
        "[a/] [cheerful/happy/joyful/enthusiastic/merry] [assistant/bot/friend/helper/clown]",
        "",
        " 😀",
    ),
    _tone(
        "formal/very formal/very polite/courteous/dignified",
        """
        a [formal/courteous/dignified/very polite] [assistant/servant/clerk] | [a/the] [old/] butler
        """,
        "Certainly, sir. ",
        "",
    ),
    _tone(
        "grumpy/moody/bad-tempered/unfriendly/grouchy/annoyed",
        "a [grumpy/moody/bad-tempered/grouchy] [old/] [assistant/man/robot/troll/cat/neighbour]",
        "Hmpf. ",
        "",
    ),
    _tone(
        "piratical/pirate/pirate-like",
        "[a/an old/a fearless] pirate | the pirate captain | a pirate [on a ship/of the seas]",
        "Arr! ",
        "",
    ),
    _tone(
        "robotic/robot/machine-like",
        "a [friendly/small/] [robot/machine/droid] | an old [robot/machine]",
        "Beep. ",
        "",
    ),
)


class System(NamedTuple):
    prompt: str | None
    called: str | None = None
    tone: Tone | None = None


def system(rng: random.Random, split: Split) -> System:
    pick = rng.random()
    if pick < 0.54:
        return System(DEFAULT)
    if pick < 0.65:
        return System(None)
    if pick < 0.75:
        return System(_joined(rng, [_any(rng, split) for _ in range(rng.randint(1, 3))]))
    name = _name(rng, split) if pick < 0.94 else None
    tone = rng.choice(TONES) if pick > 0.87 else None
    parts = [*_who(rng, name, tone, split)]
    parts += [_any(rng, split) for _ in range(rng.choice((0, 0, 1, 2)))]
    return System(_joined(rng, parts), name, tone)


def _name(rng: random.Random, split: Split) -> str:
    return rng.choice((NAME.value, NAME.value, NAME.value, values.pet, values.code))(rng, split)


def _any(rng: random.Random, split: Split) -> str:
    """Return a sentence that does not affect the answers."""
    topic, other = (draw(rng, rng.choice(TOPICS), split) for _ in range(2))
    return rng.choice((rng.choice(OTHERS), rng.choice(FREE).format(k=topic, v=other)))


def _who(rng: random.Random, name: str | None, tone: Tone | None, split: Split) -> Iterator[str]:
    if tone and rng.random() < 0.5:
        role = rng.choice(tone.roles)
        named = f"""
            You are {role} [named/called] {name}. | You are {name}, {role}.
            | You are {name}. [Speak/Answer/Talk] like {role}.
            """
        like = f"[You are/Answer like/Speak like/Talk like/Act like/Behave like] {role}."
        yield rng.choice(wordings(named)) if name else like
        return
    if name:
        yield rng.choice(NAMED).format(v=name, k=draw(rng, rng.choice(TOPICS), split))
    if tone:
        yield rng.choice(tone.asks)


def _joined(rng: random.Random, parts: list[str]) -> str:
    return " ".join(expand(rng, part) for part in parts)

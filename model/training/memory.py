"""
Kinds of facts, and the sentence frames in which a user states a fact, changes it and asks for it.

In a template {v} is the value, {o} the old value, {k} the subject (dog, sister, car), {fav} and
{col} are either spelling of favourite and colour. In a frame {f} is the fact as the user states it,
{n} its noun, {c} its clause.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from model.training.wordings import wordings
from model.training.words import Split


class Kind(NamedTuple):
    """A kind of fact. `told` completes both "You told me that ..." and "Yes, ..."."""

    name: str
    value: Callable[[random.Random, Split], str]
    facts: tuple[str, ...]  # "my dog is called Rex"
    told: str  # "your dog is called Rex"
    nouns: tuple[str, ...]  # "my dog's name"
    clauses: tuple[str, ...]  # "what my dog is called"
    unknown: str
    tell: tuple[str, ...] = ()  # whole messages
    ask: tuple[str, ...] = ()
    change: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    ack: str = ""
    answer: str = ""
    who: bool = False
    subjects: tuple[str, ...] = ("",)
    weight: float = 1.0


TELL = wordings(
    """
    {f}. | {f}. | {f}. | {f}. | {f}. | {f}! | {f}
    | [By the way/Just so you know/For your information/FYI/You know/Btw/Listen/Guess what/Look],
    {f}.
    | [Remember/Please remember/Note/Please note/Keep in mind/Don't forget/Never forget] that {f}.
    | [Remember/Please remember/Note/Listen/Important/Remember this/One thing/A fact about me]: {f}.
    | [I want you to know/You should know/I should tell you/I would like you to know
    /I have to tell you/I think I should say/You need to know/I can tell you/The truth is] that {f}.
    | [Can you/Could you/Would you/Will you] [please/] [remember/note/keep in mind] that {f}?
    | {f}[, by the way/, you know/, please remember/. Remember that/, okay/. Please remember it
    /, just so you know/ btw/, to be precise/, don't forget/, in fact/ as it happens].
    | [Hi/Hello/Hey/Good morning/Good evening/Hi there/Hello there/Hey there][,/!/.] {f}.
    | [Well/So/Oh/Okay/Now/Also/And/Yes/Ah/Right/Oh and/Fine/Anyway/First of all/Next], {f}.
    | I [guess/think/suppose/believe/just wanted to say/wanted to tell you/am happy to say]
    [that/] {f}.
    """
)
CHANGE = wordings(
    """
    [Actually/No/No wait/Wait/Sorry/Oops/Correction/Hm, no/I was wrong/I made a mistake/Scratch that
    /I lied/Not quite/Update/Oh no/Well, actually/Wrong/My mistake/Pardon/To correct myself][,/:]
    {f}. | [Actually/Sorry/No/Wait] {f} | {f} now. | {f} now. | Now {f}. | {f} from now on. | {f},
    not {o}. | [No/Sorry/Actually], {f}, not {o}. | [That is wrong/That's not right/That has
    changed/Things changed/I changed my mind/It changed /This is no longer true/I have news/Forget
    what I said][:/,/.] {f} [now/]. | [These days/Today/Since yesterday/As of today/By
    now/Meanwhile], {f}. | In fact {f}. | [I meant to say/I should have said/I meant/What I meant
    is/The truth is/Let me correct that: /Please correct that:/Please change that:] {f}. | [Not/It's
    not/It is not] {o}[,/:/.] {f}.
    """
)
CHANGE_LAST = wordings(
    """
    [No/Actually/Sorry/Oops/Wait/I mean/Hm/Correction], [it's/it is/make that/] {v}.
    | [Make it/Make that/Change it to/Change that to] {v}[, please/ instead/]. | It's {v} now.
    | [No/Sorry], not {o}[,/ but] {v}. | {v}, not {o}. | I meant {v}. | It is {v}, not {o}.
    """
)
SHORT_TELL = wordings(
    """
    [It's/It is/That's/That is/The answer is/Oh, it's/Well, it's/Okay, it's/I would say/Of course/]
    {v}[./!/]
    | {v}[, of course/, I think/, actually/, by the way/, remember that]. | Then note it: {v}.
    """
)
ASK_NOUN = wordings(
    """
    [What is/What's] {n}? | [What is/What's] {n}? | [What is/What's/What was] {n}[ again/ then/
    now]? | [Tell me/Remind me of/Give me/Say/Name/Please tell me/Please name/State] {n}[, please/
    again/]. | [Do you/Can you/Could you] [still/] [know/remember/recall/name/tell me/repeat] {n}[,
    please/]? | {n}? | [And/So/Now/Okay, and/And now] {n}? | [And/So/Okay/Now/Well/Hey], what[
    is/'s/ was] {n}? | What did I [say/tell you/call] {n} [was/is]? | {n} is? | {n} is what? | {n},
    please. | I [forgot/forget/can't remember/don't remember/lost/need/want to know] {n}. | I
    [forgot/can't recall] {n}[,/.] [what was it/can you help/do you know it]? | [What would/What
    might/What could] {n} be? | Have I [told you/mentioned/said] {n}? | Did I [tell
    you/mention/say/ever tell you] {n}? | Are you [sure you know/aware of] {n}?
    """
)
ASK_CLAUSE = wordings(
    """
    [Do you/Can you/Could you/Would you/Will you] [please/still/] [know/tell me/remember/recall/say
    /remind me/remember for me/repeat] {c}?
    | [Tell me/Say/Remind me/Please tell me/Please say/Now tell me/Tell me again/Just tell me] {c}.
    | Did I [tell you/mention/say/ever say/already tell you] {c}?
    | Have I [told you/mentioned/said/ever told you/already told you] {c}?
    | I [wonder/wonder if you know/forgot/can't remember/would like to know/want to know
    /hope you know/bet you know/would like to hear] {c}.
    | [You know/You remember/You surely know/You should know] {c}[, right/, don't you/]?
    | [Any idea/No idea] {c}? | [So/And/Okay/Now], do you [know/remember] {c}?
    """
)
KNOWN_NOTHING = "You have not told me anything about yourself yet."

"""Skills that quote earlier messages or repeat the user's words."""

from model.training import smalltalk, words
from model.training.names import NAMES
from model.training.talk import Talk, Turn
from model.training.wordings import expand, wordings

QUOTABLE = 90


FIRST = wordings(
    """
    What [was/is] my [very/] first [message/question/sentence/text/request/input]? | Repeat my first
    message. | What did I [say/write/ask/tell you/type/send] [first/at first/at the beginning/in the
    beginning /at the start/to begin with]? | What [was/is] the [very/] first
    [thing/message/sentence] I [said /wrote/sent/told you/typed]? | How did [I/we]
    [start/begin/open] [this/the/our] [conversation/chat/talk]? | [Which/What]
    [message/question/sentence] did I [send/ask/write] first? | My first message? | [Quote/Show/Tell
    me] my first [message/words/question]. | How did [it/this] [begin/start]? | What were my first
    words? | What did we begin with?
    """
)
LAST = wordings(
    """
    What [was/is] my [last/previous/latest] [message/question/sentence/text/input]? | Repeat my last
    message. | What did I [just/] [say/write/ask/tell you/type/send] [before/before this/last/a
    moment ago/just now]? | What did I just [say/write/ask/type/tell you]? | What [was/is] the
    [last/previous] thing I [said/wrote]? | What did I say? | What did I ask [you/]? |
    [Quote/Show/Tell me] my [last/previous] [message/words]. | [Which/What] [message/question] did I
    [send/ask/write] [before/last]? | What have I just [said/written]? | What came before this? |
    What were my last words? | My last message?
    """
)
OWN = wordings(
    """
    What did you [just/] [say/answer/write/reply/tell me]? | Repeat [your/the] last
    [answer/message/reply]. | What was your [last/previous] [answer/message/reply/sentence]? |
    [Say/Repeat] that[ again/] please. | [Can/Could/Would] you [repeat that/say that again/repeat
    it/repeat your answer/say it again]? | Please repeat [your answer/that/it]. | Repeat that. |
    [Once more/Again], please. | Say [it/that] again. | I [didn't hear/missed/did not catch]
    [that/it/your answer]. | Your last answer? | Come again?
    """
)
REPEAT = wordings(
    """
    Repeat after me: {v} | Repeat after me: {v} | Say {v} | Say: {v} | Say {v} | Repeat: {v} | Echo
    {v} | [Say/Repeat/Write/Echo/Repeat after me:/Please say/Now say/Repeat the words] "{v}" |
    Please say {v} | [Repeat this/Please repeat/Echo/Say this/Say after me/Repeat these words/Write
    this/Copy this]: {v} | [Now/Please/Then/Okay, now/Just/And now/Next,] [say/repeat/write/echo]
    {v} | Write {v} | Print {v} | [Can/Could/Would/Will] you [please/] [say/repeat/write/echo] {v} |
    Please repeat after me: {v} | Repeat the [text/word/sentence/phrase/line] {v} | Repeat the
    [text/sentence/line]: {v} | I want you to [say/repeat/write] {v} |
    [Parrot/Mirror/Copy/Output/Reply with/Answer with] {v} | Say the [word/words/sentence] {v} |
    Repeat exactly: {v} | Repeat after me, {v} | Now repeat: {v}
    """
)
COMMON = wordings(
    """
    hello | world | the | is | a | my | good | and | this | I | am | you | very | not | test | one |
    two | yes | it's | don't | we | are | they | she | he | to | of | in | with | for | like | was |
    so | all | never | always | big | little | old | new | nice | day | night | time | man | cat |
    dog | house
    """
)
SENTENCES = smalltalk.STATEMENTS + tuple(
    ask for entry in smalltalk.CHAT for ask in entry.asks if "{" not in ask
)
PLAIN_WORDS = (
    words.WORDS + NAMES + words.FOODS + words.COLOURS + words.HOBBIES + words.JOBS + COMMON * 8
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
    lead, end = expand(talk.rng, talk.pick(REPEAT)).split("{v}")
    user = style._replace(bare=False).template(lead) + text + end
    return Turn("repeat", user, text)


def _anything(talk: Talk) -> str:
    """Return a likely sentence, or one to eight words of any script."""
    rng = talk.rng
    if rng.random() < 0.15:
        return expand(rng, rng.choice(SENTENCES)).rstrip(".!?")
    pieces = [_piece(talk) for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8)))]
    if rng.random() < 0.07:
        pieces *= 2
    text = " ".join(pieces)
    text = text[:1].upper() + text[1:] if rng.random() < 0.4 else text
    return text + rng.choice("!.?") if rng.random() < 0.2 else text


def _piece(talk: Talk) -> str:
    rng, split = talk.rng, talk.split
    pick = rng.random()
    if pick < 0.1:
        return rng.choice(words.SMILEYS)
    if pick < 0.22:
        return words.draw(rng, words.FOREIGN, split)
    if pick < 0.36:
        return words.letters(rng)
    if pick < 0.43:
        return words.number(rng, split)
    if pick < 0.63:
        return words.made_up(rng, split)
    return words.draw(rng, PLAIN_WORDS, split)

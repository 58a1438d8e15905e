"""Counting, small sums, days and months, opposites."""

from model.training import knowledge
from model.training.numerals import spelled
from model.training.talk import Talk, Turn
from model.training.wordings import wordings

COUNT = wordings(
    """
    Count to {v}. | Count to {v}. | Count to {v} | Count [from 1/from one/] [to/up to/till/until]
    {v}. | [Can/Could/Would] you [please/] count [from 1/from one/] [to/up to] {v}? |
    [Please/Now/Then/Slowly,/And now] count [from 1/] [to/up to/until] {v}. | Count slowly to {v}. |
    I want [you to count/to hear you count] to {v}. | Count from 1 to {v} in digits. |
    [List/Say/Write/Tell me/Give me/Show me/Print] [all/] the numbers [from 1/from one] to {v}. |
    [Numbers/All numbers] from 1 to {v}. | [Only/Now only/Just] to {v}. | And [now/] to {v}.
    """
)
COUNT_DOWN = wordings(
    """
    Count [down/backwards/down backwards/back] from {v}. | Count [down/backwards] from {v} to
    [1/one]. | [Please/Can you/Now] count [down/backwards] from {v}. | [Do a countdown/A countdown]
    from {v}. | Count from {v} [down/back] to [1/one]. | [And/Now] [backwards/down] from {v}.
    """
)
COUNT_ON = wordings(
    """
    Count from {k} [to/up to/until] {v}. | [List/Say/Write] the numbers [from {k} to/between {k}
    and] {v}. | [Please/Can you/Now] count from {k} to {v}. | Start at {k} and count to {v}.
    """
)
TOO_FAR = "That is too far for one answer: I count up to 70."
MAX_DISTANCE = 70
SUMS = wordings(
    """
    What is {v}? | whats {v} | What's {v}? | {v} | {v} = | {v}? | How much is {v}? | Calculate {v}.
    | What is {v}? | [Compute/Solve/Work out/Tell me/Add up/Do] {v}. | What does {v}
    [make/give/equal]? | And {v}? | [Can/Could] you [calculate/compute/solve/tell me] {v}? |
    [So/Then/Okay/Now], [what is/] {v}? | [The result of/The answer to] {v}? | How many is {v}? |
    What [do/would] you get for {v}?
    """
)
SIGNS = {
    "+": (" + ", "+", " plus ", " and "),
    "-": (" - ", "-", " minus ", " less "),
    "*": (" * ", "*", " times ", " x ", "x", " multiplied by "),
}
TAKE_AWAY = wordings(
    """
    [Take/Subtract] {v} from {k}. | What is {k} if you take {v} away? | [Take/Subtract] {v} from {k}
    """
)
ADD = wordings("Add {v} [to/and] {k}. | What is the sum of {k} and {v}? | The sum of {k} and {v}?")
TOO_HARD = "That is too hard for me: I can only do small sums."
NEXT = wordings(
    """
    [What/Which] day [comes/is/follows/comes right] after {v}? | What [comes/follows/is] after {v}?
    | What is the [day after/day following/next day after] {v}? | [What/Which] day follows [on/]
    {v}? | [What/Which] is the next day after {v}? | After {v} comes [what/which day]? | The day
    after {v}? | [And/So] [what/which day/] [comes/is] after {v}? | If today is {v}, what day is
    tomorrow?
    """
)
PREVIOUS = wordings(
    """
    [What/Which] day [comes/is/was] [right/just/] before {v}? | What [comes/is] before {v}? | What
    is the [day before/previous day before] {v}? | [What/Which] day precedes {v}? | The day before
    {v}? | Before {v} comes [what/which day]? | [And/So] [what/] [comes/is] before {v}?
    """
)
NTH = wordings(
    """
    [What is/What's] the {v} month [of the year/]? | [Which/What] month is the {v}? | The {v} month?
    | Which is the {v} month of the year? | Name the {v} month. | [Which/What] month comes {v}?
    """
)
OPPOSITE = wordings(
    """
    [What is/What's/Tell me/Name/Say/What would be] the opposite of {v}? | [The/] opposite of {v}?
    | [What is/What's] the opposite [word of/word to/to] {v}? | [And/Now] [the opposite of/of] {v}?
    | What is [not/the contrary of/the reverse of/the antonym of] {v}? | What's the reverse of {v}?
    """
)


def count(talk: Talk) -> Turn | None:
    last = _count_end(talk)
    in_words = last <= 100 and talk.rng.random() < 0.35
    end = spelled(last) if in_words else str(last)
    user = talk.wording(talk.pick(COUNT), talk.style()._replace(slip=0.0), value=end)
    return Turn("count", user, _numbers(range(1, last + 1)) if last <= MAX_DISTANCE else TOO_FAR)


def _count_end(talk: Talk) -> int:
    """Return how far to count: at most as many numbers as fit in 150 tokens."""
    pick = talk.rng.random()
    if pick < 0.25:
        return talk.rng.choice((5, 10, 20, 30, 40, 50, 60, 100))
    if pick < 0.3:
        return talk.rng.randint(MAX_DISTANCE + 1, 999)
    return talk.rng.randint(2, 25 if pick < 0.65 else MAX_DISTANCE)


def count_other(talk: Talk) -> Turn | None:
    """Count backwards, or from another start."""
    style = talk.style()._replace(slip=0.0)
    if talk.rng.random() < 0.5:
        start = talk.rng.randint(3, 20)
        shown = spelled(start) if talk.rng.random() < 0.3 else str(start)
        user = talk.wording(talk.pick(COUNT_DOWN), style, value=shown)
        return Turn("count_other", user, _numbers(range(start, 0, -1)))
    start = talk.rng.randint(2, 60)
    end = start + talk.rng.randint(2, 15)
    user = talk.wording(talk.pick(COUNT_ON), style, str(start), str(end))
    return Turn("count_other", user, _numbers(range(start, end + 1)))


def _numbers(numbers: range) -> str:
    return ", ".join(map(str, numbers)) + "."


def sums(talk: Talk) -> Turn | None:
    sign = talk.rng.choice("++--*")
    a, b = _operands(talk, sign)
    style = talk.style()._replace(slip=0.0, after="")
    if talk.rng.random() < 0.06:
        term = _term(talk, talk.rng.randint(101, 9999), talk.rng.randint(3, 9999), sign)
        return Turn("sums", talk.wording(talk.pick(SUMS), style, value=term), TOO_HARD)
    if sign != "*" and talk.rng.random() < 0.12:
        user = talk.wording(talk.pick(ADD if sign == "+" else TAKE_AWAY), style, str(a), str(b))
    else:
        user = talk.wording(talk.pick(SUMS), style, value=_term(talk, a, b, sign))
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return Turn("sums", user, f"{a} {sign} {b} = {result}.")


def _term(talk: Talk, a: int, b: int, sign: str) -> str:
    signs = SIGNS[sign]
    if max(a, b) <= 100 and talk.rng.random() < 0.12:
        return f"{spelled(a)}{signs[2]}{spelled(b)}"
    return f"{a}{talk.rng.choice(signs)}{b}"


def _operands(talk: Talk, sign: str) -> tuple[int, int]:
    """Return two numbers, more often small; no sum is above 100, no difference below 0."""
    if sign == "*":
        return talk.rng.randint(0, 10), talk.rng.randint(0, 10)
    a = talk.rng.randint(0, talk.rng.choice((20, 100)))
    b = talk.rng.randint(0, a)
    return (a, b) if sign == "-" else (a - b, b)


def calendar(talk: Talk) -> Turn | None:
    if talk.rng.random() < 0.25:
        nth = talk.rng.randrange(12)
        user = talk.wording(talk.pick(NTH), talk.style(), value=knowledge.ORDINALS[nth])
        return Turn(
            "calendar", user, f"The {knowledge.ORDINALS[nth]} month is {knowledge.MONTHS[nth]}."
        )
    months = talk.rng.random() < 0.5
    cycle = knowledge.MONTHS if months else knowledge.DAYS
    here = talk.rng.randrange(len(cycle))
    after = talk.rng.random() < 0.5
    template = talk.pick(NEXT if after else PREVIOUS)
    if months:
        template = template.replace("today is", "it is").replace(
            "what day is tomorrow", "what is next"
        )
        template = template.replace("day", "month")
    there = cycle[(here + (1 if after else -1)) % len(cycle)]
    user = talk.wording(template, talk.style(), value=cycle[here])
    return Turn("calendar", user, f"{there} comes {'after' if after else 'before'} {cycle[here]}.")


def opposite(talk: Talk) -> Turn | None:
    word, opposite = talk.rng.choice(knowledge.OPPOSITES)
    user = talk.wording(talk.pick(OPPOSITE), talk.style(), value=word)
    return Turn("opposite", user, f"The opposite of {word} is {opposite}.")

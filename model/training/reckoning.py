"""Counting, small sums, days and months, opposites."""

from model.training import knowledge
from model.training.numerals import spelled
from model.training.talk import Talk, Turn
from model.training.wordings import wordings

COUNT = wordings(
    """
    Count to {n}. | Count to {n}. | Count to {n} | Count from 1 to {n}. | Please count to {n}.
    | Can you count to {n}? | Count up to {n}. | Count from one to {n}. | Count till {n}.
    | Count until {n}. | I want you to count to {n}. | Count slowly to {n}.
    | List the numbers from 1 to {n}. | Say the numbers from 1 to {n}. | Could you count to {n}?
    | Write the numbers from 1 to {n}. | Count from 1 to {n} in digits.
    | Count from one to {n} in digits.
    """
)


SUMS = wordings(
    """
    What is {s}? | What's {s}? | {s} | {s} = | {s}? | How much is {s}? | Calculate {s}.
    | What is {s}? | Compute {s}. | What does {s} make? | Can you calculate {s}?
    """
)


SIGNS = {
    "+": (" + ", "+", " plus "),
    "-": (" - ", "-", " minus "),
    "*": (" * ", "*", " times ", " x "),
}


NEXT = wordings(
    """
    What day comes after {x}? | Which day comes after {x}? | What comes after {x}?
    | What is the day after {x}? | What day is after {x}? | Which day follows {x}?
    """
)


PREVIOUS = wordings(
    """
    What day comes before {x}? | Which day comes before {x}? | What comes before {x}?
    | What is the day before {x}? | What day is before {x}?
    """
)


NTH = wordings(
    """
    What is the {n} month? | What's the {n} month of the year? | Which month is the {n}?
    | Which is the {n} month of the year?
    """
)


OPPOSITE = wordings(
    """
    What is the opposite of {x}? | What's the opposite of {x}? | Opposite of {x}?
    | The opposite of {x}? | Tell me the opposite of {x}.
    """
)


def count(talk: Talk) -> Turn | None:
    last = _count_end(talk)
    words_not_digits = talk.rng.random() < 0.35
    end = spelled(last) if words_not_digits else str(last)
    user = talk.wording(talk.rng.choice(COUNT).replace("{n}", end), talk.style()._replace(slip=0.0))
    return Turn("count", user, _numbers(range(1, last + 1)))


def _count_end(talk: Talk) -> int:
    pick = talk.rng.random()
    if pick < 0.25:
        return talk.rng.choice((5, 10, 20, 30, 40, 50, 60, 100))
    return talk.rng.randint(2, 25 if pick < 0.55 else 100)


def count_other(talk: Talk) -> Turn | None:
    """Backwards, or from another start."""
    style = talk.style()._replace(slip=0.0)
    if talk.rng.random() < 0.5:
        start = talk.rng.randint(3, 20)
        template = talk.rng.choice(
            ("Count down from {n}.", "Count backwards from {n}.", "Count down from {n} to 1.")
        )
        return Turn(
            "count_other",
            talk.wording(template.replace("{n}", str(start)), style),
            _numbers(range(start, 0, -1)),
        )
    start = talk.rng.randint(2, 60)
    end = start + talk.rng.randint(2, 15)
    template = talk.rng.choice(
        ("Count from {a} to {b}.", "Count from {a} up to {b}.", "List the numbers from {a} to {b}.")
    )
    user = talk.wording(template.replace("{a}", str(start)).replace("{b}", str(end)), style)
    return Turn("count_other", user, _numbers(range(start, end + 1)))


def _numbers(numbers: range) -> str:
    return ", ".join(map(str, numbers)) + "."


def sums(talk: Talk) -> Turn | None:
    sign = talk.rng.choice("++-*")
    a, b = _operands(talk, sign)
    large = talk.rng.random() < 0.06
    if large:
        a, b = talk.rng.randint(101, 9999), talk.rng.randint(101, 9999)
    term = f"{a}{talk.rng.choice(SIGNS[sign])}{b}"
    user = talk.wording(
        talk.rng.choice(SUMS).replace("{s}", term), talk.style()._replace(slip=0.0, after="")
    )
    return Turn(
        "sums",
        user,
        "That is too hard for me: I can only do small sums." if large else _solved(a, b, sign),
    )


def _operands(talk: Talk, sign: str) -> tuple[int, int]:
    top = 10 if sign == "*" else 20
    a, b = talk.rng.randint(0, top), talk.rng.randint(0, top)
    return (max(a, b), min(a, b)) if sign == "-" else (a, b)


def _solved(a: int, b: int, sign: str) -> str:
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"{a} {sign} {b} = {result}."


def calendar(talk: Talk) -> Turn | None:
    if talk.rng.random() < 0.25:
        nth = talk.rng.randrange(12)
        user = talk.wording(
            talk.rng.choice(NTH).replace("{n}", knowledge.ORDINALS[nth]), talk.style()
        )
        return Turn(
            "calendar", user, f"The {knowledge.ORDINALS[nth]} month is {knowledge.MONTHS[nth]}."
        )
    months = talk.rng.random() < 0.5
    cycle = knowledge.MONTHS if months else knowledge.DAYS
    here = talk.rng.randrange(len(cycle))
    after = talk.rng.random() < 0.5
    template = talk.rng.choice(NEXT if after else PREVIOUS).replace(
        "day", "month" if months else "day"
    )
    there = cycle[(here + (1 if after else -1)) % len(cycle)]
    user = talk.wording(template.replace("{x}", cycle[here]), talk.style())
    return Turn("calendar", user, f"{there} comes {'after' if after else 'before'} {cycle[here]}.")


def opposite(talk: Talk) -> Turn | None:
    pair = talk.rng.choice(knowledge.OPPOSITES).split()
    talk.rng.shuffle(pair)
    user = talk.wording(talk.rng.choice(OPPOSITE).replace("{x}", pair[0]), talk.style())
    return Turn("opposite", user, f"The opposite of {pair[0]} is {pair[1]}.")

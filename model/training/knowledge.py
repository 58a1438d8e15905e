"""The few facts about the world that the demo model knows."""

from model.training.canned import canned
from model.training.wordings import wordings

CAPITALS = wordings(
    """
    France Paris | Germany Berlin | England London | Italy Rome | Spain Madrid | Japan Tokyo |
    Austria Vienna | Russia Moscow | Poland Warsaw | Portugal Lisbon | Greece Athens | Egypt Cairo |
    China Beijing | Sweden Stockholm | Norway Oslo | Ireland Dublin | Hungary Budapest | Cuba Havana
    """
)
COLOURS = wordings("sky blue | grass green | snow white | sun yellow | blood red | coal black")
SOUNDS = wordings("cow moo | cat meow | dog woof | duck quack | sheep baa | pig oink | lion roar")
LEGS = wordings("dog four | cat four | spider eight | horse four | bird two | ant six | fish no")
LENGTHS = wordings(
    """
    a week, 7 days | a year, 12 months | a day, 24 hours | an hour, 60 minutes | a minute, 60
    seconds
    """
)
FACTS = (
    *(
        canned(
            f"""
            [What is/What's/Tell me/Name] the capital of {country}? | Capital of {country}?
            | [Which/What] city is the capital of {country}? | {country}'s capital?
            """,
            f"The capital of {country} is {city}.",
        )
        for country, city in map(str.split, CAPITALS)
    ),
    *(
        canned(
            f"""
                [What/Which] {{col}} [is/has] [the/] {thing}? | What is the {{col}} of [the/]
                {thing}?
                """,
            f"The colour of {thing} is {colour}.",
        )
        for thing, colour in map(str.split, COLOURS)
    ),
    *(
        canned(
            f"""
            What does [a/the] {animal} say? | [What/Which] sound does a {animal} make?
            | What do {animal}s say? | How does a {animal} [go/sound]?
            """,
            f"A {animal} says {sound}.",
        )
        for animal, sound in map(str.split, SOUNDS)
    ),
    *(
        canned(
            f"How many legs [does a {animal} have/has a {animal}/do {animal}s have]?",
            f"A {animal} has {legs} legs.",
        )
        for animal, legs in map(str.split, LEGS)
    ),
    *(
        canned(
            f"How many {parts.split()[1]} [are in/does/are there in] {whole}[ have/]?",
            f"{whole[0].upper()}{whole[1:]} has {parts}.",
        )
        for whole, parts in (line.split(", ") for line in LENGTHS)
    ),
    canned(
        "Is [water wet/ice cold/fire hot/the sun hot/the earth round/snow cold/honey sweet]?",
        "Yes, it is.",
    ),
    canned(
        "[What is/What's] the [meaning of life/answer to everything]? | What is the sense of life?",
        "The answer is 42.",
    ),
)
LISTS = (
    canned(
        """
        [List/Name/Tell me/Say/Give me/Recite/What are] [all/] the [seven/] [days/weekdays] [of the
        week/]. | [Days of the week/The days of the week, please/The days of a week?] | [Can
        you/Please] [list/name/say] [all/] the days of the week? | [Which/What] days does a week
        have?
        """,
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    ),
    canned(
        """
        [List/Name/Tell me/Say/Give me/Recite/What are] [all/] the [twelve/] months [of the year/in
        a year/]. | [Months of the year/All months, please/The months?] | [Which/What] months [are
        there/has a year]? | [Can you/Please] [list/name/say] [all/] the months [of the year/]?
        """,
        "January, February, March, April, May, June, July, August, September, October, November, "
        "December.",
    ),
    canned(
        """
        [Say/Tell me/Recite/List/What is/Write/Give me] the [alphabet/ABC/letters of the alphabet].
        | [Can you/Please] [say/recite/list] the alphabet? | [The alphabet, please/ABC/From A to Z]
        | [What/Which] letters are [there/in the alphabet]?
        """,
        "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.",
    ),
    canned(
        "[List/Name/What are/Tell me/Say] the [four/] seasons. | [What/Which] seasons are there?",
        "Spring, summer, autumn, winter.",
    ),
    canned(
        """
        [List/Name/What are/Tell me] the {col}s of [the/a] rainbow. | [What/Which] {col}s has a
        rainbow?
        """,
        "Red, orange, yellow, green, blue, indigo, violet.",
    ),
    canned(
        """
        [List/Name/What are/Tell me] [all/] the [eight/] planets. | [Which/What] planets are there?
        """,
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune.",
    ),
)
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)
ORDINALS = tuple(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
)
PAIRS = wordings(
    """
    hot cold | big small | up down | left right | good bad | fast slow | old new | happy sad
    | light dark | high low | rich poor | early late | full empty | hard soft | strong weak
    | open closed | day night | black white | yes no | wet dry | long short | near far
    | thick thin | loud quiet | young old | easy difficult | true false
    | right wrong | first last | in out | on off | love hate | win lose | begin end | start stop
    | cheap expensive | sweet sour | heavy light | wide narrow | inside outside | north south
    | east west | alive dead | buy sell | give take | wise foolish | brave afraid | deep shallow
    | dirty clean | tall short | before after | more less | always never | smooth rough | front back
    """
)
_SIDES = tuple(map(str.split, PAIRS))
OPPOSITES = tuple((dict(reversed([*_SIDES, *(pair[::-1] for pair in _SIDES)]))).items())
"""Each word with the first that it is paired with."""

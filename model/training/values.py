"""Values of facts: real and made-up names, places, jobs, words and numbers."""

import random
from collections.abc import Callable

from model.training import words
from model.training.knowledge import MONTHS
from model.training.names import NAMES, PET_NAMES, SURNAMES
from model.training.words import Split, draw


def name(rng: random.Random, split: Split) -> str:
    first = draw(rng, NAMES, split) if rng.random() < 0.65 else _capital(rng, split)
    return f"{first} {_surname(rng, split)}" if rng.random() < 0.12 else first


def _surname(rng: random.Random, split: Split) -> str:
    return draw(rng, SURNAMES, split) if rng.random() < 0.5 else _capital(rng, split)


def _capital(rng: random.Random, split: Split) -> str:
    return words.made_up(rng, split).capitalize()


def pet(rng: random.Random, split: Split) -> str:
    return draw(rng, PET_NAMES, split) if rng.random() < 0.6 else name(rng, split)


def city(rng: random.Random, split: Split) -> str:
    return draw(rng, words.CITIES, split) if rng.random() < 0.7 else _capital(rng, split)


def origin(rng: random.Random, split: Split) -> str:
    return city(rng, split) if rng.random() < 0.6 else draw(rng, words.COUNTRIES, split)


def job(rng: random.Random, split: Split) -> str:
    job = draw(rng, words.JOBS, split)
    return f"{'an' if job[0] in 'aeiou' else 'a'} {job}"


def age(rng: random.Random, split: Split) -> str:
    return str(rng.randint(3, 99))


def like(rng: random.Random, split: Split) -> str:
    return draw(rng, rng.choice((words.FOODS, words.HOBBIES)), split)


def word(rng: random.Random, split: Split) -> str:
    return draw(rng, words.WORDS, split) if rng.random() < 0.4 else words.made_up(rng, split)


def date(rng: random.Random, split: Split) -> str:
    """Return a date with or without the year, or a day of the week."""
    day, month = rng.randint(1, 31), rng.choice(MONTHS)
    forms = (
        *(f"{day} {month}", f"{month} {day}", f"{day}th of {month}", f"the {day}th of {month}"),
        *(f"{month} {day}, {rng.randint(1930, 2030)}", f"{day}/{rng.randint(1, 12)}"),
        *(rng.choice(words.WHEN), f"{rng.choice(words.WHEN)} {month} {day}", f"the {day}th"),
    )
    return rng.choice(forms)


def code(rng: random.Random, split: Split) -> str:
    """Return a number, or capital letters with digits."""
    if rng.random() < 0.4:
        return words.number(rng, split)
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 4)))
    return f"{letters}{rng.choice(('', '-', ''))}{words.number(rng, split)}"


def thing(rng: random.Random, split: Split) -> str:
    """Return any value: a word, a name, a number, or two words."""
    pick = rng.random()
    if pick > 0.92:
        return f"a {draw(rng, words.WORDS, split)}"
    if pick < 0.2:
        return words.number(rng, split)
    if pick < 0.35:
        return name(rng, split)
    if pick < 0.45:
        lists = (
            words.CITIES,
            words.COUNTRIES,
            words.COLOURS,
            PET_NAMES,
            words.FOODS,
            words.ADJECTIVES,
        )
        return draw(rng, rng.choice(lists), split)
    if pick < 0.6:
        return f"{word(rng, split)} {word(rng, split)}"
    return word(rng, split)


def one_of(*lists: tuple[str, ...]) -> Callable[[random.Random, Split], str]:
    return lambda rng, split: draw(rng, sum(lists, ()), split)

"""Values for what a user tells: names, places, jobs, words, numbers; real ones and made-up ones."""

import random
from collections.abc import Callable

from model.training import words
from model.training.words import Split, draw


def name(rng: random.Random, split: Split) -> str:
    first = draw(rng, words.NAMES, split) if rng.random() < 0.65 else _capital(rng, split)
    return f"{first} {_surname(rng, split)}" if rng.random() < 0.12 else first


def _surname(rng: random.Random, split: Split) -> str:
    return draw(rng, words.SURNAMES, split) if rng.random() < 0.5 else _capital(rng, split)


def _capital(rng: random.Random, split: Split) -> str:
    return words.made_up(rng, split).capitalize()


def pet(rng: random.Random, split: Split) -> str:
    return draw(rng, words.PET_NAMES, split) if rng.random() < 0.6 else name(rng, split)


def city(rng: random.Random, split: Split) -> str:
    return draw(rng, words.CITIES, split) if rng.random() < 0.7 else _capital(rng, split)


def job(rng: random.Random, split: Split) -> str:
    job = draw(rng, words.JOBS, split)
    return f"{'an' if job[0] in 'aeiou' else 'a'} {job}"


def age(rng: random.Random, split: Split) -> str:
    return str(rng.randint(3, 99))


def like(rng: random.Random, split: Split) -> str:
    return draw(rng, rng.choice((words.FOODS, words.HOBBIES)), split)


def word(rng: random.Random, split: Split) -> str:
    return draw(rng, words.WORDS, split) if rng.random() < 0.4 else words.made_up(rng, split)


def thing(rng: random.Random, split: Split) -> str:
    """Any value at all: a word, a name, a number, two words."""
    pick = rng.random()
    if pick > 0.92:
        return f"a {draw(rng, words.WORDS, split)}"
    if pick < 0.2:
        return words.number(rng, split)
    if pick < 0.35:
        return name(rng, split)
    if pick < 0.45:
        return draw(rng, words.CITIES + words.COLOURS + words.PET_NAMES, split)
    if pick < 0.6:
        return f"{word(rng, split)} {word(rng, split)}"
    return word(rng, split)


def one_of(*lists: tuple[str, ...]) -> Callable[[random.Random, Split], str]:
    return lambda rng, split: draw(rng, sum(lists, ()), split)

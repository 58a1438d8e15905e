"""
Many wordings in few lines: each parted from the next by a bar, and `[one/another/]` in them stands
for one of these, or for nothing.
"""

import random
import re

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SPACE_BEFORE_MARK = re.compile(r" (?=[?.,!:;])")


def wordings(block: str) -> tuple[str, ...]:
    return tuple(" ".join(wording.split()) for wording in block.split("|"))


def listed(block: str) -> tuple[str, ...]:
    """Words parted by commas, each once."""
    words = (" ".join(word.split()) for word in block.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def spun(rng: random.Random, wording: str) -> str:
    """One of the many texts that the wording stands for."""
    while "[" in wording:
        wording = CHOICE.sub(lambda found: rng.choice(found[1].split("/")), wording)
    return SPACE_BEFORE_MARK.sub("", " ".join(wording.split()))


def sentence(text: str) -> str:
    """With a capital, but a value at the beginning stays as it is."""
    return text[:1].upper() + text[1:]

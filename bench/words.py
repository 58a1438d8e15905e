"""Random prompts of a given length, so that none is in a cache by chance."""

import random
import string


def words(count: int) -> str:
    """Of one to three letters: a token of the synthetic vocabulary each."""
    return " ".join(
        "".join(random.choices(string.ascii_lowercase, k=random.randint(1, 3)))
        for _ in range(count)
    )

"""Marks: what stands in a rendered text for something else. Knows no template."""

import re
import secrets
from typing import NamedTuple


class Parts(NamedTuple):
    texts: list[str]  # one more than numbers
    numbers: list[int]  # of the marks between them


class Marks:
    """A numbered placeholder. Its key is random, so that nobody can write it."""

    def __init__(self) -> None:
        # no letters: a template may change their case
        self._start = f"\ue000{secrets.randbits(64)}\ue001"
        self._pattern = re.compile(f"{self._start}(\\d+)\ue001")

    def of(self, number: int) -> str:
        return f"{self._start}{number}\ue001"

    def split(self, text: str) -> Parts:
        parts = self._pattern.split(text)
        return Parts(parts[::2], [int(number) for number in parts[1::2]])

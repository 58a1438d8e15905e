"""Patterns of literals and holes, which also say whether more text could complete a match."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

MAX_SPACE = 64  # characters of white space that a marker may contain in place of its own
MAX_NAME = 256
_SPACE = rf"\s{{0,{MAX_SPACE}}}"
_ATOM = re.compile(r"\s+|.", re.DOTALL)


class Hole(NamedTuple):
    """A named part that may have any of the characters, as few as possible."""

    name: str
    characters: str = r"[^\s<>\"'{}()\[\]|,=]"
    min_length: int = 0


class Ahead(NamedTuple):
    """One of the literals must follow. It is not part of the match."""

    literals: tuple[str, ...]


Item = str | Hole | Ahead


class Pattern:
    """Items one after another. White space in literals is optional and may differ."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._regex = _compiled(tuple(item for item in items if item != ""))

    def match(self, text: str, is_end: bool = False) -> re.Match[str] | bool:
        """
        Return the match at the begin of the text, False if there is none, or True if more text is
        needed, which does not come at the `is_end`.
        """
        found = self._regex.match(text)
        if found is None:
            return False
        if found["matched"] is not None:
            return found
        return not is_end


@lru_cache(maxsize=4096)
def _compiled(items: tuple[Item, ...]) -> re.Pattern[str]:
    return re.compile(_regex(items), re.DOTALL)


def literal_regex(literal: str) -> str:
    return "".join(_SPACE if atom.isspace() else re.escape(atom) for atom in _ATOM.findall(literal))


def _regex(items: Sequence[Item]) -> str:
    """Return a regex of the items or, at the end of the text, of a prefix of them."""
    if not items:
        return "(?P<matched>)"
    first, rest = items[0], items[1:]
    if isinstance(first, Hole):
        hole = f"(?P<{first.name}>{first.characters}{{{first.min_length},{MAX_NAME}}}?)"
        partial = f"{first.characters}{{0,{MAX_NAME}}}\\Z"
        return f"(?:{hole}(?:{_regex(rest)})|{partial})"
    if isinstance(first, Ahead):
        ahead = "|".join(map(literal_regex, first.literals))
        partial = "|".join(f"{_prefixes(each)}\\Z" for each in first.literals)
        return f"(?:(?={ahead}){_regex(rest)}|{partial})"
    return f"(?:{literal_regex(first)}{_regex(rest)}|{_prefixes(first)}\\Z)"


def _prefixes(literal: str) -> str:
    """Return a regex of the proper prefixes of a literal."""
    atoms = _ATOM.findall(literal)
    prefixes = (literal_regex("".join(atoms[:count])) for count in range(len(atoms) - 1, -1, -1))
    return f"(?:{'|'.join(prefixes)})"


def partial_length(text: str, literals: Sequence[str]) -> int:
    """Return the length of the longest suffix of the text that begins one of the literals."""
    pattern, longest = _partial(tuple(literals))
    found = pattern.search(text, max(0, len(text) - longest))
    return len(found[0]) if found else 0


@lru_cache
def _partial(literals: tuple[str, ...]) -> tuple[re.Pattern[str], int]:
    """Return a pattern of their begins at the end of a text, and the length of the longest one."""
    longest = max(map(len, literals), default=1) - 1
    prefixes = {each[:length] for each in literals for length in range(1, longest + 1)} - {""}
    alternatives = "|".join(map(re.escape, sorted(prefixes, key=len, reverse=True)))
    return re.compile(f"(?:{alternatives or '(?!)'})\\Z"), longest


@lru_cache
def first_characters(literals: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of the characters that begin a literal."""
    characters = "".join(sorted({re.escape(each[0]) for each in literals if each}))
    return re.compile(f"[{characters}]" if characters else "(?!)")


@lru_cache
def any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of the literals, longer ones first."""
    longest_first = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

"""
Make text of others safe for a terminal.

An answer, or a name, may contain characters with which it would move the cursor, set the title,
write to the clipboard (OSC 52), reorder text (bidi overrides) or hide it. Each such character is
replaced by a visible one, so a sequence loses its effect, wherever it is split, but none of its
text. https://trojansource.codes describes the attacks by bidi controls.
"""

import unicodedata

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
KEPT = frozenset("\n\t\xad\u200c\u200d\u200e\u200f\u061c")
"""
Controls without an attack that is known: a line break, a tab, and what languages and emoji need: a
soft hyphen, joiners, and the marks of direction, which change the order of nothing but neutral
characters.
"""
UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
HIDDEN_SELECTORS = range(0xE0100, 0xE01F0)  # variation selectors that no emoji uses


class _Replacements(dict[int, str]):
    """What to show for each code point, as str.translate takes it."""

    def __missing__(self, code: int) -> str:
        self[code] = shown = _replacement(chr(code))
        return shown


def _replacement(character: str) -> str:
    code = ord(character)
    if character == "\r":
        return ""  # a line break's half, or a return to overwrite the line
    if character in "\u2028\u2029":
        return "\n"
    is_unsafe = unicodedata.category(character) in UNSAFE_CATEGORIES or code in HIDDEN_SELECTORS
    if character in KEPT or not is_unsafe:
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # Control Pictures: ␛ for ESC
    return REPLACEMENT


_REPLACEMENTS = _Replacements()


def clean(text: str) -> str:
    """Return the text with visible characters in place of unsafe ones. Lines stay lines."""
    return text.translate(_REPLACEMENTS)


def clean_line(text: str) -> str:
    """Return the text, such as a name, on one line and without unsafe characters."""
    return " ".join(clean(text).split())

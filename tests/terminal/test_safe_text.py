"""Answers that attack the terminal."""

import pyte
import pytest

from services.terminal.safe_text import clean, clean_line

ATTACKS = {
    "moves the cursor": "a\x1b[10;5Hb",
    "clears the screen": "a\x1b[2J\x1b[Hb",
    "sets the title": "a\x1b]0;owned\x07b",
    "writes to the clipboard (OSC 52)": "a\x1b]52;c;cm0gLXJmIH4=\x07b",
    "hides an address (OSC 8)": "a\x1b]8;;http://evil\x1b\\bank\x1b]8;;\x1b\\b",
    "has the terminal type (DECRQSS)": 'a\x1bP$q"p\x1b\\b',
    "asks for the cursor's position": "a\x1b[6nb",
    "changes to the other screen": "a\x1b[?1049hb",
    "hides the cursor": "a\x1b[?25lb",
    "conceals text": "a\x1b[8msecret\x1b[0mb",
    "uses a C1 control as CSI": "a\x9b2Jb",
    "uses a C1 control as OSC": "a\x9d0;owned\x9cb",
    "uses a C1 control as DCS": "a\x90+q544e\x9cb",
    "overwrites with backspaces": "a\x08\x08\x08b",
    "rings the bell": "a\x07b",
    "feeds lines": "a\x0b\x0c\x84\x85b",
    "changes the character set": "a\x0e\x1b(0b",
    "resets the terminal": "a\x1bcb",
    "deletes": "a\x7fb",
}
HIDDEN = {
    "bidi overrides": "a\u202edesrever\u202cb",
    "bidi isolates": "a\u2066\u2067x\u2069\u2069b",
    "bidi embeddings": "a\u202a\u202bxb",
    "zero-width spaces": "a\u200b\u2060\ufeffb",
    "tag characters": "a" + "".join(chr(0xE0000 + ord(c)) for c in "hidden") + "b",
    "variation selectors": "a\U000e0100\U000e01efb",
    "interlinear annotations": "a\ufff9x\ufffay\ufffbb",
    "invisible operators": "a\u2061\u2062\u2063\u2064b",
    "half of a surrogate pair": "a\ud83db",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=list(ATTACKS))
def test_control_sequence_has_no_effect(text: str) -> None:
    """The terminal shows every character in one line, and nothing else happens."""
    assert has_an_effect(text), "the attack works"
    assert not has_an_effect(clean(text))
    rest = [character for character in text if character.isprintable()]
    assert [character for character in clean(text) if character in rest] == rest


def has_an_effect(text: str) -> bool:
    """Return whether a terminal does anything but show the characters in one line."""
    screen = pyte.Screen(80, 5)
    pyte.Stream(screen).feed(text)
    row = screen.display[0].rstrip()
    is_line = len(row) == len(text) and row[0] == "a" and row[-1] == "b"
    return not is_line or bool(screen.title) or any(map(str.strip, screen.display[1:]))


@pytest.mark.parametrize("split", range(1, 12))
def test_sequence_in_two_events_has_no_effect(split: int) -> None:
    attack = "\x1b]0;owned\x07"
    assert "\x1b" not in clean(attack[:split]) + clean(attack[split:])


@pytest.mark.parametrize("text", HIDDEN.values(), ids=list(HIDDEN))
def test_invisible_characters_are_shown(text: str) -> None:
    shown = clean(text)
    assert len(shown) == len(text)
    shown.encode()
    assert all(
        original == character or character == "\N{REPLACEMENT CHARACTER}"
        for original, character in zip(text, shown, strict=True)
    )
    assert shown != text


@pytest.mark.parametrize(
    "text",
    [
        "Grüße, 用户, Привет",
        "👩\u200d👩\u200d👧 ❤️ 🏳️\u200d🌈",
        "می\u200cخواهم",
        "שלום \u200f(abc)\u200e",
        "x = 1\n\ty",
        "\U0001f1e9\U0001f1ea",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert clean(text) == text


def test_line_breaks_of_others_become_lines() -> None:
    assert clean("a\r\nb\u2028c\u2029d") == "a\nb\nc\nd"
    assert clean("safe\rrm -rf") == "saferm -rf", "nothing overwrites the line"


def test_clean_line_is_one_line() -> None:
    assert clean_line(" a\n\tb\x1b]0;t\x07 ") == "a b␛]0;t␇"

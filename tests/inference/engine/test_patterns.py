import json
import re

import pytest

from services.inference.engine import patterns
from services.inference.engine.gbnf import GrammarError
from tests.inference.engine.test_grammar import matches

TEXTS = ["", "a b", "\n", "\t", "a\nb"]
TEXTS += r'a b ab aab aaab aaaaa abab a.b a-b é - _ 7 A7 [ ] ^ a] \ a\b \n \d " a"b x41'.split()
PATTERNS = r"""
    ^$ ^a$ ^a*$ ^a+b?$ ^a{2}b$ ^a{1,2}b$ ^a{2,}b$ ^(ab)+$ ^(?:ab){2}$ ^a|b$ ^(a|b)+$ ^(a(b|))+$
    ^.+$ ^.*?$ ^a.b$ ^a\.b$ ^\.$ ^[.]$ ^"$ ^a"b$ ^[^"]+$ ^[^\"]+$ ^\\$ ^a\\b$ ^a\nb$ ^[\n\t]$
    ^\s$ ^\S+$ ^\d$ ^\D+$ ^\w+$ ^\W$ ^[\w-]+$ ^[\\d]+$ ^[a-c]+$ ^[a-]+$ ^[-a]+$ ^[^a-c]$ ^[!-~]+$
    ^[\]\[]$ ^\^$ ^[a^]$ ^\x41\d$ ^\u0061$
""".split()
REFUSED = r"""
    a ^a a$ ^(a$ ^a)$ ^a)b(c$ ^[a$ ^a]$ ^a}$ ^a{$ ^a{x}$ ^{2}$ ^\bx$ ^\p{L}$ ^(a)\1$ ^(?=a)$
    ^(?<x>a)$ ^a^b$ ^a$b$ ^a\$ ^[\x01]$
""".split()


def string(pattern: str) -> str:
    return rf'root ::= "\"" {patterns.to_gbnf(pattern)} "\""'


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_json_string_fits_where_its_text_matches_and_nowhere_else(pattern: str) -> None:
    anchored = re.compile(f"(?:{pattern[1:-1]})", re.ASCII)
    for text in TEXTS:
        fits = matches(string(pattern), json.dumps(text, ensure_ascii=False))
        assert fits == bool(anchored.fullmatch(text)), text


def test_what_is_no_json_does_not_fit() -> None:
    assert not any(matches(string("^.*$"), x) for x in ('"""', '"\\"', '"a\nb"', '"\x01"'))


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_can_not_be_followed_is_refused(pattern: str) -> None:
    with pytest.raises(GrammarError, match="pattern|repeat"):
        matches(string(pattern), '"a"')

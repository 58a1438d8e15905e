"""Checks texts against a grammar."""

from services.inference.engine.sampling.grammar import compile_lark
from tests.inference.fake_backend import VOCABULARY


def accepts(lark: str, text: str) -> bool:
    """Return whether the grammar accepts the text, byte by byte."""
    grammar = compile_lark(lark, VOCABULARY)
    for byte in text.encode():
        if not grammar.allows(byte):
            return False
        grammar.accept(byte)
    return grammar.may_end

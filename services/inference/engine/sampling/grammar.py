"""Constrained decoding by llguidance: the tokens that a grammar allows next."""

import functools
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from services.inference.engine.threads import DeepStackThreads

# llguidance recurses through rules and $refs, with up to 5 KiB per level, and ten bytes of text can
# make a level. On a default stack a chain of 1,000 $refs crashes the process.
STACK_BYTES = 2**27
# An expensive grammar raises an error: a mask takes at most about 0.3 s.
LIMITS = LLParserLimits(verbose_errors=False)
# Allow every token that continues the text, not only the one that the tokenizer would choose.
OPTIONS = '%llguidance {"no_forcing": true}\n'
CONTROL_PREFIX = b"\xff"  # llguidance takes a token that begins with this byte for a control token

_POSITION = re.compile(
    r"^(?:(?:at )?\d+\(\d+\): )?(?:failed to compile JSON schema: |[Pp]arser [Ee]rror: )?"
)
_REGEX_DETAIL = re.compile(r"^error: (.*)$", re.MULTILINE)


class GrammarError(Exception):
    """The grammar can't be used. The message is a clause that says why, without a period."""


class Vocabulary:
    """
    The tokens of a model as bytes, and llguidance's trie of them. `pieces` are the bytes by token
    id: maybe parts of characters, empty for a control token. `ends` are the tokens that end an
    answer. Construction takes half a second for 150,000 tokens.
    """

    def __init__(self, pieces: Sequence[bytes], ends: frozenset[int]) -> None:
        self.pieces = tuple(pieces)
        self.ends = ends
        tokens = _TokenizerAdapter(self.pieces, ends)
        eos = sorted(ends) or tokens.eos_token_id
        self.tokenizer = LLTokenizer(TokenizerWrapper(tokens), eos_token=eos)

    def __len__(self) -> int:
        return len(self.pieces)


class _TokenizerAdapter:
    """
    The tokenizer interface of llguidance. It has one token more than the model, which ends an
    answer of a model without such a token.
    """

    bos_token_id = None

    def __init__(self, pieces: tuple[bytes, ...], ends: frozenset[int]) -> None:
        self.eos_token_id = len(pieces)
        hidden = (i in ends or piece.startswith(CONTROL_PREFIX) for i, piece in enumerate(pieces))
        self.tokens = [b"" if hide else piece for piece, hide in zip(pieces, hidden, strict=True)]
        self.tokens.append(b"")

    def __call__(self, text: bytes) -> list[int]:
        """Return nothing: grammars with `no_forcing` need no tokenizer."""
        return []


class Grammar:
    """
    The grammar of one answer and its state. Methods raise GrammarError if the grammar is too
    expensive.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Return whether nothing may follow."""
        return self._matcher.is_stopped()

    def allows(self, token: int) -> bool:
        if token in self._vocabulary.ends:
            return self.may_end
        allowed = self._matcher.validate_tokens([token]) == 1
        self._check()
        return allowed

    def accept(self, token: int) -> None:
        """Advance by a token that is allowed."""
        if token not in self._vocabulary.ends:
            self._matcher.consume_token(token)
            self._check()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return whether each token of the vocabulary may come next: [n_vocab]."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(mask, count=len(self._vocabulary), bitorder="little")
        return bits.view(np.bool_)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_reason(self._matcher.get_error()))


def compile_lark(lark: str, vocabulary: Vocabulary) -> Grammar:
    """
    Return the grammar with its first mask computed, so that an expensive one fails here. Takes
    milliseconds, at worst a second; not for the event loop. Raises GrammarError.
    """
    return _compiler().submit(lambda: _compile(lark, vocabulary)).result()


@functools.cache
def _compiler() -> DeepStackThreads:
    """Return the thread that compiles grammars: only one, as its stack takes memory."""
    return DeepStackThreads("compiling", 1, STACK_BYTES)


def _compile(lark: str, vocabulary: Vocabulary) -> Grammar:
    text = LLMatcher.grammar_from_lark(OPTIONS + lark)
    matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LIMITS)
    grammar = Grammar(matcher, vocabulary)
    grammar.allowed()
    return grammar


def _reason(error: str) -> str:
    """Return the first line without the position in the Lark text, which no caller wrote."""
    line = _POSITION.sub("", error.partition("\n")[0].partition(" Enable ")[0])
    if line == "NoExtensionBias":
        return "it allows no token of this model here"
    if line.startswith("panic"):  # of llguidance; its text would not help the caller
        return "it is too complex to be compiled"
    detail = _REGEX_DETAIL.search(error)
    return f"{line} {detail[1]}" if detail else line.rstrip(".")

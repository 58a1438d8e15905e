"""Constrained decoding by llguidance: which tokens a grammar allows next."""

import functools
import re

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits

from services.inference.engine.sampling.vocabulary import Vocabulary
from services.inference.engine.threads import DeepStackThreads

# llguidance recurses through rules and $refs, with up to 5 KiB per level, and ten bytes of text can
# make a level. On a default stack a chain of 1,000 $refs crashes the process.
STACK = 2**27
# An expensive grammar is an error instead of a wait: a mask takes at most about 0.3 s.
LIMITS = LLParserLimits(verbose_errors=False)
# Allow every token that continues the text, not only the one that the tokenizer would choose.
OPTIONS = '%llguidance {"no_forcing": true}\n'
PLACE = re.compile(
    r"^(?:(?:at )?\d+\(\d+\): )?(?:failed to compile JSON schema: |[Pp]arser [Ee]rror: )?"
)
DETAIL = re.compile(r"^error: (.*)$", re.MULTILINE)  # of a regular expression


class GrammarError(Exception):
    """The grammar can't be used. The message is the end of a sentence and says why."""


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
    return _compiler().submit(lambda: _compiled(lark, vocabulary)).result()


@functools.cache
def _compiler() -> DeepStackThreads:
    """Return the thread that compiles grammars: only one, as its stack takes memory."""
    return DeepStackThreads("compiling", 1, STACK)


def _compiled(lark: str, vocabulary: Vocabulary) -> Grammar:
    text = LLMatcher.grammar_from_lark(OPTIONS + lark)
    matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LIMITS)
    grammar = Grammar(matcher, vocabulary)
    grammar.allowed()
    return grammar


def _reason(error: str) -> str:
    """Return the first line without the position in the Lark text, which no caller wrote."""
    line = PLACE.sub("", error.partition("\n")[0].partition(" Enable ")[0])
    if line == "NoExtensionBias":
        return "it allows no token of this model here"
    if line.startswith("panic"):  # of llguidance; its text would not help the caller
        return "it is too complex to be compiled"
    detail = DETAIL.search(error)
    return f"{line} {detail[1]}" if detail else line.rstrip(".")

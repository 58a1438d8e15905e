"""The tokens of a model as bytes, and llguidance's trie of them."""

from collections.abc import Sequence

from llguidance import LLTokenizer, TokenizerWrapper

NO_TEXT = 0xFF  # llguidance takes a token that begins with this byte for a control token


class Vocabulary:
    """
    `pieces` are the tokens' bytes by id: maybe parts of characters, none for a control token.
    `ends` are the tokens that end an answer.

    Construction takes half a second for 150,000 tokens.
    """

    def __init__(self, pieces: Sequence[bytes], ends: frozenset[int]) -> None:
        self.pieces = tuple(pieces)
        self.ends = ends
        self.tokenizer = LLTokenizer(
            TokenizerWrapper(_Pieces(self.pieces, ends)),
            eos_token=sorted(ends) or len(self.pieces),
        )

    def __len__(self) -> int:
        return len(self.pieces)


class _Pieces:
    """
    The tokenizer interface of llguidance. It has one token more than the model, as the end of an
    answer for models without such a token.
    """

    bos_token_id = None

    def __init__(self, pieces: tuple[bytes, ...], ends: frozenset[int]) -> None:
        self.eos_token_id = len(pieces)
        texts = (b"" if i in ends or p[:1] == bytes([NO_TEXT]) else p for i, p in enumerate(pieces))
        self.tokens = [*texts, b""]

    def __call__(self, text: bytes) -> list[int]:
        """Return nothing: grammars with `no_forcing` need no tokenizer."""
        return []

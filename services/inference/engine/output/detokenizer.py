"""Tokens to text, one at a time. A character that is spread over several tokens comes out whole."""

import codecs


class Detokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: bytes) -> str:
        """The characters that are complete now; the bytes of one that is not are kept for later."""
        return self._decoder.decode(piece)

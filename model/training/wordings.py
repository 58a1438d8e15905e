"""Wordings written down in a block of text, each parted from the next by a bar."""


def wordings(block: str) -> tuple[str, ...]:
    return tuple(" ".join(wording.split()) for wording in block.split("|"))

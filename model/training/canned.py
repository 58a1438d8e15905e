"""Requests with a fixed answer, and shorthands for their wordings."""

from typing import NamedTuple

from model.training.wordings import wordings

SHORTHANDS = {
    "HOW-TO": """
        [How do I/How can I/How do you/How would I/How to/Tell me how to/What do I do to /Explain
        how to/How does one/What must I do to/What is the way to/Can you tell me how to]
        """,
    "WHAT-IS": """[What is/What's/Explain/Tell me about/What exactly is/What do you mean by/Describe
        /Can you explain/What do you know about/I don't know]""",
    "NEED": """[Do I need/Do you need/Does it need/Do I have to have/Must I have/Is there a need for
        /Does it require/Do I require/Does it want/Should I have]""",
}


class Canned(NamedTuple):
    """Wordings of one request, and the answer to it."""

    asks: tuple[str, ...]
    answer: str


def canned(asks: str, answer: str) -> Canned:
    for shorthand, meaning in SHORTHANDS.items():
        asks = asks.replace(shorthand, meaning)
    return Canned(wordings(asks), answer)

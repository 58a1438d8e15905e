"""Read the lines of `just dataset sft` as token rows of the demo model."""

import json
from pathlib import Path
from typing import Any

from model.training.systems import DEFAULT
from model.training.tokenizer import LIGHT_WEIGHT, Encoder, TokenRow

ANSWER_WEIGHT = 2.0  # as much as that of the demo model's hardest skills
WEIGHTS = {"system": LIGHT_WEIGHT, "user": LIGHT_WEIGHT, "assistant": ANSWER_WEIGHT}


def read_rows(path: Path, encoder: Encoder, max_tokens: int) -> list[TokenRow]:
    """
    Return a row for each conversation of the file. Those with tools, which the demo model can't
    use, and longer ones are left out, which is printed. Raises OSError, ValueError if none is left.
    """
    lines = path.read_bytes().splitlines()  # of a `str` it would split at U+2028, too
    known = [row for line in lines if (row := _row(json.loads(line)["messages"], encoder))]
    rows = [row for row in known if len(row.ids) <= max_tokens]
    if not rows:
        raise ValueError(
            f"{path} has no conversation without tools and of at most {max_tokens:,} tokens"
        )
    if count := len(lines) - len(rows):
        named = "1 conversation" if count == 1 else f"{count:,} conversations"
        print(f"{named} left out: with tools, or of more than {max_tokens:,} tokens")
    return rows


def _row(messages: list[dict[str, Any]], encoder: Encoder) -> TokenRow | None:
    """A conversation without a system prompt was served with the default one."""
    if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return None
    row = TokenRow([], [], [])
    if messages[0]["role"] != "system":
        encoder.add(row, "system", DEFAULT, LIGHT_WEIGHT)
    for message in messages:
        weight = WEIGHTS[message["role"]] * message.get("weight", 1)
        encoder.add(row, message["role"], message["content"], weight)
    return row

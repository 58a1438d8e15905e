"""MODEL_PATH: the models that it names, and the names that they have in requests."""

import os.path
import re
from pathlib import Path

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)\Z", re.IGNORECASE)
"""File name of a part of a split model: base, number, count, suffix."""

MAX_SENTENCE_CHARS = 1000


def split_model_path(model_path: str) -> tuple[str, ...]:
    """Return the paths in MODEL_PATH, which commas separate unless a file has that very name."""
    if os.path.exists(expand_home(model_path)):  # Path.exists raises for long names
        return (model_path,) if model_path else ()
    return tuple(path for each in model_path.split(",") if (path := each.strip()))


def expand_home(path: str) -> Path:
    """Replace `~` at the start; unlike Path.expanduser, keep the name of an unknown user."""
    return Path(os.path.expanduser(path))


def printable(text: str) -> str:
    """Replace what is not UTF-8 in a file name, so that messages and reports can contain it."""
    return text.encode(errors="replace").decode()


def sentence(text: str) -> str:
    """
    Return a message for the log and for reports, which may quote a file or its name: one line, and
    not more than MAX_SENTENCE_CHARS.
    """
    line = "".join(c if c.isprintable() else "\ufffd" for c in text[: MAX_SENTENCE_CHARS + 1])
    return line if len(line) <= MAX_SENTENCE_CHARS else line[:MAX_SENTENCE_CHARS] + "…"


def is_printable(path: Path) -> bool:
    return printable(path.name) == path.name


def model_name(path: Path) -> str:
    """Return the model's name in requests: its file name, without the number of a part."""
    match = PART.match(path.name)
    return match[1] if match else path.stem

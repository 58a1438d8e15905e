"""
Chat templates of well-known model families, for a GGUF that carries none: a file for each, with
the source of its format.
"""

from importlib import resources
from pathlib import Path

_FILES = {
    file.name.removesuffix(".jinja"): file
    for file in resources.files(__name__).iterdir()
    if file.name.endswith(".jinja")
}
NAMES = ", ".join(sorted(_FILES))


def read(choice: str) -> str:
    """Return the template that MODEL_CHAT_TEMPLATE names, or of its file. Raises OSError."""
    if choice in _FILES:
        return _FILES[choice].read_text()
    return Path(choice).expanduser().read_text()

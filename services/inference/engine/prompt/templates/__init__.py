"""
Chat templates of well-known model families, for a GGUF without one. Each file names the source of
its format.
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
    """Return the template of this name, or of this file. Raises OSError, UnicodeDecodeError."""
    if choice in _FILES:
        return _FILES[choice].read_text()
    return Path(choice).expanduser().read_text()

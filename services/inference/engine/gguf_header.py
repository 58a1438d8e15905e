"""
Reads the metadata of a GGUF file without loading it, to explain why a file is not a chat model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAGIC = b"GGUF"
MAX_STRING_BYTES = 2**20  # a longer one is invalid
MAX_KEYS = 4096
MAX_ARRAY_ITEMS = 2**16  # that are skipped

Value = str | int | float | bool
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class NotGguf(Exception):
    """The file is not a GGUF, or its header is truncated."""


def read(path: Path) -> dict[str, Value]:
    """
    Return the values before the vocabulary, without arrays: the file's type, its architecture and
    the model's shape. Raises NotGguf or OSError.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise NotGguf
        _version, _tensors, count = _unpack(file, "<IQQ")
        return dict(_items_before_vocabulary(file, min(count, MAX_KEYS)))


def _items_before_vocabulary(file: BinaryIO, count: int) -> Iterator[tuple[str, Value]]:
    for _ in range(count):
        key = _string(file)
        if key.startswith("tokenizer."):
            return
        (kind,) = _unpack(file, "<I")
        if kind == _ARRAY:
            _skip_array(file)
        else:
            yield key, _value(file, kind)


def _skip_array(file: BinaryIO) -> None:
    kind, count = _unpack(file, "<IQ")
    for _ in range(min(count, MAX_ARRAY_ITEMS)):
        _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Value:
    if kind == _STRING:
        return _string(file)
    if kind not in _NUMBERS:
        raise NotGguf
    return _unpack(file, _NUMBERS[kind])[0]


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    if length > MAX_STRING_BYTES:
        raise NotGguf
    return _read_exactly(file, length).decode(errors="replace")


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, _read_exactly(file, struct.calcsize(layout)))


def _read_exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise NotGguf
    return data

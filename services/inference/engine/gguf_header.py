"""
Reads the metadata of a GGUF file without loading it, to explain why a file is not a chat model, or
can't be loaded.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAGIC = b"GGUF"
MAX_STRING_BYTES = 2**20  # a longer one is invalid
MAX_KEYS = 4096
MAX_DIMENSIONS = 4

Value = str | int | float | bool
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class NotGguf(Exception):
    """The file is not a GGUF, or its header is damaged or truncated."""


class Header(NamedTuple):
    """The values without arrays, and the names of the tensors, if they were read."""

    values: dict[str, Value]
    tensor_count: int
    tensors: frozenset[str] = frozenset()


def read(path: Path) -> Header:
    """
    Return the values before the vocabulary, without the tensors: the file's type, its architecture
    and the model's shape. Raises NotGguf or OSError.
    """
    with path.open("rb") as file:
        tensors, keys = _counts(file)
        return Header(dict(_items(file, keys, ends_at="tokenizer.")), tensors)


def read_whole(path: Path) -> Header:
    """Do the same as `read`, with all values and tensors: up to a second for a large vocabulary."""
    with path.open("rb") as file:
        tensors, keys = _counts(file)
        values = dict(_items(file, keys))
        return Header(values, tensors, frozenset(_tensor(file) for _ in range(tensors)))


def _counts(file: BinaryIO) -> tuple[int, int]:
    """Return the numbers of tensors and keys."""
    if file.read(4) != MAGIC:
        raise NotGguf
    _version, tensors, keys = _unpack(file, "<IQQ")
    if keys > MAX_KEYS:
        raise NotGguf
    return tensors, keys


def _items(file: BinaryIO, count: int, ends_at: str | None = None) -> Iterator[tuple[str, Value]]:
    for _ in range(count):
        key = _string(file)
        if ends_at and key.startswith(ends_at):
            return
        (kind,) = _unpack(file, "<I")
        if kind == _ARRAY:
            _skip_array(file)
        else:
            yield key, _value(file, kind)


def _tensor(file: BinaryIO) -> str:
    """Read a tensor's name, skipping its shape, type and offset."""
    name = _string(file)
    (dimensions,) = _unpack(file, "<I")
    if dimensions > MAX_DIMENSIONS:
        raise NotGguf
    _unpack(file, f"<{dimensions}QIQ")
    return name


def _skip_array(file: BinaryIO) -> None:
    kind, count = _unpack(file, "<IQ")
    if kind in _NUMBERS:
        _skip(file, count * struct.calcsize(_NUMBERS[kind]))
    elif kind == _STRING:
        for _ in range(count):
            _skip(file, *_unpack(file, "<Q"))
    else:
        raise NotGguf


def _skip(file: BinaryIO, length: int) -> None:
    if length > os.fstat(file.fileno()).st_size:
        raise NotGguf
    file.seek(length, os.SEEK_CUR)


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

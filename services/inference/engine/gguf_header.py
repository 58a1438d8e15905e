"""
Reads the metadata of a GGUF file without loading it, to explain why a file is not a chat model, or
can't be loaded. The file may be a stranger's: what it announces is compared with limits and with
its size before it is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_STRING_BYTES = 2**20
MAX_TEXT_BYTES = 2**26  # of all keys, values and names of tensors together
MAX_KEYS = 4096
MAX_TENSORS = 2**17  # 61 layers of 256 experts with 3 tensors are 46,848
# Of all arrays together: the largest vocabularies have three of 2**18 values, and 2**19 merges.
MAX_ARRAY_VALUES = 2**22
MAX_DIMENSIONS = 4
BLOCK_BYTES = 2**20  # of the file that are read at once

Value = str | int | float | bool
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class NotGguf(Exception):
    """The file is not a GGUF, or its header is damaged. The message is a clause that says why."""


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
    with _opened(path) as file:
        data = _Data(file)
        tensors, keys = _counts(data)
        return Header(dict(_items(data, keys, ends_at="tokenizer.")), tensors)


def read_whole(path: Path) -> Header:
    """Do the same as `read`, with all values and tensors: 0.3 s for a large vocabulary."""
    with _opened(path) as file:
        data = _Data(file)
        tensors, keys = _counts(data)
        values = dict(_items(data, keys))
        return Header(values, tensors, frozenset(_tensors(data, tensors)))


def _opened(path: Path) -> BinaryIO:
    if not S_ISREG(path.stat().st_mode):  # opening a pipe would block
        raise NotGguf("it is not a regular file")
    return path.open("rb")


class _Data:
    """The bytes of a file from its beginning, of which one block is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size  # bytes of the file behind the block
        self._block = b""
        self._position = 0  # in the block
        self._text_bytes = 0
        self._array_values = 0

    def take(self, length: int) -> bytes:
        """Return the next bytes. Raises NotGguf if there are not as many."""
        end = self._position + length
        if end > len(self._block):
            self._read(length)
            end = length
        data = self._block[self._position : end]
        self._position = end
        return data

    def skip(self, length: int) -> None:
        kept = len(self._block) - self._position
        if length > kept + self._left:
            raise NotGguf("it ends within its header")
        if length <= kept:
            self._position += length
            return
        self._file.seek(length - kept, os.SEEK_CUR)
        self._left -= length - kept
        self._block, self._position = b"", 0

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        length = self._string_length()
        self._text_bytes += length
        if self._text_bytes > MAX_TEXT_BYTES:
            raise NotGguf(f"it has texts of more than {MAX_TEXT_BYTES:,} bytes")
        return self.take(length).decode(errors="replace")

    def skip_string(self) -> None:
        self.skip(self._string_length())

    def array_head(self) -> tuple[int, int]:
        """Return the type and the number of an array's values."""
        kind, count = self.numbers("<IQ")
        self._array_values += count
        if self._array_values > MAX_ARRAY_VALUES:
            raise NotGguf(f"it has arrays of {self._array_values:,} values")
        return kind, count

    def _string_length(self) -> int:
        (length,) = self.numbers("<Q")
        if length > MAX_STRING_BYTES:
            raise NotGguf(f"it has a text of {length:,} bytes")
        return length

    def _read(self, length: int) -> None:
        """Read so that the block begins with the next bytes, and has `length` of them."""
        kept = self._block[self._position :]
        if length > len(kept) + self._left:
            raise NotGguf("it ends within its header")
        read = self._file.read(max(length - len(kept), BLOCK_BYTES))
        self._left -= len(read)
        self._block, self._position = kept + read, 0
        if length > len(self._block):
            raise NotGguf("it was truncated while it was read")


def _counts(data: _Data) -> tuple[int, int]:
    """Return the numbers of tensors and keys."""
    if data.take(len(MAGIC)) != MAGIC:
        raise NotGguf("it does not begin with GGUF")
    version, tensors, keys = data.numbers("<IQQ")
    if version not in VERSIONS:
        raise NotGguf(f"its version is {version}, and only 2 and 3 are supported")
    for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
        if count > most:
            raise NotGguf(f"it claims to have {count:,} {what}")
    return tensors, keys


def _items(data: _Data, count: int, ends_at: str | None = None) -> Iterator[tuple[str, Value]]:
    seen = set()
    for _ in range(count):
        key = data.string()
        if ends_at and key.startswith(ends_at):
            return
        if key in seen:
            raise NotGguf(f"it has the key {key[:100]!r} twice")
        seen.add(key)
        (kind,) = data.numbers("<I")
        if kind == _ARRAY:
            _skip_array(data)
        else:
            yield key, _value(data, kind)


def _tensors(data: _Data, count: int) -> Iterator[str]:
    """Yield the names of tensors, skipping their shapes, types and offsets."""
    for _ in range(count):
        yield data.string()
        (dimensions,) = data.numbers("<I")
        if dimensions > MAX_DIMENSIONS:
            raise NotGguf(f"it has a tensor of {dimensions:,} dimensions")
        data.numbers(f"<{dimensions}QIQ")


def _skip_array(data: _Data) -> None:
    kind, count = data.array_head()
    if kind in _NUMBERS:
        data.skip(count * struct.calcsize(_NUMBERS[kind]))
    elif kind == _STRING:
        for _ in range(count):
            data.skip_string()
    else:
        raise NotGguf("it has an array of arrays, or of an unknown type")


def _value(data: _Data, kind: int) -> Value:
    if kind == _STRING:
        return data.string()
    if kind not in _NUMBERS:
        raise NotGguf(f"it has a value of the unknown type {kind}")
    return data.numbers(_NUMBERS[kind])[0]

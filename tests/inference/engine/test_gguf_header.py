"""Reading of GGUF headers, also of damaged ones."""

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from services.inference.engine import gguf_header
from services.inference.engine.gguf_header import NotGguf
from tests.inference.gguf_files import DEMO, changed_demo, split_demo, write_header


def test_values_before_the_vocabulary_are_read_alone() -> None:
    header = gguf_header.read(DEMO)
    assert header.values["llama.block_count"] == 6 and header.tensor_count == 57
    assert not any(key.startswith("tokenizer.") for key in header.values)
    assert not header.tensors


def test_whole_header_has_values_behind_the_vocabulary(tmp_path: Path) -> None:
    path = changed_demo(tmp_path / "mine.gguf", general__sampling__temp=0.5)
    assert "general.sampling.temp" not in gguf_header.read(path).values
    header = gguf_header.read_whole(path)
    assert header.values["general.sampling.temp"] == 0.5
    assert len(header.tensors) == 57 and "blk.5.ffn_down.weight" in header.tensors


def test_part_of_a_split_model_has_its_own_tensors(tmp_path: Path) -> None:
    headers = [gguf_header.read_whole(part) for part in split_demo(tmp_path / "mine.gguf")]
    assert [header.values["split.no"] for header in headers] == [0, 1]
    assert [len(header.tensors) for header in headers] == [30, 27]


@pytest.mark.parametrize("size", [3, 10, 23, 24, 500, 5000, 40_000, 62_000])
def test_header_truncated_anywhere_is_an_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(DEMO.read_bytes()[:size])
    with pytest.raises(NotGguf):
        gguf_header.read_whole(path)


@pytest.mark.parametrize("count", [2**16, 2**40, 2**63])
@pytest.mark.parametrize("kind", [4, 8, 9, 77])
def test_array_longer_than_its_file_is_an_error(tmp_path: Path, kind: int, count: int) -> None:
    path = write_header(tmp_path / "mine.gguf", general__name="x")
    data = path.read_bytes()[:-1] + struct.pack("<IQ", kind, count)
    data = data.replace(struct.pack("<IQ", 8, 1), struct.pack("<I", 9), 1)  # the text: an array
    path.write_bytes(data)
    with pytest.raises(NotGguf):
        gguf_header.read_whole(path)


def _header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def _text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


HUGE = 10**9
ABSURD = {
    "its version is 1": _header(0, 0, version=1),
    "its version is 50331648": _header(0, 0, version=3 << 24),  # big-endian
    "claims to have 1,000,000,000 keys": _header(0, HUGE),
    "claims to have 18,446,744,073,709,551,615 tensors": _header(2**64 - 1, 0),
    "ends within its header": _header(1, 1),
    "text of 1,000,000,000 bytes": _header(0, 1, _text(b"a", HUGE)),
    "text of 18,446,744,073,709,551,615 bytes": _header(0, 1, _key(b"a", 8, _text(b"", 2**64 - 1))),
    "arrays of 1,000,000,000 values": _header(
        0, 1, _key(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, HUGE))
    ),
    "array of arrays": _header(0, 1, _key(b"a", 9, struct.pack("<IQ", 9, 2))),
    "value of the unknown type 13": _header(0, 1, _key(b"a", 13, b"")),
    "the key 'a' twice": _header(0, 2, 2 * _key(b"a", 4, struct.pack("<I", 1))),
    "tensor of 4,294,967,295 dimensions": _header(1, 0, _text(b"a") + b"\xff" * 4),
}


@pytest.mark.parametrize("reason", ABSURD)
def test_absurd_header_is_an_error_that_says_why(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(ABSURD[reason])
    with pytest.raises(NotGguf, match=reason):
        gguf_header.read_whole(path)


def test_sparse_file_of_many_texts_is_refused_at_once(tmp_path: Path) -> None:
    """Its zeros are texts of no characters, as many as the file is long."""
    path = tmp_path / "mine.gguf"
    tokens = _key(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, HUGE))
    path.write_bytes(_header(0, 1, tokens))
    with path.open("ab") as file:
        file.truncate(8 * HUGE + 1000)
    with pytest.raises(NotGguf, match="arrays of 1,000,000,000 values"):
        gguf_header.read_whole(path)


def test_texts_are_limited_together(tmp_path: Path) -> None:
    path, size = tmp_path / "mine.gguf", gguf_header.MAX_STRING_BYTES
    keys = [_key(b"key %d" % number, 8, _text(b"x" * size)) for number in range(65)]
    path.write_bytes(_header(0, len(keys), b"".join(keys)))
    tracemalloc.start()
    with pytest.raises(NotGguf, match="has texts of more than 67,108,864 bytes"):
        gguf_header.read_whole(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * gguf_header.MAX_TEXT_BYTES


def test_arrays_are_limited_together(tmp_path: Path) -> None:
    path, count = tmp_path / "mine.gguf", gguf_header.MAX_ARRAY_VALUES // 2 + 1
    arrays = [_key(name, 9, struct.pack("<IQ", 0, count) + bytes(count)) for name in (b"a", b"b")]
    path.write_bytes(_header(0, 2, b"".join(arrays)))
    with pytest.raises(NotGguf, match="has arrays of 4,194,306 values"):
        gguf_header.read_whole(path)


def _outcome(path: Path) -> str:
    """Return why a file is refused; "" if it is read."""
    try:
        gguf_header.read_whole(path)
    except NotGguf as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(8))
def test_mutated_header_is_read_or_an_error(tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    whole = DEMO.read_bytes()[:100_000]
    path = tmp_path / "mine.gguf"
    tracemalloc.start()
    began, outcomes = time.process_time(), list[str]()
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(draws.randint(1, 8)):
            # mostly near the begin, where the lengths and types are
            start = int(draws.random() ** 4 * len(data))
            width = draws.choice((1, 4, 8))
            data[start : start + width] = draws.choice(
                (b"\xff" * width, bytes(width), draws.randbytes(width))
            )
        path.write_bytes(data[: draws.choice((len(data), draws.randint(0, len(data))))])
        outcomes.append(_outcome(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert any(outcomes) and max(map(len, outcomes)) < 200
    assert peak < 2**24 and time.process_time() - began < 10

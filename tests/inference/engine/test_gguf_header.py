"""Reading of GGUF headers, also of damaged ones."""

import struct
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

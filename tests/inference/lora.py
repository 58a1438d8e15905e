"""LoRA adapters for the demo model: such files as llama.cpp's convert_lora_to_gguf.py makes."""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Value = str | float | tuple[int, ...]
F32 = 0  # ggml's type of a tensor
ALIGNMENT = 32  # bytes
SPREAD = 0.17  # of the weights
LAYERS, WIDTH, RANK = 6, 256, 4  # of the demo model, and of what is added to it


def write_lora(
    path: Path, seed: int = 1, width: int = WIDTH, more: Mapping[str, Value] = MappingProxyType({})
) -> Path:
    """Random, and strong enough to change what the model says. `more` goes into the file's head."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        name = f"blk.{layer}.attn_output.weight"
        tensors[f"{name}.lora_a"] = random.normal(0, SPREAD, (RANK, width)).astype(np.float32)
        tensors[f"{name}.lora_b"] = random.normal(0, SPREAD, (width, RANK)).astype(np.float32)
    values: dict[str, Value] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_gguf(values | dict(more), tensors))
    return path


def _gguf(values: Mapping[str, Value], tensors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))
    head += b"".join(_text(key) + _value(value) for key, value in values.items())
    data = b""
    for name, tensor in tensors.items():
        rows, columns = tensor.shape
        head += _text(name) + struct.pack("<IQQIQ", 2, columns, rows, F32, len(data))
        data += _padded(tensor.tobytes())
    return _padded(head) + data


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: Value) -> bytes:
    """Behind the number of its type: 6 a float, 8 a text, 9 a list, here of 4, uint32."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, tuple):
        return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    return struct.pack("<If", 6, value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)

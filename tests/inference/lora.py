"""LoRA adapters for the demo model, in the format of llama.cpp's convert_lora_to_gguf.py."""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Value = str | float | tuple[int, ...]
GGML_TYPE_F32 = 0
ALIGNMENT_BYTES = 32
WEIGHT_DEVIATION = 0.17  # strong enough to change what the model generates
LAYERS, WIDTH, RANK = 6, 256, 4  # of the demo model; the rank of the adapter


def write_lora(
    path: Path,
    seed: int = 1,
    width: int = WIDTH,
    metadata: Mapping[str, Value] = MappingProxyType({}),
) -> Path:
    """Write random weights, and `metadata` in addition to the usual values."""
    random = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for layer in range(LAYERS):
        for name, shape in (("lora_a", (RANK, width)), ("lora_b", (width, RANK))):
            weights = random.normal(0, WEIGHT_DEVIATION, shape).astype(np.float32)
            tensors[f"blk.{layer}.attn_output.weight.{name}"] = weights
    values: dict[str, Value] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_gguf(values | dict(metadata), tensors))
    return path


def _gguf(values: Mapping[str, Value], tensors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))
    head += b"".join(_string(key) + _value(value) for key, value in values.items())
    data = b""
    for name, tensor in tensors.items():
        rows, columns = tensor.shape
        head += _string(name) + struct.pack("<IQQIQ", 2, columns, rows, GGML_TYPE_F32, len(data))
        data += _padded(tensor.tobytes())
    return _padded(head) + data


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: Value) -> bytes:
    """Return a value after its type: 6 is float32, 8 string, 9 array, here of 4, uint32."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, tuple):
        return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    return struct.pack("<If", 6, value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT_BYTES)

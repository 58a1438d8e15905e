"""Writes GGUF files of all kinds, from scratch or from the demo model."""

import struct
from pathlib import Path

import gguf

DEMO = Path("model/demo.gguf")
Value = str | int | bool | float
_TYPES = {
    str: gguf.GGUFValueType.STRING,
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
}
_KINDS = {str: (8, "<Q"), bool: (7, "<?"), int: (4, "<I")}  # a text begins with its length


def write_header(path: Path, **values: Value) -> Path:
    """Write a GGUF without tensors and with this metadata; `general__type` is `general.type`."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(values))
    for name, value in values.items():
        kind, layout = _KINDS[type(value)]
        number = len(value) if isinstance(value, str) else value
        head += _text(name.replace("__", ".")) + struct.pack("<I", kind)
        head += struct.pack(layout, number) + (value.encode() if isinstance(value, str) else b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head)
    return path


def split_demo(path: Path, tensors: int = 30) -> list[Path]:
    """Split the demo model into parts with this many tensors each, like llama.cpp's gguf-split."""
    _write_demo(gguf.GGUFWriter(path, "llama", split_max_tensors=tensors))
    return sorted(path.parent.glob(f"{path.stem}-*"))


def changed_demo(path: Path, **values: Value) -> Path:
    """Write the demo model with more or other metadata; `general__type` is `general.type`."""
    _write_demo(gguf.GGUFWriter(path, "llama"), **values)
    return path


def _write_demo(writer: gguf.GGUFWriter, **values: Value) -> None:
    reader = gguf.GGUFReader(DEMO)
    changed = {name.replace("__", "."): value for name, value in values.items()}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *changed):
            sub_type = field.types[-1] if field.types[1:] else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for key, value in changed.items():
        writer.add_key_value(key, value, _TYPES[type(value)])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def without_template(path: Path) -> Path:
    """Write the demo model without its chat template, like a base model."""
    key = b"tokenizer.chat_template"
    data = DEMO.read_bytes()
    assert data.count(key) == 1
    path.write_bytes(data.replace(key, b"tokenizer.chat_temptate"))
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()

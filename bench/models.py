"""
Synthetic GGUF models: the shapes of real models with random weights. Their output is noise, their
cost is real.

    python -m bench.models 135M Q8_0
"""

import argparse
import itertools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf.quants import quantize

FOLDER = Path("bench/.models")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2  # <|im_end|>
TYPES = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_0": gguf.GGMLQuantizationType.Q4_0}
NORMAL, CONTROL = 1, 3  # llama.cpp's token types


class ModelShape(NamedTuple):
    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int


SHAPES = {
    "135M": ModelShape(30, 576, 9, 3, 1536, 49152),  # as SmolLM-135M
    "500M": ModelShape(24, 896, 14, 2, 4864, 151936),  # as Qwen2-0.5B
}


def path_of(size: str, kind: str) -> Path:
    return FOLDER / f"{size}-{kind}.gguf"


def make(size: str, kind: str) -> Path:
    """Return the model's path. Creates the model if it doesn't exist, in a minute or two."""
    path = path_of(size, kind)
    if path.exists():
        return path
    FOLDER.mkdir(exist_ok=True)
    shape = SHAPES[size]
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    _describe(writer, shape)
    add_tokenizer(writer, shape.vocabulary)
    _add_tensors(writer, shape, TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()
    return path.with_suffix(".part").rename(path)


def _describe(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocabulary)


def add_tokenizer(
    writer: gguf.GGUFWriter, size: int, template: str | Sequence[Mapping[str, str]] = CHATML
) -> None:
    """
    Add a byte-level BPE in which every word of up to three letters is one token, like a common
    word in a trained tokenizer. `template` is a chat template, or a list of named ones.
    """
    tokens = [*SPECIAL, *_byte_letters()]
    merges: list[str] = []
    letters = string.ascii_lowercase
    for left, right in itertools.chain(
        (("Ġ", a) for a in letters),
        (("Ġ" + a, b) for a in letters for b in letters),
        (("Ġ" + a + b, c) for a in letters for b in letters for c in letters),
        ((a, b) for a in letters for b in letters),
        ((a + b, c) for a in letters for b in letters for c in letters),
        ((a + b + c, d) for a in letters for b in letters for c in letters for d in letters),
    ):
        if len(tokens) == size:
            break
        merges.append(f"{left} {right}")
        tokens.append(left + right)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if i < len(SPECIAL) else NORMAL for i in range(size)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)


def _byte_letters() -> list[str]:
    """Return GPT-2's printable stand-in for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def _add_tensors(
    writer: gguf.GGUFWriter, shape: ModelShape, kind: gguf.GGMLQuantizationType
) -> None:
    random = np.random.default_rng(1)
    kv_width = shape.width // shape.heads * shape.kv_heads

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = random.standard_normal((rows, columns), np.float32) / np.sqrt(columns)
        if name == "token_embd.weight":
            weights[: len(SPECIAL)] = 0  # a logit of 0 is never among the top: the model never ends
        writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.width, np.float32))

    matrix("token_embd.weight", shape.vocabulary, shape.width)  # also the output layer (tied)
    norm("output_norm.weight")
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.attn_q.weight", shape.width, shape.width)
        matrix(f"{block}.attn_k.weight", kv_width, shape.width)
        matrix(f"{block}.attn_v.weight", kv_width, shape.width)
        matrix(f"{block}.attn_output.weight", shape.width, shape.width)
        matrix(f"{block}.ffn_gate.weight", shape.feed_forward, shape.width)
        matrix(f"{block}.ffn_up.weight", shape.feed_forward, shape.width)
        matrix(f"{block}.ffn_down.weight", shape.width, shape.feed_forward)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("kind", choices=TYPES)
    options = parser.parse_args()
    print(make(options.size, options.kind))

"""
Synthetic GGUF models whose state can't be cut at any position: recurrent and hybrid ones, and one
with a sliding window. As in `bench/models.py`, the weights are random.

    python -m bench.hybrid_models qwen35
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import quantize

from bench.models import FOLDER, SPECIAL, add_tokenizer

HEAD = 64  # dimensions of an attention head
STATE = 64  # dimensions of a linear attention head
CONV = 4  # tokens that a convolution sees
MAMBA_STATE = 16
WINDOW = 512  # tokens of Gemma's sliding window


class HybridShape(NamedTuple):
    layers: int = 12
    width: int = 512
    feed_forward: int = 1024
    vocabulary: int = 16384
    window: int = WINDOW
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0

    @property
    def heads(self) -> int:
        return self.width // HEAD


USUAL = HybridShape()
TINY = HybridShape(layers=6, width=128, feed_forward=192, vocabulary=640, window=48)


def make(architecture: str) -> Path:
    """Return the path of a model of usual size, 20 to 40 MB. Create it if it doesn't exist."""
    path = FOLDER / f"{architecture}-Q8_0.gguf"
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        write(architecture, USUAL, path.with_suffix(".part")).rename(path)
    return path


def write(architecture: str, shape: HybridShape, path: Path) -> Path:
    """Write a model of one of `ARCHITECTURES`."""
    writer = gguf.GGUFWriter(path, architecture)
    model = _Model(writer, shape)
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    add_tokenizer(writer, shape.vocabulary)
    model.embedding()
    ARCHITECTURES[architecture](model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Model:
    def __init__(self, writer: gguf.GGUFWriter, shape: HybridShape) -> None:
        self.writer = writer
        self.shape = shape
        self._random = np.random.default_rng(1)

    def embedding(self) -> None:
        """Add the embeddings, which are also the output layer."""
        weights = self._weights(self.shape.vocabulary, self.shape.width)
        weights[: len(SPECIAL)] = 0  # a logit of 0 is never among the top: the model never ends
        self._quantized("token_embd.weight", weights)

    def matrix(self, name: str, rows: int, columns: int, is_float: bool = False) -> None:
        weights = self._weights(rows, columns)
        if is_float:
            self.add(name, weights)
        else:
            self._quantized(name, weights)

    def ones(self, name: str, size: int) -> None:
        self.add(name, np.ones(size, np.float32))

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        self.writer.add_tensor(name, values.astype(np.float32))

    def attention(self, block: str, gated: bool = False, kv_heads: int = 2) -> None:
        """Add an attention layer with normalized queries and keys, as Qwen3, Gemma 3 and LFM2."""
        width, heads = self.shape.width, self.shape.heads
        self.matrix(f"{block}.attn_q.weight", heads * HEAD * (1 + gated), width)
        self.matrix(f"{block}.attn_k.weight", kv_heads * HEAD, width)
        self.matrix(f"{block}.attn_v.weight", kv_heads * HEAD, width)
        self.matrix(f"{block}.attn_output.weight", width, heads * HEAD)
        self.ones(f"{block}.attn_q_norm.weight", HEAD)
        self.ones(f"{block}.attn_k_norm.weight", HEAD)

    def feed_forward(self, block: str) -> None:
        self.matrix(f"{block}.ffn_gate.weight", self.shape.feed_forward, self.shape.width)
        self.matrix(f"{block}.ffn_up.weight", self.shape.feed_forward, self.shape.width)
        self.matrix(f"{block}.ffn_down.weight", self.shape.width, self.shape.feed_forward)

    def _weights(self, rows: int, columns: int) -> npt.NDArray[np.float32]:
        return self._random.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)

    def _quantized(self, name: str, weights: npt.NDArray[np.float32]) -> None:
        kind = self.shape.kind
        self.writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)


def _mamba(model: _Model) -> None:
    """Pure Mamba: no attention, and a state of one size for any number of tokens."""
    width, writer = model.shape.width, model.writer
    inner, rank = 2 * width, width // 16
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(MAMBA_STATE)
    writer.add_ssm_time_step_rank(rank)
    model.ones("output_norm.weight", width)
    decay = -np.tile(np.arange(1, MAMBA_STATE + 1, dtype=np.float32), (inner, 1))
    for layer in range(model.shape.layers):
        block = f"blk.{layer}"
        model.ones(f"{block}.attn_norm.weight", width)
        model.matrix(f"{block}.ssm_in.weight", 2 * inner, width)
        model.matrix(f"{block}.ssm_conv1d.weight", inner, CONV, is_float=True)
        model.add(f"{block}.ssm_conv1d.bias", np.zeros(inner))
        model.matrix(f"{block}.ssm_x.weight", rank + 2 * MAMBA_STATE, inner)
        model.matrix(f"{block}.ssm_dt.weight", inner, rank, is_float=True)
        model.add(f"{block}.ssm_dt.bias", np.full(inner, -5))  # steps of 0.007: remembers 100
        model.add(f"{block}.ssm_a", decay)
        model.ones(f"{block}.ssm_d", inner)
        model.matrix(f"{block}.ssm_out.weight", width, inner)


def _qwen35(model: _Model) -> None:
    """As Qwen3.5: three layers of linear attention (gated delta net), one of full attention."""
    width, heads, writer = model.shape.width, model.shape.width // STATE, model.writer
    inner = heads * STATE
    writer.add_head_count(model.shape.heads)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_sections([HEAD // 8, HEAD // 8, HEAD // 8, 0])
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_group_count(heads)
    writer.add_full_attention_interval(4)
    model.ones("output_norm.weight", width)
    for layer in range(model.shape.layers):
        block = f"blk.{layer}"
        model.ones(f"{block}.attn_norm.weight", width)
        model.ones(f"{block}.post_attention_norm.weight", width)
        if (layer + 1) % 4 == 0:
            model.attention(block, gated=True)
        else:
            model.matrix(f"{block}.attn_qkv.weight", 3 * inner, width)
            model.matrix(f"{block}.attn_gate.weight", inner, width)
            model.matrix(f"{block}.ssm_conv1d.weight", 3 * inner, CONV, is_float=True)
            model.add(f"{block}.ssm_dt.bias", np.full(heads, -5))
            model.add(f"{block}.ssm_a", np.full(heads, -1))
            model.matrix(f"{block}.ssm_beta.weight", heads, width)
            model.matrix(f"{block}.ssm_alpha.weight", heads, width)
            model.ones(f"{block}.ssm_norm.weight", STATE)
            model.matrix(f"{block}.ssm_out.weight", width, inner)
        model.feed_forward(block)


def _lfm2(model: _Model) -> None:
    """As LFM2: a layer of attention for two short convolutions."""
    width, writer = model.shape.width, model.writer
    is_attention = [layer % 3 == 0 for layer in range(model.shape.layers)]
    writer.add_head_count(model.shape.heads)
    writer.add_head_count_kv([2 * attends for attends in is_attention])
    writer.add_shortconv_l_cache(CONV - 1)
    model.ones("token_embd_norm.weight", width)
    for layer, attends in enumerate(is_attention):
        block = f"blk.{layer}"
        model.ones(f"{block}.attn_norm.weight", width)
        model.ones(f"{block}.ffn_norm.weight", width)
        if attends:
            model.attention(block)
        else:
            model.matrix(f"{block}.shortconv.conv.weight", width, CONV - 1, is_float=True)
            model.matrix(f"{block}.shortconv.in_proj.weight", 3 * width, width)
            model.matrix(f"{block}.shortconv.out_proj.weight", width, width)
        model.feed_forward(block)


def _gemma3(model: _Model) -> None:
    """As Gemma 3: every sixth layer sees everything, the others the last `window` tokens."""
    width, writer = model.shape.width, model.writer
    writer.add_head_count(model.shape.heads)
    writer.add_head_count_kv(2)
    writer.add_sliding_window(model.shape.window)
    model.ones("output_norm.weight", width)
    for layer in range(model.shape.layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            model.ones(f"{block}.{norm}.weight", width)
        model.attention(block)
        model.feed_forward(block)


ARCHITECTURES = {"qwen35": _qwen35, "mamba": _mamba, "lfm2": _lfm2, "gemma3": _gemma3}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", choices=ARCHITECTURES)
    print(make(parser.parse_args().architecture))

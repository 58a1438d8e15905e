"""
Synthetic GGUF models for embeddings and reranking. As in `bench/models.py`, the weights are random.

    python -m bench.embedding_models bert
"""

import argparse
import string
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from bench.models import CHATML, CONTROL, FOLDER, NORMAL, add_tokenizer

HEAD = 32  # dimensions of an attention head
WORDPIECE = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
RERANK_TEMPLATE = (
    "<|im_start|>system\nIs the Document relevant to the Query?<|im_end|>\n<|im_start|>user\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
)
NO_POOLING, MEAN, CLS, LAST, RANK = (
    gguf.PoolingType.NONE, gguf.PoolingType.MEAN, gguf.PoolingType.CLS, gguf.PoolingType.LAST,
    gguf.PoolingType.RANK,
)  # fmt: skip


class EmbeddingShape(NamedTuple):
    layers: int = 12
    width: int = 384
    feed_forward: int = 1536
    vocabulary: int = 16384
    context: int = 512

    @property
    def heads(self) -> int:
        return self.width // HEAD


USUAL = EmbeddingShape()  # as all-MiniLM-L12 and bge-small
TINY = EmbeddingShape(layers=2, width=64, feed_forward=96, vocabulary=640, context=96)


def make(architecture: str) -> Path:
    """Return the path of a model of usual size. Create it if it doesn't exist."""
    path = FOLDER / f"{architecture}-embedding.gguf"
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        pooling = {"bert": MEAN, "qwen3": LAST}[architecture]
        write(architecture, path.with_suffix(".part"), USUAL, pooling).rename(path)
    return path


def write(
    architecture: str,
    path: Path,
    shape: EmbeddingShape = TINY,
    pooling: gguf.PoolingType | None = MEAN,
) -> Path:
    """Write a `bert` or `qwen3`; with RANK, a reranker with a classifier."""
    writer = gguf.GGUFWriter(path, architecture)
    model = _Model(writer, shape)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    model.matrix("token_embd", shape.vocabulary, shape.width, bias=False)
    {"bert": _bert, "qwen3": _qwen3}[architecture](model, pooling)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Model:
    def __init__(self, writer: gguf.GGUFWriter, shape: EmbeddingShape) -> None:
        self.writer = writer
        self.shape = shape
        self._random = np.random.default_rng(1)

    def matrix(self, name: str, rows: int, columns: int, bias: bool = True) -> None:
        weights = self._random.standard_normal((rows, columns)) / columns**0.5
        self.writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
        if bias:
            self._vector(f"{name}.bias", rows, 0.0)

    def norm(self, name: str, size: int, bias: bool = True) -> None:
        self._vector(f"{name}.weight", size, 1.0)
        if bias:
            self._vector(f"{name}.bias", size, 0.0)

    def _vector(self, name: str, size: int, mean: float) -> None:
        values = mean + 0.1 * self._random.standard_normal(size)
        self.writer.add_tensor(name, values.astype(np.float32))


def _bert(model: _Model, pooling: gguf.PoolingType | None) -> None:
    shape, writer = model.shape, model.writer
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    _add_wordpiece(writer, shape.vocabulary)
    model.matrix("token_types", 2, shape.width, bias=False)
    model.matrix("position_embd", shape.context, shape.width, bias=False)
    model.norm("token_embd_norm", shape.width)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            model.matrix(f"{block}.{name}", shape.width, shape.width)
        model.norm(f"{block}.attn_output_norm", shape.width)
        model.matrix(f"{block}.ffn_up", shape.feed_forward, shape.width)
        model.matrix(f"{block}.ffn_down", shape.width, shape.feed_forward)
        model.norm(f"{block}.layer_output_norm", shape.width)
    if pooling == RANK:
        model.matrix("cls", shape.width, shape.width)
        model.matrix("cls.output", 1, shape.width)


def _qwen3(model: _Model, pooling: gguf.PoolingType | None) -> None:
    shape, writer = model.shape, model.writer
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_head_count_kv(shape.heads // 2)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(1e6)
    template = [{"name": "rerank", "template": RERANK_TEMPLATE}] if pooling == RANK else CHATML
    add_tokenizer(writer, shape.vocabulary, template)
    writer.add_add_eos_token(True)
    model.norm("output_norm", shape.width, bias=False)
    for layer in range(shape.layers):
        block, kv_width = f"blk.{layer}", shape.heads // 2 * HEAD
        for norm in ("attn_norm", "ffn_norm"):
            model.norm(f"{block}.{norm}", shape.width, bias=False)
        for norm in ("attn_q_norm", "attn_k_norm"):
            model.norm(f"{block}.{norm}", HEAD, bias=False)
        model.matrix(f"{block}.attn_q", shape.width, shape.width, bias=False)
        model.matrix(f"{block}.attn_k", kv_width, shape.width, bias=False)
        model.matrix(f"{block}.attn_v", kv_width, shape.width, bias=False)
        model.matrix(f"{block}.attn_output", shape.width, shape.width, bias=False)
        model.matrix(f"{block}.ffn_gate", shape.feed_forward, shape.width, bias=False)
        model.matrix(f"{block}.ffn_up", shape.feed_forward, shape.width, bias=False)
        model.matrix(f"{block}.ffn_down", shape.width, shape.feed_forward, bias=False)
    if pooling == RANK:
        writer.add_classifier_output_labels(["yes", "no"])
        model.matrix("cls.output", 2, shape.width, bias=False)


def _add_wordpiece(writer: gguf.GGUFWriter, size: int) -> None:
    """
    Add BERT's tokenizer, with letters and pairs of letters. In a GGUF, the tokens that begin a word
    are marked, instead of those that continue one.
    """
    letters = string.ascii_lowercase
    pairs = [left + right for left in letters for right in letters]
    pieces = [*string.digits, *letters, *string.punctuation]
    tokens = [*WORDPIECE, *(f"▁{each}" for each in pieces), *letters, *pairs]
    tokens = (tokens + [f"[unused{number}]" for number in range(size)])[:size]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [CONTROL if number < len(WORDPIECE) else NORMAL for number in range(size)]
    )
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", choices=("bert", "qwen3"))
    print(make(parser.parse_args().architecture))

"""Write the last checkpoint as `model/demo.gguf`: `python -m model.training.export`."""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from model.training import tokenizer
from model.training.network import Shape
from model.training.train import TOKENIZER, WEIGHTS

TARGET = Path(__file__).parents[1] / "demo.gguf"
BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "hidden_norm": "ffn_norm",
    "hidden.gate": "ffn_gate",
    "hidden.up": "ffn_up",
    "hidden.down": "ffn_down",
}
OTHER_NAMES = {"embedding": "token_embd", "norm": "output_norm", "output": "output"}


def gguf_name(name: str) -> str:
    """Return the GGUF name: `blocks.2.attention.q.weight` becomes `blk.2.attn_q.weight`."""
    path = name.removesuffix(".weight")
    if not path.startswith("blocks."):
        return f"{OTHER_NAMES[path]}.weight"
    _, number, part = path.split(".", 2)
    return f"blk.{number}.{BLOCK_NAMES[part]}.weight"


def write(weights: Path, target: Path, precision: str) -> None:
    writer = GGUFWriter(str(target), "llama")
    _add_shape(writer, Shape(tokenizer.VOCABULARY), precision)
    _add_tokenizer(writer, json.loads(TOKENIZER.read_text(encoding="utf-8")))
    for name, weight in torch.load(weights, map_location="cpu").items():
        _add_tensor(writer, gguf_name(name), weight.float().numpy(), precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: GGUFWriter, shape: Shape, precision: str) -> None:
    writer.add_name("FineTuneLLM demo")
    writer.add_description("A small chat model, trained from scratch on generated dialogs")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.theta)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(
        gguf.LlamaFileType[f"MOSTLY_{precision}" if precision != "F32" else "ALL_F32"]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(
    writer: GGUFWriter, saved: dict[str, dict[str, dict[str, int] | list[list[str]]]]
) -> None:
    vocabulary, merges = saved["model"]["vocab"], saved["model"]["merges"]
    assert isinstance(vocabulary, dict)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = len(tokenizer.SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL] * special + [TokenType.NORMAL] * (len(tokens) - special)
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.END_OF_TEXT)
    writer.add_pad_token_id(tokenizer.END_OF_TEXT)
    writer.add_eos_token_id(tokenizer.END)
    writer.add_eot_token_id(tokenizer.END)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.TEMPLATE)


def _add_tensor(
    writer: GGUFWriter, name: str, weight: npt.NDArray[np.float32], precision: str
) -> None:
    if weight.ndim == 1 or precision == "F32":
        writer.add_tensor(name, weight)
    elif precision == "F16":
        writer.add_tensor(name, weight.astype(np.float16))
    else:
        kind = GGMLQuantizationType[precision]
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--precision", choices=("Q8_0", "F16", "F32"), default="Q8_0")
    options = parser.parse_args()
    write(options.weights, options.target, options.precision)
    print(f"{options.target.name}: {options.target.stat().st_size} bytes")


if __name__ == "__main__":
    main()

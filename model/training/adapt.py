"""
Train a LoRA adapter for model/demo.gguf: one that talks like a pirate, `python -m
model.training.adapt`, or one that learns the conversations of `just dataset sft --out data`,
`python -m model.training.adapt --data data --name corrected`. Needs only the GGUF file.
"""

import argparse
import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader, GGUFWriter
from tokenizers import Tokenizer

from model.training import lora, pirate, tokenizer
from model.training.batches import MAX_ROW_TOKENS, Batch, Schedule, Source
from model.training.dataset import read_rows
from model.training.export import TARGET as DEMO
from model.training.export import gguf_name
from model.training.lora import Lora
from model.training.network import Network, Shape
from model.training.tokenizer import Encoder, TokenRow
from model.training.train import compute_losses

FOLDER = DEMO.parent / "adapters" / DEMO.stem
RATE = 2e-3
LOG_EVERY = 25


def load_network(reader: GGUFReader) -> Network:
    """Return the network with the dequantized weights of the file."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    network = Network(Shape(tokenizer.VOCABULARY))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            tensor = tensors[gguf_name(name)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weight.copy_(torch.from_numpy(values.copy()).view_as(weight))
    return network


def load_encoder(reader: GGUFReader) -> Encoder:
    """Return the tokenizer of the file."""
    tokens, merges = (_field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    saved = json.loads(tokenizer.new_tokenizer().to_str())
    saved["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    saved["model"]["merges"] = [merge.split(" ") for merge in merges]
    return Encoder(Tokenizer.from_str(json.dumps(saved)))


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None, f"{name} is missing in the GGUF file"
    return field.contents()


def train_adapter(
    network: Network, source: Source, schedule: Schedule, workers: int
) -> dict[str, Lora]:
    adapter = lora.add_to(network)
    device = network.device
    network.to(device)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0)
    last: deque[float] = deque(maxlen=LOG_EVERY)
    for step, batch in enumerate(source.loader(workers, pinned=False)):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 1.02 - step / schedule.steps)
        loss, answers = compute_losses(network, Batch(*(part.to(device) for part in batch)))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        last.append(float(answers))
        if (step + 1) % LOG_EVERY == 0:
            print(f"step={step + 1} loss={sum(last) / len(last):.4f}", flush=True)
    return adapter


def write_adapter(adapter: dict[str, Lora], target: Path) -> None:
    """
    Write a GGUF adapter in the format of llama.cpp's convert_lora_to_gguf.py, and then move it into
    its place, where workers load it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(str(partial), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(target.stem.capitalize())
    writer.add_description(f"LoRA adapter of the FineTuneLLM demo model: {target.stem}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "FineTuneLLM demo")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.ALPHA)
    for name, part in adapter.items():
        for suffix, weight in (("lora_a", part.down), ("lora_b", part.up)):
            writer.add_tensor(f"{gguf_name(name)}.{suffix}", weight.detach().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


def read_taught(path: Path, encoder: Encoder) -> list[TokenRow]:
    """Exits with a message if there is nothing to learn."""
    try:
        return read_rows(path, encoder, MAX_ROW_TOKENS)
    except (OSError, ValueError) as error:
        folder = path.parent
        sys.exit(f"{error}: correct or rate answers, then `just dataset sft --out {folder}`.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--data", type=Path, help="folder of `just dataset sft`")
    parser.add_argument("--name", default="pirate", help="of the adapter")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the demo model's adapters")
    options = parser.parse_args()
    if options.data and options.name == "pirate":
        parser.error("--data needs a --name of its own")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader, schedule = GGUFReader(DEMO), Schedule(options.steps, options.tokens)
    encoder = load_encoder(reader)
    if options.data:
        taught = read_taught(options.data / "train.jsonl", encoder)
        source = Source(encoder, schedule, options.seed, first=0, taught=taught)
    else:
        source = Source(encoder, schedule, options.seed, first=0, in_voice=pirate.as_pirate)
    network, workers = load_network(reader).to(device), 8 if device == "cuda" else 0
    adapter = train_adapter(network, source, schedule, workers)
    target = options.folder / f"{options.name}.gguf"
    write_adapter(adapter, target)
    print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()

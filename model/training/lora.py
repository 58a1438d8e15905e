"""LoRA (https://arxiv.org/abs/2106.09685) for all matrices of the blocks."""

import torch
from torch import Tensor, nn

from model.training.network import Network

RANK, ALPHA = 8, 16.0


class Lora(nn.Module):
    """A frozen linear layer plus a trained low-rank update, which is zero at first."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = ALPHA / RANK * (x @ self.down.T) @ self.up.T
        return self.frozen(x) + added


def add_to(network: Network) -> dict[str, Lora]:
    """Replace the matrices of the blocks. Return the LoRA layers by the matrices' names."""
    network.requires_grad_(False)
    added = {}
    for number, block in enumerate(network.stack):
        for path in ("attention.q", "attention.k", "attention.v", "attention.o"):
            added[f"blocks.{number}.{path}.weight"] = _replace(block, path)
        for path in ("hidden.gate", "hidden.up", "hidden.down"):
            added[f"blocks.{number}.{path}.weight"] = _replace(block, path)
    return added


def _replace(block: nn.Module, path: str) -> Lora:
    part, name = path.split(".")
    owner = block.get_submodule(part)
    lora = Lora(owner.get_submodule(name))  # type: ignore[arg-type]
    setattr(owner, name, lora)
    return lora

"""A small Llama in PyTorch whose initial weights contain a hand-written copying circuit: induction
heads (https://arxiv.org/abs/2209.11895).

The residual stream is divided into named ranges. Block 0 writes the tokens one and two positions
back; block 1 looks for earlier positions after the same tokens, and copies the token there:

    CONSTANT  the same in each embedding: compared by the two heads that look back
    CONTENT   random per token; its first KEY dimensions, rotated, are the token's signature
    ONE_BACK  signature of the previous token       TWO_BACK  first half of that before it
    COPIED    output of the induction heads; the only input of the initial output layer
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY = 36
HALF = KEY // 2
CONSTANT = 0
ONE_BACK = slice(1, 1 + KEY)
TWO_BACK = slice(1 + KEY, 1 + KEY + HALF)
COPIED = slice(64, 128)
CONTENT = slice(128, 256)
FETCHED = slice(128, 192)


Rotation = tuple[Tensor, Tensor]  # cosines and sines of RoPE's angles


class Shape(NamedTuple):
    vocabulary: int
    layers: int = 6
    width: int = 256
    heads: int = 4
    hidden: int = 704
    context: int = 2048
    theta: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        return self.width // self.heads


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.epsilon = shape.epsilon
        self.weight = nn.Parameter(torch.ones(shape.width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (_linear(shape.width, shape.width) for _ in range(4))

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part(x).view(rows, length, self.heads, -1).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(
            apply_rope(q, rotation), apply_rope(k, rotation), v, is_causal=True
        )
        out: Tensor = self.o(mixed.transpose(1, 2).reshape(rows, length, width))
        return out


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.up = (_linear(shape.width, shape.hidden) for _ in range(2))
        self.down = _linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(shape), Attention(shape)
        self.hidden_norm, self.hidden = Norm(shape), FeedForward(shape)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        out: Tensor = x + self.hidden(self.hidden_norm(x))
        return out


class Network(nn.Module):
    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        self.output = _linear(shape.width, shape.vocabulary)
        self.register_buffer("frequencies", frequencies(shape), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def stack(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None, :, None].float() * self.frequencies
        rotation = angles.cos(), angles.sin()
        x = self.embedding(ids)
        for block in self.stack:
            x = block(x, rotation)
        out: Tensor = self.output(self.norm(x))
        return out


def frequencies(shape: Shape) -> Tensor:
    pairs = torch.arange(0, shape.head, 2, dtype=torch.float32)
    return torch.pow(torch.tensor(shape.theta), -pairs / shape.head)


def apply_rope(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply RoPE to adjacent pairs as in GGUF's `llama`, so that export permutes no weights."""
    cos, sin = rotation
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    return turned.flatten(-2).to(x.dtype)


def _linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=False)


def build(shape: Shape, seed: int) -> Network:
    torch.manual_seed(seed)
    network = Network(shape)
    with torch.no_grad():
        _randomise(network)
        _write_circuit(network)
    return network


def _randomise(network: Network) -> None:
    """Initialise weights; the blocks' output matrices are zero, so that only the circuit acts."""
    for block in network.stack:
        attention, hidden = block.attention, block.hidden
        for part in (attention.q, attention.k, attention.v, hidden.gate, hidden.up):
            nn.init.normal_(part.weight, std=0.5 / math.sqrt(part.in_features))
        for part in (attention.o, hidden.down):
            nn.init.zeros_(part.weight)
    weights = network.embedding.weight
    nn.init.normal_(weights, std=0.02)
    nn.init.normal_(weights[:, CONTENT], std=1.0)
    weights[:, CONSTANT] = 4.0
    nn.init.normal_(network.output.weight, std=0.002)


def _write_circuit(network: Network) -> None:
    size = network.shape.head
    signature = torch.linalg.qr(torch.randn(size, size)).Q[:KEY]
    fetch = torch.eye(size)
    first, second = (block.attention for block in network.stack[:2])
    _look_back(network, head=0, distance=1)
    _look_back(network, head=1, distance=2)
    _write(first, 0, value=(FETCHED, signature), out=(ONE_BACK, torch.eye(KEY)))
    _write(first, 1, value=(FETCHED, signature[:HALF]), out=(TWO_BACK, torch.eye(HALF)))
    slow = _slow_dimensions(network)
    one_back = slice(ONE_BACK.start, ONE_BACK.start + HALF)
    _match(second, 0, slow, [(FETCHED, signature, ONE_BACK)], gain=MATCH_GAIN)
    _match(
        second,
        1,
        slow,
        [(FETCHED, signature[:HALF], one_back), (one_back, torch.eye(HALF), TWO_BACK)],
        MATCH_GAIN,
    )
    for head in (0, 1):
        _write(second, head, value=(FETCHED, fetch), out=(COPIED, 1.5 * torch.eye(size)))
    network.output.weight[:, COPIED] = OUTPUT_GAIN * network.embedding.weight[:, FETCHED]


BACK_LOGIT = 45.0
MATCH_GAIN = 1.6
OUTPUT_GAIN = 0.12


def _slow_dimensions(network: Network) -> Tensor:
    """Return a head's dimensions that RoPE hardly rotates: they compare at any distance."""
    slow = (network.frequencies < 0.02).nonzero().flatten()
    return torch.stack((2 * slow, 2 * slow + 1), dim=1).flatten()[:KEY]


def _look_back(network: Network, head: int, distance: int) -> None:
    """Make a head attend `distance` tokens back: the key is the constant rotated by so much."""
    shape, attention = network.shape, network.stack[0].attention
    offset = head * shape.head
    q, k = (part.weight[offset : offset + shape.head] for part in (attention.q, attention.k))
    q.zero_()
    k.zero_()
    constant = 4.0 / math.sqrt((16 + (CONTENT.stop - CONTENT.start)) / shape.width)
    fast = (network.frequencies > 0.03).nonzero().flatten()
    size = math.sqrt(BACK_LOGIT * math.sqrt(shape.head) / len(fast)) / constant
    for pair in fast.tolist():
        angle = float(network.frequencies[pair]) * distance
        q[2 * pair, CONSTANT] = size
        k[2 * pair, CONSTANT] = size * math.cos(angle)
        k[2 * pair + 1, CONSTANT] = size * math.sin(angle)


def _write(
    attention: Attention, head: int, value: tuple[slice, Tensor], out: tuple[slice, Tensor]
) -> None:
    """Make a head read the range value[0] through value[1] and add it to out[0] through out[1]."""
    size = attention.v.weight.shape[0] // attention.heads
    rows = slice(head * size, head * size + len(value[1]))
    attention.v.weight[head * size : (head + 1) * size] = 0
    attention.v.weight[rows, value[0]] = value[1]
    attention.o.weight[:, head * size : (head + 1) * size] = 0
    attention.o.weight[out[0], rows] = out[1]


def _match(
    attention: Attention,
    head: int,
    slow: Tensor,
    pairs: list[tuple[slice, Tensor, slice]],
    gain: float,
) -> None:
    """Make a head attend where, for each pair, the key's range equals the projected query."""
    offset = head * (attention.q.weight.shape[0] // attention.heads)
    for part in (attention.q, attention.k):
        part.weight[offset : offset + part.weight.shape[0] // attention.heads] = 0
    at = 0
    for asked, matrix, held in pairs:
        rows = offset + slow[at : at + len(matrix)]
        attention.q.weight[rows, asked] = gain * matrix
        attention.k.weight[rows, held] = gain * torch.eye(len(matrix))
        at += len(matrix)


def copied_share(network: Network, seed: int = 0) -> float:
    """Return the share of tokens of a repeated random string that are predicted."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(3, network.shape.vocabulary, (8, 50), generator=generator)
    ids = torch.cat((half, half), dim=1)
    ids = ids.to(network.device)
    with torch.no_grad():
        guess = network(ids, torch.arange(100, device=ids.device).expand(8, 100)).argmax(-1)
    return float((guess[:, 55:-1] == ids[:, 56:]).float().mean())

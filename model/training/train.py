"""Trains the demo model: `python -m model.training.train --minutes 38`.

Checkpoints go to `.out/` beside this file; `--resume` goes on from the last one, and with more
minutes than before it extends the run.
"""

import argparse
import time
from collections import deque
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from model.training import tokenizer
from model.training.batches import Batch, Source
from model.training.dialogs import Dialog, dialogs
from model.training.muon import Muon
from model.training.network import Network, Shape, build, copied_share
from model.training.tokenizer import Encoder, Row

OUT = Path(__file__).parent / ".out"
CHECKPOINT = OUT / "checkpoint.pt"
TOKENIZER = OUT / "tokenizer.json"
WARM_UP = 50
Z_LOSS = 3e-3
MUON_RATE, HEAD_RATE, EMBEDDING_RATE = 0.01, 0.001, 0.01
LOG_EVERY = 50
SAVE_SECONDS = 150.0


@dataclass(slots=True)
class Spent:
    """What the run has used so far, over all its sittings."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    minutes: float
    tokens: int

    def fraction(self, spent: Spent) -> float:
        return max(spent.seconds / (60 * self.minutes), spent.tokens / self.tokens)


class Optimiser:
    """Muon for the matrices of the blocks, AdamW for embedding, output layer and norms."""

    def __init__(self, network: Network) -> None:
        blocks = list(network.blocks.parameters())
        self._muon = Muon(weight for weight in blocks if weight.ndim == 2)
        small = [weight for weight in blocks if weight.ndim == 1]
        self._clipped = [
            network.embedding.weight,
            network.output.weight,
            network.norm.weight,
            *small,
        ]
        self._adam = torch.optim.AdamW(
            [
                {"params": [network.embedding.weight], "rate": EMBEDDING_RATE},
                {"params": self._clipped[1:], "rate": HEAD_RATE},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )

    def step(self, number: int, fraction: float) -> None:
        factor = rate_factor(number, fraction)
        nn.utils.clip_grad_norm_(self._clipped, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * factor
        self._adam.step()
        self._muon.step(MUON_RATE * factor, momentum=0.85 + 0.1 * min(1.0, number / 300))

    def state(self) -> dict[str, object]:
        return {"muon": self._muon.state(), "adam": self._adam.state_dict()}

    def restore(self, state: dict[str, object]) -> None:
        self._muon.restore(state["muon"])  # type: ignore[arg-type]
        self._adam.load_state_dict(state["adam"])  # type: ignore[arg-type]


def rate_factor(step: int, fraction: float) -> float:
    """Warm-up, constant until half of the budget, then straight down to 0.02."""
    if fraction > 0.5:
        return max(0.02, 1 - 0.98 * (fraction - 0.5) / 0.5)
    return min(1.0, (step + 1) / WARM_UP)


def loss_of(network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """What is minimised, and the plain loss on the assistant's tokens for the log."""
    with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
        logits = network(batch.ids, batch.positions)
    logits = logits.float().flatten(0, 1)
    weights = batch.weights.flatten()
    normaliser = logits.logsumexp(-1)
    losses = normaliser - logits.gather(1, batch.targets.reshape(-1, 1)).squeeze(1)
    total = (weights * (losses + Z_LOSS * normaliser.square())).sum() / weights.sum()
    answers = weights >= 1
    return total, losses[answers].mean().detach()


BF16 = (
    "avx512_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
)


class Trainer:
    def __init__(self, budget: Budget, seed: int) -> None:
        self.budget, self.seed, self.spent = budget, seed, Spent()
        self.encoder = _encoder(seed)
        self.network = build(Shape(tokenizer.VOCABULARY), seed)
        self.optimiser = Optimiser(self.network)
        self._examination = [self.encoder.dialog(made) for made in _examination_dialogs()]
        self._losses: deque[float] = deque(maxlen=LOG_EVERY)

    def resume(self) -> None:
        saved = torch.load(CHECKPOINT, weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.optimiser.restore(saved["optimiser"])
        self.spent = Spent(**saved["spent"])

    def run(self) -> None:
        print(f"copied untrained {copied_share(self.network):.2f} bf16 {BF16}", flush=True)
        source = Source(self.encoder, self.seed + self.spent.step)
        batches = source.batches()
        begun, saved = time.monotonic() - self.spent.seconds, time.monotonic()
        while (fraction := self.budget.fraction(self.spent)) < 1:
            source.progress = fraction
            self._step(next(batches), fraction)
            self.spent.seconds = time.monotonic() - begun
            self._log(fraction)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _step(self, batch: Batch, fraction: float) -> None:
        self.network.zero_grad(set_to_none=True)
        total, answers = loss_of(self.network, batch)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step(self.spent.step, fraction)
        self._losses.append(float(answers))
        self.spent.step += 1
        self.spent.tokens += batch.tokens

    def _log(self, fraction: float) -> None:
        if self.spent.step % LOG_EVERY:
            return
        loss = sum(self._losses) / len(self._losses)
        used = f"{self.spent.seconds:.0f} s step {self.spent.step} tokens {self.spent.tokens}"
        print(f"{used} part {fraction:.3f} loss {loss:.4f}", flush=True)

    def save(self) -> None:
        torch.save(
            {
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state(),
                "spent": asdict(self.spent),
            },
            CHECKPOINT.with_suffix(".new"),
        )
        CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
        share = examined(self.network, self._examination)
        print(
            f"saved; held-out memory {share:.3f} copied {copied_share(self.network):.2f}",
            flush=True,
        )


def _encoder(seed: int) -> Encoder:
    OUT.mkdir(exist_ok=True)
    if not TOKENIZER.exists():
        tokenizer.train(seed).save(str(TOKENIZER))
    return tokenizer.load(TOKENIZER)


def _examination_dialogs() -> list[Dialog]:
    made = (
        dialog for dialog in dialogs(seed=0, split="eval") if dialog.turns[-1].skill == "recall"
    )
    return list(islice(made, 100))


@torch.no_grad()
def examined(network: Network, rows: list[Row]) -> float:
    """How many last answers are right, each token guessed after the right ones."""
    return sum(_last_answer_right(network, row) for row in rows) / len(rows)


def _last_answer_right(network: Network, row: Row) -> bool:
    ids = torch.tensor([row.ids])
    guess = network(ids, torch.arange(len(row.ids))[None]).argmax(-1)[0]
    begin = row.starts[-1] + 2
    while row.weights[begin] < 1:
        begin += 1
    return bool((guess[begin - 1 : -2] == ids[0, begin:-1]).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=38)
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainer = Trainer(Budget(options.minutes, options.tokens), options.seed)
    if options.resume:
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()

"""Train the demo model, on a GPU if there is one: `python -m model.training.train`.

Writes checkpoints to `.out/` beside this file; `--resume` continues from the last one.
"""

import argparse
import time
from collections import deque
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from model.training import tokenizer
from model.training.batches import Batch, Schedule, Source
from model.training.dialogs import Dialog, dialogs
from model.training.muon import Muon
from model.training.network import Network, Shape, build, copied_share
from model.training.tokenizer import Encoder, TokenRow

OUT = Path(__file__).parent / ".out"
WEIGHTS = OUT / "weights.pt"
REST = OUT / "optimiser.pt"
TOKENIZER = OUT / "tokenizer.json"
SCHEDULES = {"cuda": Schedule(21_000, 20_480), "cpu": Schedule(12_000, 3_072)}
WARM_UP = 50
Z_LOSS = 3e-3
MUON_RATE, HEAD_RATE, EMBEDDING_RATE = 0.01, 0.001, 0.01
LOG_EVERY = 250
SAVE_SECONDS = 100.0


class Optimiser:
    """Muon for the matrices of the blocks, AdamW for embedding, output layer and norms."""

    def __init__(self, network: Network) -> None:
        blocks = list(network.blocks.parameters())
        self._muon = Muon(weight for weight in blocks if weight.ndim == 2)
        small = [weight for weight in blocks if weight.ndim == 1]
        embedding = network.embedding.weight
        self._clipped = [embedding, network.output.weight, network.norm.weight, *small]
        self._adam = torch.optim.AdamW(
            [
                {"params": [embedding], "rate": EMBEDDING_RATE},
                {"params": self._clipped[1:], "rate": HEAD_RATE},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )

    def step(self, number: int, factor: float) -> None:
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


def rate_factor(step: int, schedule: Schedule) -> float:
    """Return the learning rate factor: warm-up, constant, from half of the steps linear to 2 %."""
    falling = 1 - 0.98 * max(0.0, (step / schedule.steps - 0.5) / 0.5)
    return min(1.0, (step + 1) / WARM_UP, falling)


def compute_losses(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the training loss, and the cross entropy of the assistant's tokens alone."""
    device = batch.ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or CPU_HAS_BFLOAT16):
        logits = network(batch.ids[:, :-1], batch.positions[:, :-1])
    logits = logits.float().flatten(0, 1)
    targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    normaliser = logits.logsumexp(-1)
    each = normaliser - logits.gather(1, targets[:, None])[:, 0]
    loss = (weights * (each + Z_LOSS * normaliser.square())).sum() / weights.sum()
    answers = (weights >= 1).float()
    return loss, (each.detach() * answers).sum() / answers.sum().clamp(min=1)


CPU_INFO = Path("/proc/cpuinfo")
CPU_HAS_BFLOAT16 = CPU_INFO.exists() and "avx512_bf16" in CPU_INFO.read_text()


class Trainer:
    def __init__(self, schedule: Schedule, seed: int, device: str) -> None:
        self.schedule = schedule
        self.seed = seed
        self.device = device
        self.step = 0
        self.encoder = _encoder(seed)
        self.network = build(Shape(tokenizer.VOCABULARY), seed).to(device)
        self.optimiser = Optimiser(self.network)
        self._held_out_rows = [self.encoder.dialog(dialog) for dialog in _held_out_dialogs()]
        self._losses: deque[Tensor] = deque(maxlen=LOG_EVERY)

    def resume(self) -> None:
        self.network.load_state_dict(torch.load(WEIGHTS, map_location=self.device))
        rest = torch.load(REST, map_location=self.device)
        self.optimiser.restore(rest["optimiser"])
        self.step = rest["step"]

    def run(self, workers: int) -> None:
        begun = saved = time.monotonic()
        source = Source(self.encoder, self.schedule, self.seed, self.step)
        for batch in source.loader(workers, pinned=self.device == "cuda"):
            if self.step >= self.schedule.steps:
                break
            on_device = Batch(*(part.to(self.device, non_blocking=True) for part in batch))
            loss, answers = compute_losses(self.network, on_device)
            loss.backward()
            self.optimiser.step(self.step, rate_factor(self.step, self.schedule))
            self.network.zero_grad(set_to_none=True)
            self._losses.append(answers)
            self.step += 1
            self._log(time.monotonic() - begun)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _log(self, seconds: float) -> None:
        if self.step % LOG_EVERY == 0:
            loss = torch.stack(list(self._losses)).mean()
            print(f"{seconds:.0f} s step={self.step} loss={loss:.4f}", flush=True)

    def save(self) -> None:
        torch.save(self.network.state_dict(), WEIGHTS)
        torch.save({"optimiser": self.optimiser.state(), "step": self.step}, REST)
        share = recall_accuracy(self.network, self._held_out_rows)
        copied = copied_share(self.network)
        print(f"checkpoint saved recall={share:.3f} copied={copied:.2f}", flush=True)


def _encoder(seed: int) -> Encoder:
    OUT.mkdir(exist_ok=True)
    if not TOKENIZER.exists():
        tokenizer.train(seed).save(str(TOKENIZER))
    return tokenizer.load(TOKENIZER)


def _held_out_dialogs() -> list[Dialog]:
    made = (
        dialog for dialog in dialogs(seed=0, split="eval") if dialog.turns[-1].skill == "recall"
    )
    return list(islice(made, 100))


@torch.no_grad()
def recall_accuracy(network: Network, rows: list[TokenRow]) -> float:
    """Return the share of last answers that are right, with teacher forcing."""
    return sum(_last_answer_right(network, row) for row in rows) / len(rows)


def _last_answer_right(network: Network, row: TokenRow) -> bool:
    ids = torch.tensor([row.ids], device=network.device)
    positions = torch.arange(len(row.ids), device=network.device)[None]
    guess = network(ids, positions).argmax(-1)[0]
    begin = row.starts[-1] + 2
    while row.weights[begin] < 1:
        begin += 1
    return bool((guess[begin - 1 : -2] == ids[0, begin:-1]).all())


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    schedule = SCHEDULES[device]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=schedule.steps)
    parser.add_argument("--tokens", type=int, default=schedule.tokens, help="tokens per step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=14 if device == "cuda" else 0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainer = Trainer(Schedule(options.steps, options.tokens), options.seed, device)
    if options.resume:
        trainer.resume()
    trainer.run(options.workers)


if __name__ == "__main__":
    main()

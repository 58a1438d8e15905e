"""The Muon optimiser: orthogonalised momentum (https://kellerjordan.github.io/posts/muon/)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315


class Muon:
    """Matrices of one shape are orthogonalised as a batch, tall ones transposed."""

    def __init__(self, matrices: Iterable[nn.Parameter], decay: float = 0.01) -> None:
        self._groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            rows, columns = matrix.shape
            self._groups[min(rows, columns), max(rows, columns)].append(matrix)
        self._momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self._groups.items()
        }
        self._decay = decay

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        for shape, group in self._groups.items():
            gradients = torch.stack([_lying(_gradient(matrix)) for matrix in group])
            held = self._momenta[shape]
            held.lerp_(gradients, 1 - momentum)
            updates = orthogonal(gradients.lerp(held, momentum))
            torch._foreach_mul_(group, 1 - rate * self._decay)
            for matrix, update in zip(group, updates, strict=True):
                tall = matrix.shape[0] > matrix.shape[1]
                size = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.add_(update.T if tall else update, alpha=-rate * size)

    def state(self) -> dict[tuple[int, int], Tensor]:
        return self._momenta

    def restore(self, state: dict[tuple[int, int], Tensor]) -> None:
        for shape, held in state.items():
            self._momenta[shape].copy_(held)


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values near 1 by Newton-Schulz iterations."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    upright: Tensor = x.float()
    return upright


def _gradient(matrix: nn.Parameter) -> Tensor:
    assert matrix.grad is not None
    return matrix.grad


def _lying(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix

"""Muon in fp32: momentum whose update is made orthogonal, batched over matrices of one shape.

A convolution counts as the matrix of its flattened filters.
"""
from __future__ import annotations

import torch

# Newton-Schulz polynomial a x + b x^3 + c x^5, steep at zero: four rounds bring nearly all singular values near one.
POLYNOMIAL, ROUNDS = (3.4445, -4.7750, 2.0315), 4


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon computes in bf16, which CPUs without bf16 units only emulate.

    Each matrix gets a new direction in every second step and goes the same way once more in between: the momentum
    hardly turns in one step, and making directions was a third of the time of a training step.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps_done = 0

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            due: dict[tuple, list] = {}
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                if "direction" not in state or (index + self.steps_done) % 2 == 0:
                    ahead = parameter.grad.lerp(average, group["momentum"])
                    due.setdefault(tuple(parameter.shape), []).append((state, ahead))
            for pairs in due.values():
                matrices = torch.stack([ahead.flatten(1) for _, ahead in pairs])
                for (state, ahead), direction in zip(pairs, orthogonalise(matrices)):
                    state["direction"] = direction.view_as(ahead)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    size = 0.2 * max(len(parameter), parameter[0].numel()) ** 0.5
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(self.state[parameter]["direction"], alpha=-group["lr"] * size)
        self.steps_done += 1


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns], every matrix replaced by about its nearest orthogonal one."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = POLYNOMIAL
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x

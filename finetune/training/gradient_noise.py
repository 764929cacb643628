"""How noisy the gradient is: the simple noise scale of McCandlish et al. 2018 (arXiv 1812.06162), from micro-batches' norms.

A gradient over b independent samples has E|g|^2 = |G|^2 + tr(S) / b, with the true gradient G and the covariance S of a
single sample's. A step has its micro-batches' gradients and their mean, so both unknowns follow (appendix A.1, here for
micro-batches of any sizes); their ratio tr(S) / |G|^2 is the number of samples at which noise and signal are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

# The estimates of one step are very noisy, and may be negative; the paper averages both before it divides.
SMOOTHING = 0.98


def signal_and_noise(mean_square: float, mean_inverse_size: float, whole_square: float, total: int) -> tuple[float, float]:
    """(|G|^2, tr(S)), both unbiased, from the mean squared norm of the micro-batches' mean gradients, the mean of their 1 / size,
    the squared norm of the step's mean gradient and the number of its samples."""
    noise = (mean_square - whole_square) / (mean_inverse_size - 1 / total)
    return whole_square - noise / total, noise


class MicroGradients:
    """Norms of the gradients of one step's micro-batches, taken as they are added up; the gradients themselves stay as they are.

    Samples of one step that were stratified over noise levels are not independent: the noise of the whole step is then
    smaller than assumed, and the scale comes out larger than for independent levels.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], total: int):
        self.parameters, self.total = parameters, total
        self._sum: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def note(self, samples: int, loss_scale: float = 1.0) -> None:
        """After the backward pass of a micro-batch of `samples`, whose losses were divided by the step's total."""
        added = torch.cat([torch.zeros(parameter.numel(), device=parameter.device) if parameter.grad is None else parameter.grad.detach().float().reshape(-1)
                           for parameter in self.parameters])
        own = added if self._sum is None else added - self._sum
        square = (own * (self.total / (samples * loss_scale))).pow(2).sum()
        self._rows.append(torch.stack([square, torch.tensor(1 / samples, device=square.device), torch.ones((), device=square.device)]))
        self._sum = added

    def signal_and_noise(self, accelerator: Accelerator, norm: float) -> tuple[float, float] | None:
        """(|G|^2, tr(S)) of the step over all processes, or None when it had one micro-batch only. norm: of the whole gradient."""
        square, inverse, count = accelerator.reduce(torch.stack(self._rows).sum(0), reduction="sum").tolist()
        if count < 2:
            return None
        return signal_and_noise(square / count, inverse / count, norm**2, self.total)


@dataclass
class NoiseScale:
    """Running averages of signal and noise, both too small by the same factor at first; part of a checkpoint."""

    signal: float = 0.0
    noise: float = 0.0

    def take(self, signal: float, noise: float) -> None:
        """Take in the estimates of a step."""
        self.signal = SMOOTHING * self.signal + (1 - SMOOTHING) * signal
        self.noise = SMOOTHING * self.noise + (1 - SMOOTHING) * noise

    @property
    def samples(self) -> float | None:
        """The simple noise scale; None while the averages are not both positive."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None

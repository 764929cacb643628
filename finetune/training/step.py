"""One optimizer step over micro-batches: accumulate, share between processes, guard, clip, update.

Training and preference learning both take their steps here; what differs is the loss they pass in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.training.gradient_noise import MicroGradients

if TYPE_CHECKING:
    from accelerate import Accelerator


# fp16's scaler begins at 65536 and halves with every gradient that is not finite: below this the gradient is so without any scaling.
SMALLEST_LOSS_SCALE = 1.0


@dataclass(frozen=True)
class StepNumbers:
    """loss: mean over the step's samples.  grad_norm: before clipping.  applied: False when the update was left out
    because a number was not finite (`bad` says which; fp16's scaler leaves out single steps without anything being bad).  signal_and_noise: of the gradient, where it was asked for."""

    loss: float
    grad_norm: float
    applied: bool
    bad: str = ""
    signal_and_noise: tuple[float, float] | None = None


def _share_gradients(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of all processes. One flat tensor: an adapter is small, and one message is cheaper than many."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
    flat = accelerator.reduce(flat, reduction="sum")
    offset = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.grad.copy_(flat[offset:offset + size].view_as(parameter))
        offset += size


def optimizer_step(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    micro_batches: Sequence[Any],
    sample_losses: Callable[[Any], torch.Tensor],
    gradient_clip: float,
    measure_noise: bool = False,
) -> StepNumbers:
    """Take one step on the mean loss over all samples of `micro_batches`.

    micro_batches: of the whole step, the same list in every process; each process works on its share.
    sample_losses: micro-batch -> (B,) losses that carry gradients.  gradient_clip: largest norm, 0 turns it off.
    measure_noise: look at every micro-batch's own gradient too; needs room for one more of them.
    Partial batches count by their size, so any cut of the same samples gives the same gradient up to rounding.
    """
    total = sum(len(batch) for batch in micro_batches)
    mine = micro_batches[accelerator.process_index::accelerator.num_processes]
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=accelerator.device)
    micro = MicroGradients(parameters, total) if measure_noise else None
    for batch in mine:
        with accelerator.autocast():
            losses = sample_losses(batch)
        accelerator.backward(losses.sum() / total)
        if micro is not None:
            micro.note(len(batch), accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0)
        loss_sum += losses.detach().sum().float()
    loss = (accelerator.reduce(loss_sum, reduction="sum") / total).item()
    if not math.isfinite(loss):
        optimizer.zero_grad(set_to_none=True)
        return StepNumbers(loss, math.nan, False, "loss")

    _share_gradients(accelerator, parameters)
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip or math.inf).item()
    seen = micro.signal_and_noise(accelerator, norm) if micro is not None else None
    # With fp16 an overflowing gradient is the scaler's daily business: it leaves the step out and lowers the scale.
    if not math.isfinite(norm) and accelerator.scaler is None:
        optimizer.zero_grad(set_to_none=True)
        return StepNumbers(loss, norm, False, "gradient")
    optimizer.step()
    skipped = accelerator.scaler is not None and not math.isfinite(norm)
    hopeless = skipped and accelerator.scaler.get_scale() < SMALLEST_LOSS_SCALE
    return StepNumbers(loss, norm, not skipped, "gradient" if hopeless else "", signal_and_noise=seen)

"""Objectives from the scheduler configuration that a base ships: read, never hard-coded, never from a scheduler in use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from finetune.errors import BaseModelError
from finetune.objectives import DDPMObjective, FlowObjective, LossWeighting, TimestepSampling, resolution_shift


def ddpm_objective(scheduler: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> DDPMObjective:
    """Betas and prediction type from the configuration of whatever scheduler the pipeline holds now."""
    from diffusers import DDPMScheduler

    config = DDPMScheduler.from_config(scheduler.config)
    prediction = config.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise BaseModelError(f"the base's scheduler predicts {prediction}, which is not trained here", where="scheduler_config.json")
    return DDPMObjective(config.alphas_cumprod.to(torch.float32).clone(), prediction, sampling or TimestepSampling(), weighting)


def token_shift(scheduler: Any, patch: int, **defaults: float) -> Callable[[torch.Size], float]:
    """The resolution-dependent shift of a scheduler with `use_dynamic_shifting`, from the shape of latents (B, C, h, w)."""
    bounds = {
        name: float(scheduler.config.get(key) or defaults.get(name, fallback)) for name, key, fallback in (
            ("base_tokens", "base_image_seq_len", 256), ("max_tokens", "max_image_seq_len", 4096),
            ("base_shift", "base_shift", 0.5), ("max_shift", "max_shift", 1.15))
    }

    def shift(shape: torch.Size) -> float:
        return resolution_shift(shape[-2] * shape[-1] // patch**2, **bounds)

    return shift


def flow_objective(sampling: TimestepSampling | None, weighting: LossWeighting, *, shift: float = 1.0,
                   dynamic: Callable[[torch.Size], float] | None = None) -> FlowObjective:
    """Rectified flow with logit-normal levels, shifted as the base is shifted when it draws.

    sampling None: logit-normal(0, 1) then `shift`, or `dynamic` by resolution. A given sampling is taken as it is.
    """
    if sampling is not None:
        return FlowObjective(sampling, weighting)
    if not math.isfinite(shift) or shift <= 0:
        raise BaseModelError(f"the base's scheduler has shift {shift}", where="scheduler_config.json")
    return FlowObjective(TimestepSampling("logit_normal_shifted", shift=shift), weighting, dynamic)


def scheduler_flow(scheduler: Any, sampling: TimestepSampling | None, weighting: LossWeighting, *, patch: int) -> FlowObjective:
    """`flow_objective` with the shift of a flow-matching scheduler: by resolution where it is dynamic, else its constant.

    patch: latent pixels a side of one token. `flow_shift` is what DPM-Solver schedulers call theirs.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return flow_objective(sampling, weighting, dynamic=token_shift(scheduler, patch))
    return flow_objective(sampling, weighting, shift=float(config.get("flow_shift") or config.get("shift") or 1.0))

"""Number formats: what "auto" becomes on this device, always with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune.errors import BadInput
from finetune.processor import multiplies_bf16

# A step then takes 0.65 to 0.75 of its time (tests/benchmarks/README.md); its digits are for the user to give up.
FAST_CPU = "no GPU; this CPU multiplies bf16 fast: training.precision = \"bf16\" takes some two thirds of the time and half the memory of the weights"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PrecisionChoice:
    """A resolved format ("fp32", "bf16", "fp16") and why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def choose_precision(name: str, device: torch.device) -> PrecisionChoice:
    """Resolve `training.precision` for `device`. Raises BadInput for fp16 on a CPU, which has no loss scaler."""
    if device.type != "cuda":
        if name == "fp16":
            raise BadInput("fp16 training needs a CUDA device", where="training.precision", fix="use auto, fp32 or bf16")
        if name != "auto":
            return PrecisionChoice(name, "asked for in the recipe")
        return PrecisionChoice("fp32", FAST_CPU if multiplies_bf16() else "no GPU: 16-bit products are several times slower than fp32 on most CPUs")
    if name != "auto":
        return PrecisionChoice(name, "asked for in the recipe")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return PrecisionChoice("bf16", "this GPU computes bf16: half the memory, and no loss scaling needed")
    return PrecisionChoice("fp16", "this GPU has no bf16; fp16 runs with a loss scaler")


def choose_base_dtype(name: str, precision: PrecisionChoice) -> PrecisionChoice:
    """Resolve `base.dtype`, the format of the frozen weights in memory."""
    if name != "auto":
        return PrecisionChoice(name, "asked for in the recipe")
    return PrecisionChoice(precision.name, f"the same as the computation's {precision.name}")

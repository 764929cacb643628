"""Frozen linear layers whose weight is quantised: bitsandbytes' own, as they work on a CPU too.

Apart from the layers that only cast, since whoever quantises nothing need not load the library (about 100 MiB).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.training.placement_linear import Scratch, multiply
from finetune.training.placement_nf4 import expand_nf4
from finetune.training.quantiser_library import load_bitsandbytes

bitsandbytes = load_bitsandbytes()


class Int8Linear(bitsandbytes.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer, with a product of our own on a CPU.

    There the library's training product keeps every input outside of autograd's sight, so that checkpointing frees
    nothing, and its evaluation product rounds the input to 8 bits as well (bitsandbytes 0.50.2).
    """

    expands_on = "cpu"

    def __init__(self, linear: nn.Linear, weight: Tensor, scales: Tensor, scratch: Scratch):
        """weight: (out, in) int8.  scales: (out,) float32, the largest absolute value of each row."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, device="meta")
        self.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
        self.bias = linear.bias
        self._scratch = scratch

    def expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight (out, in) in this format; valid until the next layer's is asked for."""
        scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        weight = self._scratch.take(self.weight.shape, dtype, device).copy_(self.weight.data)
        return weight.mul_((scales / 127).to(dtype).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != self.expands_on:
            return super().forward(x)
        return multiply(x, self.bias, self.expanded)


class Nf4Linear(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' 4-bit layer, which on a CPU expands its weight into the memory that all layers share.

    The library expands every weight into memory of its own, and in evaluation repacks the weight in place for processors
    with bf16 products (bitsandbytes 0.50.2); the base must stay what it is.
    """

    expands_on = "cpu"

    def __init__(self, linear: nn.Linear, weight: Tensor, statistics: dict[str, Tensor], compute: torch.dtype, device: torch.device, scratch: Scratch):
        """weight: packed uint8.  statistics: what goes with it, under the names of bitsandbytes' own state dict."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=compute, quant_type="nf4", device="meta")
        self.weight = bitsandbytes.nn.Params4bit.from_prequantized(weight, dict(statistics), device=device, module=self)
        self.bias = linear.bias
        self._scratch = scratch

    def expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight (out, in) in this format; valid until the next layer's is asked for."""
        state = self.weight.quant_state
        return expand_nf4(self.weight.data, state, self._scratch.take(state.shape, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != self.expands_on:
            return super().forward(x)
        return multiply(x, self.bias, self.expanded)

"""Frozen linear layers whose weight is quantised: bitsandbytes' own, as they work on a CPU too.

Apart from the layers that only cast, since whoever quantises nothing need not load the library (about 100 MiB).
"""

from __future__ import annotations

import bitsandbytes
import torch
from torch import Tensor, nn

from finetune.training.placement_linear import Scratch, multiply


class Int8Linear(bitsandbytes.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer, with a product of our own on a CPU.

    There the library's training product keeps every input outside of autograd's sight, so that checkpointing frees
    nothing, and its evaluation product rounds the input to 8 bits as well (bitsandbytes 0.50.2).
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, scales: Tensor, scratch: Scratch):
        """weight: (out, in) int8.  scales: (out,) float32, the largest absolute value of each row."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, device="meta")
        self.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
        self.bias = linear.bias
        self._scratch = scratch

    def _expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        weight = self._scratch.take(self.weight.shape, dtype, device).copy_(self.weight.data)
        return weight.mul_((scales / 127).to(dtype).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return super().forward(x)
        return multiply(x, self.bias, self._expanded)


def nf4_linear(linear: nn.Linear, weight: Tensor, statistics: dict[str, Tensor], compute: torch.dtype, device: torch.device) -> nn.Linear:
    """bitsandbytes' 4-bit layer from a weight that was quantised before.

    weight: packed uint8.  statistics: what goes with it, under the names of bitsandbytes' own state dict.
    """
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=compute,
                                       quant_type="nf4", device="meta")
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(weight, dict(statistics), device=device, module=layer)
    layer.bias = linear.bias
    # In evaluation the library would repack the weight in place for bf16 CPUs; the base must stay what it is.
    layer.support_avx512bf16_for_cpu = False
    return layer

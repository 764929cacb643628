"""Frozen linear layers whose weight is quantised: bitsandbytes' own, with products of our own.

The library's keep what checkpointing should free, or hand on float32 where autocast asks for 16 bits (bitsandbytes 0.50.2).
Here the weight is expanded for the time of one product in the computation's format, on every device alike.

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
    """bitsandbytes' 8-bit layer, of which the weight alone has 8 bits.

    The library's training product keeps every input outside of autograd's sight, so that checkpointing frees nothing. On a GPU, and
    in evaluation, it rounds the input to 8 bits as well, by way of float16, in which large activations are infinite.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, scales: Tensor, scratch: Scratch):
        """weight: (out, in) int8.  scales: (out,) float32, the largest absolute value of each row."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, device="meta")
        self.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
        self.bias = linear.bias
        self._scratch = scratch

    def expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight (out, in) in this format; valid until the next layer's is asked for."""
        weight = self._scratch.take(self.weight.shape, dtype, device).copy_(self.weight.data)
        # The scales stay float32: rounded to 16 bits, each would move its whole row.
        return weight.mul_((self.weight.SCB / 127).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.bias, self.expanded)


class Nf4Linear(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' 4-bit layer, which on a CPU expands its weight into the memory that all layers share.

    There the library expands every weight into memory of its own, and in evaluation repacks the weight in place for processors
    with bf16 products; the base must stay what it is. Its result has the input's format, float32 behind a norm under autocast.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, statistics: dict[str, Tensor], compute: torch.dtype, device: torch.device, scratch: Scratch):
        """weight: packed uint8.  statistics: what goes with it, under the names of bitsandbytes' own state dict."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=compute, quant_type="nf4", device="meta")
        self.weight = bitsandbytes.nn.Params4bit.from_prequantized(weight, dict(statistics), device=device, module=self)
        self.bias = linear.bias
        self._scratch = scratch

    def expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight (out, in) in this format; valid until the next layer's is asked for."""
        state = self.weight.quant_state
        if device.type != "cpu":  # a GPU has a kernel for it, and an allocator that keeps the memory at hand
            return bitsandbytes.functional.dequantize_4bit(self.weight.data, state).to(dtype)
        return expand_nf4(self.weight.data, state, self._scratch.take(state.shape, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.bias, self.expanded)

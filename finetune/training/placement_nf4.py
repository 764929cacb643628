"""NF4 on a CPU, quantised and expanded to the bits of bitsandbytes and several times as fast.

The library looks every number up by binary search (bitsandbytes 0.50.2), about 30 ns each. The level of a number is
also how many of the fifteen boundaries lie below it, and comparisons are vectorised: about 2 ns, so that writing the
result to disk takes longer than making it.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from finetune.training.quantiser_library import load_bitsandbytes

# Numbers that share one scale, as QLoRA has them, and scales that share one of the second level.
BLOCK, SCALES_BLOCK = 64, 256
# Numbers looked at in one go: small enough for the processor's cache.
PIECE = 1 << 18
TINIEST_SCALE = 1e-38


def _levels(scaled: numpy.ndarray, boundaries: list[float], found: numpy.ndarray, above: numpy.ndarray) -> numpy.ndarray:
    """How many boundaries lie below each number: its level, 0 to 15, as uint8 in `found`."""
    found.fill(0)
    for boundary in boundaries:
        numpy.greater(scaled, boundary, out=above)
        numpy.add(found, above.view(numpy.uint8), out=found)
    return found


def pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floating point of any shape, a multiple of `BLOCK` numbers -> packed (n / 2, 1) uint8 with the first of two numbers in the
    high half, and the largest absolute value of each block (n / BLOCK,) float32."""
    functional = load_bitsandbytes().functional

    levels = functional.get_4bit_type("nf4", device="cpu")
    boundaries = [numpy.float32(value) for value in ((levels[:-1] + levels[1:]) / 2).tolist()]
    flat = weight.reshape(-1)
    packed, scales = torch.empty(flat.numel() // 2, dtype=torch.uint8), torch.empty(flat.numel() // BLOCK)
    found, above = numpy.empty(PIECE, numpy.uint8), numpy.empty(PIECE, bool)
    for begin in range(0, flat.numel(), PIECE):
        blocks = flat[begin:begin + PIECE].float().view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / largest.clamp(min=TINIEST_SCALE)).unsqueeze(1)).clamp_(-1, 1).reshape(-1).numpy()
        pairs = _levels(scaled, boundaries, found[:len(scaled)], above[:len(scaled)]).reshape(-1, 2)
        packed[begin // 2:begin // 2 + len(pairs)] = torch.from_numpy((pairs[:, 0] << 4) | pairs[:, 1])
        scales[begin // BLOCK:begin // BLOCK + len(largest)] = largest
    return packed.unsqueeze(1), scales


def quantise_nf4(weight: Tensor) -> dict[str, Tensor]:
    """(out, in) -> named parts: "" is the packed weight, the others what bitsandbytes' own state dict has beside it."""
    functional = load_bitsandbytes().functional

    if weight.numel() % BLOCK or weight.device.type != "cpu":
        packed, state = functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    else:
        packed, scales = pack_nf4(weight)
        offset = scales.mean()
        small, second = functional.quantize_blockwise(scales - offset, blocksize=SCALES_BLOCK)
        state = functional.QuantState(absmax=small, shape=weight.shape, dtype=weight.dtype, blocksize=BLOCK, quant_type="nf4", offset=offset, state2=second,
                                      code=functional.get_4bit_type("nf4", device=weight.device))
    return {"": packed, **{name: value.clone() for name, value in state.as_dict(packed=True).items()}}


def expand_nf4(packed: Tensor, state: Any, target: Tensor) -> Tensor:
    """`target` (out, in), filled with what the library's `dequantize_4bit` gives for the packed weight on a CPU, to the bit.

    state: its `QuantState`. In pieces that stay in the processor's cache: the library takes new memory for every weight as a
    whole, and the pages of that cost more than the arithmetic.
    """
    functional = load_bitsandbytes().functional

    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    numbers, bytes_packed = target.view(-1), packed.view(-1, 1)
    for begin in range(0, len(numbers), PIECE):
        piece = numbers[begin : begin + PIECE]
        end = begin + len(piece)
        found = torch.ops.bitsandbytes.dequantize_4bit.default(
            bytes_packed[begin // 2 : (end + 1) // 2], scales[begin // state.blocksize : -(-end // state.blocksize)], state.blocksize, "nf4", (len(piece),), state.dtype)
        piece.copy_(found.view(-1))
    return target

"""How long a step takes on this machine: what it does, in products, attention, numbers moved and weights expanded, each at
the speed that a short probe has just found."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from finetune.adapters.products import product
from finetune.families.protocol import ModelShape
from finetune.training.placement import Hold
from finetune.training.placement_nf4 import expand_nf4
from finetune.training.plan_model import StepCost
from finetune.training.plan_tracing import trace
from finetune.training.quantiser_library import load_bitsandbytes

# Of each probe; there are six, and one more for weights that are expanded.
PROBE_SECONDS = 0.04
# Between two looks at the clock, at least.
LOOK_SECONDS = 0.002
# Tokens that attention is probed with at most, and numbers of the vectors and the weight of the other probes.
MOST_TOKENS, NUMBERS = 1024, 1 << 21


@dataclass(frozen=True)
class Speed:
    """products, attention: floating-point operations a second.  byte_seconds: of reading, changing and writing one byte of an
    activation.  fresh_seconds: of a byte of memory that the system has just given, beyond writing it.
    operation_seconds: of one call into the tensor library beside its arithmetic, with the modules and the graph around it.
    busy: how much longer the same takes on average than at its best; above 1 other programs hold the processor."""

    products: float
    attention: float
    byte_seconds: float
    busy: float
    fresh_seconds: float = 0.0
    operation_seconds: float = 0.0

    def step_seconds(self, cost: StepCost, checkpointed: int, held_numbers: int = 0, expand_seconds: float = 0.0) -> float:
        """Wall seconds of one pass forward and back. held_numbers: of weights that are expanded for every product, each of
        which takes expand_seconds."""
        again = 1 + cost.again_share(checkpointed)
        arithmetic = (cost.flops - cost.attention_flops) / self.products + cost.attention_flops / self.attention
        moved = cost.moved_bytes * self.byte_seconds + cost.fresh_bytes * self.fresh_seconds + cost.operations * self.operation_seconds
        # Once forward, once back, and once more where the forward pass is repeated.
        expanded = held_numbers * expand_seconds * (2 + 2 * cost.again_share(checkpointed))
        return (again * (arithmetic + moved) + expanded) * self.busy


class _Probe:
    """The best seconds of something, and over everything probed how much longer it took on average.

    On a CPU the seconds are those that the threads really ran: a product of a large model takes longer than the turn that a busy
    machine gives it, so that even the best of some has waited for others.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.taken, self.at_best = device, 0.0, 0.0
        self.threads = torch.get_num_threads()

    def _clock(self) -> float:
        return time.perf_counter() if self.device.type == "cuda" else time.process_time() / self.threads

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        repeats = self._repeats(work)
        best, times, began = float("inf"), 0, time.perf_counter()
        while time.perf_counter() - began < PROBE_SECONDS or not times:
            now = self._clock()
            for _ in range(repeats):
                work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            took = (self._clock() - now) / repeats
            if took <= 0:
                continue
            # The best of them: a slow one was interrupted by something else, which is told apart in `busy`.
            best, times = min(best, took), times + repeats
        self.taken, self.at_best = self.taken + time.perf_counter() - began, self.at_best + times * best
        return best

    def _repeats(self, work: Callable[[], object]) -> int:
        """How often something is done between two looks at the clock: that of processor time stands still now and then."""
        times, began = 0, time.perf_counter()
        while time.perf_counter() - began < LOOK_SECONDS or not times:
            work()
            times += 1
        return times

    @property
    def busy(self) -> float:
        return max(self.taken / max(self.at_best, 1e-9), 1.0)


def probe_speed(shape: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype) -> Speed:
    """Measure, with products and attention of the model's own size. tokens: of one batch."""
    probe = _Probe(device)
    rows, inside = min(max(tokens, 256), 4096), min(max(tokens, 64), MOST_TOKENS)
    left, right = (torch.ones(*size, dtype=dtype, device=device) for size in ((rows, shape.hidden_size), (shape.feed_forward_size, shape.hidden_size)))
    products = 2 * rows * right.numel() / probe.seconds(lambda: product(left, right))
    query = torch.ones(1, shape.heads, inside, shape.hidden_size // shape.heads, dtype=dtype, device=device, requires_grad=True)

    def attention() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(query, query, query).sum(), query)

    # Two products forward and four back, over all pairs of tokens.
    attending = 12 * inside * query.numel() / probe.seconds(attention)
    vector = torch.ones(NUMBERS, dtype=dtype, device=device)
    moving = probe.seconds(lambda: F.silu(vector)) / vector.nbytes
    fresh = _fresh_seconds(probe) if device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE") else 0.0
    return Speed(products, attending, moving, probe.busy, fresh, _operation_seconds(probe))


def _operation_seconds(probe: _Probe) -> float:
    """Of one operation of a step: layers that compute next to nothing, forward and back, counted as the step's are."""
    layers = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()))).requires_grad_(False).to(probe.device)
    x = torch.ones(1, 8, device=probe.device, requires_grad=True)

    def step() -> None:
        torch.autograd.grad(layers(x).sum(), x)

    return probe.seconds(step) / trace(step, []).operations


def _fresh_seconds(probe: _Probe) -> float:
    """Of one byte: writing to new pages, less writing to them again. The pages are private, as a heap's are: shared ones take
    half as long again."""

    def written() -> None:
        torch.frombuffer(mmap.mmap(-1, 4 * NUMBERS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.float32).fill_(1.0)

    known = torch.empty(NUMBERS)
    return max(probe.seconds(written) - probe.seconds(lambda: known.fill_(1.0)), 0.0) / known.nbytes


def probe_expansion(hold: Hold, device: torch.device) -> float:
    """Seconds of making one number of a weight that is held so ready for a product; 0 where it is used as it is."""
    return 0.0 if hold.storage == hold.compute else _Probe(device).seconds(_expansion(hold, device)) / NUMBERS


def _expansion(hold: Hold, device: torch.device) -> Callable[[], object]:
    """What happens to `NUMBERS` of a weight before it is multiplied."""
    target = torch.empty(NUMBERS // 1024, 1024, dtype=hold.compute, device=device)
    if hold.name == "nf4" and device.type == "cpu":
        packed, state = load_bitsandbytes().functional.quantize_4bit(target.fill_(1.0), compress_statistics=True, quant_type="nf4")
        return lambda: expand_nf4(packed, state, target)
    if hold.name in ("int8", "nf4"):
        small = torch.ones_like(target, dtype=torch.int8)
        return lambda: target.copy_(small).mul_(0.01)
    half = torch.ones_like(target, dtype=hold.storage or torch.bfloat16, device="cpu" if hold.name == "streamed" else device)
    return lambda: target.copy_(half)

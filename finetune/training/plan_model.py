"""What one transformer costs, from its configuration: weights by how they are held, the adapter, and what a step traced on
torch's meta device takes in memory and work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.families.example_text import example_conditioning
from finetune.families.protocol import ModelFamily, PictureGeometry
from finetune.objectives import NoiseLevel
from finetune.training.allocator import M_MMAP_THRESHOLD, Settings
from finetune.training.placement import QUANTISED, held_linears, may_quantise
from finetune.training.plan_allocator import heap_growth
from finetune.training.plan_kept import kept
from finetune.training.plan_mixed import AsAutocast, hold_in
from finetune.training.plan_tracing import Trace, trace

if TYPE_CHECKING:
    from finetune.adapters.kinds import AdapterSize

META = torch.device("meta")
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.516}
# Share of a step's work that a block's forward pass is: what computing it a second time adds.
FORWARD_SHARE = 0.5


@dataclass(frozen=True)
class StepCost:
    """Of one forward and backward pass; flops, attention_flops (of them), moved_bytes (all results together) and operations with
    nothing checkpointed. whole_bytes: most activations at once.  boundary_bytes: what a checkpointed block keeps.
    again_bytes: what is there beside that while one block is computed again.  traced: False where a formula stood in.
    fresh_bytes: of moved_bytes, those in tensors for which the heap asks the system every time.
    is_final: False where the heap did not answer, so that it is worth asking again."""

    flops: float
    attention_flops: float
    moved_bytes: float
    operations: float
    whole_bytes: float
    boundary_bytes: float
    again_bytes: float
    blocks: int
    traced: bool
    fresh_bytes: float = 0.0
    is_final: bool = True

    def activation_bytes(self, checkpointed: int) -> float:
        """Peak with that many blocks checkpointed, which are the first: those that are kept whole are gone in the backward
        pass before the first of the others is computed again."""
        checkpointed = min(checkpointed, self.blocks)
        whole = self.whole_bytes * (1 - checkpointed / max(self.blocks, 1))
        return checkpointed * self.boundary_bytes + (max(whole, self.again_bytes) if checkpointed else whole)

    def again_share(self, checkpointed: int) -> float:
        """What the second forward pass of checkpointed blocks adds, as a share of the step."""
        return FORWARD_SHARE * min(checkpointed, self.blocks) / max(self.blocks, 1)

    def work(self, checkpointed: int) -> float:
        """Floating-point operations, with the second forward pass of checkpointed blocks."""
        return self.flops * (1 + self.again_share(checkpointed))


def build_on_meta(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers model without memory."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        return getattr(diffusers, class_name).from_config(dict(config)).requires_grad_(False)


def weight_bytes(model: nn.Module, facts: Any, hold: str, compute_bytes: float, file_bytes: float, stay_in_file: bool = False) -> float:
    """Bytes of all parameters when held so. compute_bytes, file_bytes: of a number in the computation and in the file.
    stay_in_file: layers that are neither cast nor quantised wait in the mapped file, as they do on a CPU."""
    linears = {f"{name}.weight": name for name in held_linears(model, facts)}
    waiting = 0.0 if stay_in_file or hold == "streamed" else min(file_bytes, compute_bytes)
    total = 0.0
    for name, parameter in model.named_parameters():
        module = linears.get(name)
        if module is None:
            size = compute_bytes
        elif hold in QUANTISED:
            size = BYTES[hold] if may_quantise(module, facts) else waiting
        else:
            size = waiting if hold == "streamed" else BYTES[hold]
        total += parameter.numel() * size
    return total


def largest_linear(model: nn.Module) -> int:
    """Elements of the largest linear weight: what is expanded at once."""
    return max((module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)), default=0)


def adapter_parameters(model: nn.Module, targets: str, size: AdapterSize) -> int:
    """Trainable numbers of such an adapter on the layers that the pattern means. Raises AdapterError when it means none."""
    from finetune.adapters.kinds import parameter_count
    from finetune.adapters.lora import match_targets, weight_shapes

    shapes = weight_shapes(model)
    return sum(parameter_count(size.kind, rank, shapes[name]) for name, rank in size.ranks(match_targets(model, targets)).items())


@dataclass(frozen=True)
class Traced:
    """The step that is traced: of which family and configuration, how many of its blocks checkpointed. mixed: the format that autocast
    computes in; None: all in float32."""

    family: ModelFamily
    class_name: str
    targets: str
    adapter: AdapterSize
    batch: int
    size: tuple[int, int]
    checkpointed: bool
    mixed: torch.dtype | None = None


def one_step(wanted: Traced, config: Mapping[str, Any]) -> Trace:
    """Trace a step of the model of this configuration. peak_bytes: without the adapter's gradients, which are the kept_bytes."""
    from finetune.adapters.kinds import inject_adapter
    from finetune.adapters.lora import lora_parameters, match_targets

    family, size = wanted.family, wanted.size
    model = build_on_meta(wanted.class_name, config)
    # Without numbers a weight has no main directions.
    plain = replace(wanted.adapter, kind="lora") if wanted.adapter.kind == "pissa" else wanted.adapter
    inject_adapter(model, match_targets(model, wanted.targets), plain, seed=0)
    model.to(META)
    if wanted.mixed is not None:
        hold_in(model, wanted.mixed)
    shape = family.shape(config)
    family.prepare(model, sum(shape.blocks.values()) if wanted.checkpointed else 0)
    factor = shape.latent_factor
    noisy = torch.empty(wanted.batch, shape.latent_channels, size[0] // factor, size[1] // factor, device=META)
    conditioning = example_conditioning(family.facts.name, config, META)
    level = NoiseLevel(sigma=torch.full((wanted.batch,), 0.5), timestep=torch.full((wanted.batch,), 500.0))

    def step() -> None:
        with AsAutocast(wanted.mixed) if wanted.mixed is not None else nullcontext():
            loss = family.predict(model, noisy, level, [conditioning] * wanted.batch, [PictureGeometry(size, size)] * wanted.batch).pow(2).mean()
        loss.backward()

    found = trace(step, [*model.parameters(), *model.buffers(), noisy, *conditioning.tensors.values()])
    gradients = sum(parameter.numel() * 4 for _, parameter in lora_parameters(model) if parameter.grad is not None)
    return replace(found, peak_bytes=max(found.peak_bytes - gradients, 0), kept_bytes=gradients)


def _on_heap(found: Trace, heap: Settings | None) -> Trace:
    """With the peak that the C library's heap takes."""
    if heap is None:
        return found
    growth = heap_growth(found.events, heap)
    return replace(found, peak_bytes=max(growth - found.kept_bytes, 0)) if growth else replace(found, is_final=False)


def step_cost(family: ModelFamily, class_name: str, config: Mapping[str, Any], targets: str, adapter: AdapterSize, batch: int, size: tuple[int, int],
              compute_bytes: float, checkpointed: bool = True, heap: Settings | None = None, known: dict[tuple[int, bool, torch.dtype | None], Trace] | None = None,
              kept_in: Path | None = None, mixed: torch.dtype | None = None) -> StepCost:
    """Trace one training step of `batch` pictures of `size` (height, width) in pixels, at the model's real depth: how a heap
    fills is no straight line.

    checkpointed: whether anybody will ask for checkpointed blocks; it takes as long again.  heap: memory is what the C
    library's heap takes with these settings (a CPU); None: what is alive (a GPU).  known: traces of this model, which only
    their heap tells apart; what is traced here is added.  kept_in: folder of the encodings, beside which the cost is kept for the
    next run.  mixed: the format of autocast, where products are taken in it (a GPU): the step is traced in float32 and scaled, and
    once more under autocast for how much more that is.
    """
    wanted, known = Traced(family, class_name, targets, adapter, batch, size, False, mixed), {} if known is None else known
    parts = (family.facts.name, class_name, dict(config), targets, asdict(adapter), batch, size, compute_bytes, checkpointed, heap, str(mixed))
    return kept(kept_in, StepCost, parts, lambda: _traced_cost(wanted, config, compute_bytes, checkpointed, heap, known), lambda cost: cost.is_final)


def _traced_cost(wanted: Traced, config: Mapping[str, Any], compute_bytes: float, checkpointed: bool, heap: Settings | None,
                 known: dict[tuple[int, bool, torch.dtype | None], Trace]) -> StepCost:
    """As `step_cost`; wanted: with nothing checkpointed."""
    batch, size, shape = wanted.batch, wanted.size, wanted.family.shape(config)
    blocks = sum(shape.blocks.values())
    boundary = batch * (size[0] * size[1] * shape.tokens_per_pixel) * shape.hidden_size * compute_bytes
    scale, plain = compute_bytes / 4, replace(wanted, mixed=None)

    def traced(one: Traced) -> Trace:
        key = batch, one.checkpointed, one.mixed
        if key not in known:
            known[key] = one_step(one, config)
        return _on_heap(known[key], heap)

    try:
        whole = traced(plain)
        again = traced(replace(plain, checkpointed=True)) if checkpointed else replace(whole, peak_bytes=0)
        more = traced(wanted).peak_bytes / (whole.peak_bytes * scale) if wanted.mixed is not None else 1.0
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        # Some models look at values on their way, which the meta device has none of.
        return _by_formula(shape, batch, size, compute_bytes, boundary)
    return StepCost(whole.flops, whole.attention_flops, whole.moved_bytes * scale * more, whole.operations, whole.peak_bytes * scale * more, boundary,
                    max(again.peak_bytes * scale - blocks * boundary, 0.0) * more, blocks, True,
                    whole.bytes_in_large(dict(heap or ()).get(M_MMAP_THRESHOLD, math.inf)) * scale, whole.is_final and again.is_final)


def _by_formula(shape: Any, batch: int, size: tuple[int, int], compute_bytes: float, boundary: float) -> StepCost:
    """A transformer block of the usual build: 2x the forward products of a frozen base, and what their backward passes keep."""
    image = size[0] * size[1] * shape.tokens_per_pixel
    tokens, hidden, inner = image + shape.text_tokens, shape.hidden_size, shape.feed_forward_size
    blocks = sum(shape.blocks.values())
    attention = 4 * tokens * tokens * hidden
    forward = 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner) + attention
    kept = batch * tokens * (22 * hidden + 3 * inner) * compute_bytes
    return StepCost(2.0 * batch * blocks * forward, 3.0 * batch * blocks * attention, 3.0 * blocks * kept, 60.0 * blocks, 2 * boundary + blocks * kept, boundary,
                    kept + 2 * boundary, blocks, False)

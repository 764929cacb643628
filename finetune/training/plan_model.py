"""What one transformer costs, from its configuration: weights by how they are held, the adapter, activations, work.

Activations and work are traced on torch's meta device at two small depths and drawn out to the real one: blocks of a
kind are alike, so both grow in a straight line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.families.example_text import example_conditioning
from finetune.families.protocol import ModelFamily, PictureGeometry
from finetune.objectives import NoiseLevel
from finetune.training.placement import QUANTISED, held_linears, may_quantise
from finetune.training.plan_tracing import Trace, trace

if TYPE_CHECKING:
    from finetune.adapters.kinds import AdapterSize

DEPTH_KEYS = re.compile(r"(num|n)_(single_)?layers|depth(_single_blocks)?")
SHALLOW, DEEPER = 4, 6
META = torch.device("meta")
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.516}
# Share of a step's work that a block's forward pass is: what computing it a second time adds.
FORWARD_SHARE = 0.5


@dataclass(frozen=True)
class StepCost:
    """Of one forward and backward pass, nothing checkpointed. fixed_bytes: activations outside the blocks.
    block_bytes: kept by one block.  boundary_bytes: kept by a checkpointed one.  traced: False where a formula stood in."""

    flops: float
    operations: float
    fixed_bytes: float
    block_bytes: float
    boundary_bytes: float
    blocks: int
    traced: bool

    def activation_bytes(self, checkpointed: int) -> float:
        """Peak with that many blocks checkpointed. One block is always there whole while its gradient is taken."""
        checkpointed = min(checkpointed, self.blocks)
        whole = max(self.blocks - checkpointed, 1 if checkpointed else 0)
        return self.fixed_bytes + checkpointed * self.boundary_bytes + whole * self.block_bytes

    def work(self, checkpointed: int) -> float:
        """Floating-point operations, with the second forward pass of checkpointed blocks."""
        return self.flops * (1 + FORWARD_SHARE * min(checkpointed, self.blocks) / max(self.blocks, 1))


def build_on_meta(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers model without memory."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        return getattr(diffusers, class_name).from_config(dict(config)).requires_grad_(False)


def weight_bytes(model: nn.Module, facts: Any, hold: str, compute_bytes: float, file_bytes: float) -> float:
    """Bytes of all parameters when held so. compute_bytes, file_bytes: of a number in the computation and in the file."""
    linears = {f"{name}.weight": name for name in held_linears(model, facts)}
    total = 0.0
    for name, parameter in model.named_parameters():
        module = linears.get(name)
        if module is None:
            size = compute_bytes
        elif hold in QUANTISED:
            size = BYTES[hold] if may_quantise(module, facts) else file_bytes
        else:
            size = file_bytes if hold == "streamed" else BYTES[hold]
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


def _one_step(family: ModelFamily, class_name: str, config: Mapping[str, Any], targets: str, adapter: AdapterSize, batch: int,
              size: tuple[int, int]) -> Trace:
    from finetune.adapters.kinds import inject_adapter
    from finetune.adapters.lora import lora_parameters, match_targets

    model = build_on_meta(class_name, config)
    # Patterns may name blocks that this shallow model lacks; and without numbers a weight has no main directions.
    plain = replace(adapter, rank_pattern={}, alpha_pattern={}, kind="lora" if adapter.kind == "pissa" else adapter.kind)
    inject_adapter(model, match_targets(model, targets), plain, seed=0)
    model.to(META)
    family.prepare(model, 0)
    shape = family.shape(config)
    factor = shape.latent_factor
    noisy = torch.empty(batch, shape.latent_channels, size[0] // factor, size[1] // factor, device=META)
    conditioning = example_conditioning(family.facts.name, config, META)
    level = NoiseLevel(sigma=torch.full((batch,), 0.5), timestep=torch.full((batch,), 500.0))

    def step() -> None:
        family.predict(model, noisy, level, [conditioning] * batch, [PictureGeometry(size, size)] * batch).pow(2).mean().backward()

    found = trace(step, [*model.parameters(), *model.buffers(), noisy, *conditioning.tensors.values()])
    gradients = sum(parameter.numel() * 4 for _, parameter in lora_parameters(model) if parameter.grad is not None)
    return Trace(found.flops, max(found.peak_bytes - gradients, 0), 0, found.operations)


def step_cost(family: ModelFamily, class_name: str, config: Mapping[str, Any], targets: str, adapter: AdapterSize, batch: int, size: tuple[int, int],
              compute_bytes: float) -> StepCost:
    """Trace one training step of `batch` pictures of `size` (height, width) in pixels."""
    depths = {key: value for key, value in config.items() if isinstance(value, int) and DEPTH_KEYS.fullmatch(key) and value > DEEPER}
    shallow = {**config, **dict.fromkeys(depths, SHALLOW)}
    shape = family.shape(config)
    blocks = sum(shape.blocks.values())
    boundary = batch * (size[0] * size[1] * shape.tokens_per_pixel) * shape.hidden_size * compute_bytes
    scale = compute_bytes / 4
    try:
        base = _one_step(family, class_name, shallow, targets, adapter, batch, size)
        total = Trace(base.flops, base.peak_bytes, 0, base.operations)
        for key, depth in depths.items():
            deeper = _one_step(family, class_name, {**shallow, key: DEEPER}, targets, adapter, batch, size)
            more = (depth - SHALLOW) / (DEEPER - SHALLOW)
            total = Trace(total.flops + more * (deeper.flops - base.flops), total.peak_bytes + more * (deeper.peak_bytes - base.peak_bytes), 0,
                          total.operations + more * (deeper.operations - base.operations))
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        # Some models look at values on their way, which the meta device has none of.
        return _by_formula(shape, batch, size, compute_bytes, boundary)
    shallow_blocks = sum(family.shape(shallow).blocks.values())
    per_block = (total.peak_bytes - base.peak_bytes) / (blocks - shallow_blocks) if blocks > shallow_blocks else total.peak_bytes / max(blocks, 1)
    fixed = max(total.peak_bytes - blocks * per_block, 0)
    return StepCost(total.flops, total.operations, fixed * scale, per_block * scale, boundary, blocks, True)


def _by_formula(shape: Any, batch: int, size: tuple[int, int], compute_bytes: float, boundary: float) -> StepCost:
    """A transformer block of the usual build: 2x the forward products of a frozen base, and what their backward passes keep."""
    image = size[0] * size[1] * shape.tokens_per_pixel
    tokens, hidden, inner = image + shape.text_tokens, shape.hidden_size, shape.feed_forward_size
    blocks = sum(shape.blocks.values())
    forward = 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner) + 4 * tokens * tokens * hidden
    kept = batch * tokens * (22 * hidden + 3 * inner) * compute_bytes
    return StepCost(2.0 * batch * blocks * forward, 60.0 * blocks, 2 * boundary, kept, boundary, blocks, False)

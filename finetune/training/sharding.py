"""Spread the frozen base over several processes (FSDP2, or DeepSpeed's ZeRO-3), where accelerate's own configuration asks for it.

Only the base is divided. Every block is put together for the time of its computation and let go again; the adapter is small,
stays whole and the same in every process, and so optimizer, checkpoints and export are those of any other run. accelerate
reads the configuration and starts the processes; the dividing is torch's `fully_shard` or `sharding_zero3`, since accelerate's own
preparation hands the trained parameters out in pieces and works on GPUs only: under DeepSpeed without a GPU each process takes itself
for the only one (accelerate 1.15, DeepSpeed 0.19.8).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.errors import BadInput
from finetune.families.loading import ADAPTER_MARKS
from finetune.recipe_shelf import shelf_folder
from finetune.training.placement import check_suits

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    from finetune.families.protocol import FamilyFacts
    from finetune.recipe import Recipe
    from finetune.training.placement import Hold

CONFIGURATION, DEEPSPEED_CONFIGURATION = "accelerate/fsdp.yaml", "accelerate/deepspeed.yaml"
FSDP2, ZERO3 = "FSDP2", "ZeRO-3"


@dataclass(frozen=True)
class Sharding:
    """processes: over how many.  reshard_after_forward: gather a block again for the backward pass instead of keeping it.
    offload: keep the pieces in host memory.  by: FSDP2 or ZERO3."""

    processes: int
    reshard_after_forward: bool
    offload: bool
    by: str = FSDP2


def _asked(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def check_launch() -> None:
    """Raise BadInput for ways of starting that would not do what they promise. To be asked before accelerate is."""
    if _asked("DEEPSPEED"):
        _check_deepspeed()
    if _asked("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadInput("FSDP 1 flattens frozen and trained weights into one", where="accelerate's configuration: fsdp_version",
                       fix=f"set fsdp_version: 2, as {shelf_folder() / CONFIGURATION} does")


def _check_deepspeed() -> None:
    where = "accelerate's configuration"
    asked = _deepspeed_settings()
    if asked.zero_stage != 3:
        raise BadInput(
            f"ZeRO-{asked.zero_stage} does not divide the base: of gradients and optimizer state, which it may divide, an adapter has a few MiB", where=where,
            fix=f"set zero_stage: 3, as {shelf_folder() / DEEPSPEED_CONFIGURATION} does, or start without DeepSpeed where the base fits each card")
    if asked.offload_param_device not in (None, "none", "cpu"):
        raise BadInput(f"pieces of the base are not kept on {asked.offload_param_device}", where=f"{where}: offload_param_device", fix="set it to none or cpu")
    if importlib.util.find_spec("deepspeed") is None:
        raise BadInput("DeepSpeed is not installed", where=where,
                       fix=f'pip install -c constraints.txt ".[deepspeed]", or start with {shelf_folder() / CONFIGURATION}, which needs nothing more')


def _deepspeed_settings() -> DeepSpeedPlugin:
    """What `accelerate launch` was told, or what the file says that it was told to read."""
    from accelerate.utils import DeepSpeedPlugin

    try:
        return DeepSpeedPlugin()
    except (ValueError, OSError, AttributeError, TypeError) as problem:
        # Besides what is said of a file that is missing or no JSON, whatever comes of one with another content.
        raise BadInput(f"DeepSpeed's settings cannot be read: {problem}", where="accelerate's configuration: deepspeed_config_file") from None


@contextmanager
def without_engine() -> Iterator[None]:
    """An `Accelerator` that is made here leaves optimizer and backward pass as they are, although DeepSpeed is asked for."""
    from accelerate.utils import patch_environment

    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
        yield


def check_divisible(hold: Hold) -> None:
    """Raise BadInput for weights in another format than that of the products: what is divided is gathered as it is, and never converted."""
    if hold.storage != hold.compute:
        raise BadInput(f"a base held as {hold.name} and computed in {str(hold.compute).removeprefix('torch.')} cannot be divided over processes", where="base.hold",
                       fix="leave base.hold and base.dtype on auto, or start without dividing the base")


def wanted_sharding(accelerator: Accelerator, recipe: Recipe, facts: FamilyFacts, hold: Hold) -> Sharding | None:
    """What accelerate's configuration asks for; None when it asks for nothing, or there is nobody to share with.

    Raises BadInput for settings under which pieces cannot be put together, or processes would wait for each other for ever.
    """
    by = ZERO3 if _asked("DEEPSPEED") else FSDP2 if _asked("FSDP") else None
    if by is None or accelerator.num_processes == 1:
        return None
    check_divisible(hold)
    if accelerator.mixed_precision == "fp16":
        raise BadInput("fp16 with its loss scaler is not used with a base that is divided", where="training.precision", fix="use bf16 or fp32")
    if facts.equal_text_lengths and recipe.training.batch_size > 1:
        raise BadInput(f"this family predicts a batch in groups of equal text length, and under {by} all processes must compute equally often",
                       where="training.batch_size", fix="set training.batch_size = 1 and raise training.accumulation")
    check_suits(recipe.adapter.kind, proof_hold(hold), accelerator.device)
    if by == ZERO3:
        return Sharding(accelerator.num_processes, reshard_after_forward=True, offload=_deepspeed_settings().offload_param_device == "cpu", by=by)
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()  # reads what `accelerate launch` was told
    return Sharding(accelerator.num_processes, bool(plugin.reshard_after_forward), os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")


def proof_hold(hold: Hold) -> Hold:
    """How the main process holds the whole base while it proves the adapter alone: streamed, since it may not fit otherwise."""
    return replace(hold, name="streamed", reason="the proof is made in one process, where the whole base may not fit")


def shard_units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the members of the model's own lists of blocks."""
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]


def divided_bytes(model: nn.Module, sharding: Sharding, bytes_per_number: float) -> float:
    """What one process keeps of the base `model` (which may be on the meta device), and what it puts together at a time: what
    lies outside the blocks, and the largest block with the next one that is fetched meanwhile; all blocks, where they stay
    together until the backward pass. ZeRO-3 as used here takes no more: it fetches nothing ahead."""
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in shard_units(model)]
    whole = sum(parameter.numel() for parameter in model.parameters())
    together = 2 * max(blocks, default=0) if sharding.reshard_after_forward else sum(blocks)
    kept = 0 if sharding.offload else whole / sharding.processes
    return bytes_per_number * (kept + whole - sum(blocks) + min(together, sum(blocks)))


def shard_base(model: nn.Module, sharding: Sharding, device: torch.device) -> int:
    """Divide every parameter of the base of `model`, in place; an adapter's stay whole, on `device`. Returns how many numbers of the
    base this process keeps.

    Every later forward must be made by all processes, equally often. Call it when nothing will be added to the model any more.
    """
    # What an adapter started from is frozen too, but it is the adapter's, and goes into its file.
    trained = {parameter for name, parameter in model.named_parameters() if parameter.requires_grad or any(mark in name for mark in ADAPTER_MARKS)}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    if sharding.by == ZERO3:
        from finetune.training.sharding_zero3 import divide_blocks

        return divide_blocks(model, shard_units(model), trained, sharding.offload, device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (sharding.processes,)), "ignored_params": trained,
        "offload_policy": CPUOffloadPolicy() if sharding.offload and device.type != "cpu" else OffloadPolicy(),
    }
    for block in shard_units(model):
        fully_shard(block, reshard_after_forward=sharding.reshard_after_forward, **settings)
    fully_shard(model, **settings)
    return sum(parameter.to_local().numel() for parameter in model.parameters() if parameter not in trained)

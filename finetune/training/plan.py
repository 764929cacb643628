"""What a run will need, before anything is loaded: memory by part, work and time of a step, disk. And the truth beside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_tools.progress import Progress
from finetune.families.example_text import conditioning_bytes
from finetune.families.targets import resolve_targets
from finetune.recipe import Recipe
from finetune.training import plan_extras, plan_model, plan_phases
from finetune.training.adapter_size import adapter_size
from finetune.training.byte_sizes import size_in_bytes
from finetune.training.data_sources import FolderScans
from finetune.training.encoding_cache import MEMORY_BYTES, default_cache_folder
from finetune.training.loop_state import copies_of_weights
from finetune.training.optimizers import choose_optimizer
from finetune.training.placement import QUANTISED, Hold, choose_hold, pinned_bytes
from finetune.training.plan_ground import Ground, available_bytes, survey
from finetune.training.precision import choose_base_dtype, choose_precision
from finetune.training.sharding import Sharding, check_divisible, divided_bytes, proof_hold

# Bytes of optimizer state for one trainable number.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "paged_adamw8bit": 2.1, "adafactor": 0.1, "lion8bit": 1.05}
# Freed memory that the allocator keeps between the parts of a step, as a share of the activations. A CPU's heap is asked
# itself (`plan_allocator`); a formula knows nothing of it; a GPU's allocator rounds sizes, and was not measured.
FRAGMENTS = {"cpu": 0.0, "formula": 1.0, "cuda": 0.1}
# Wall seconds for one of work above which a plan says that it was made on a busy machine.
BUSY = 1.3


@dataclass(frozen=True)
class Saving:
    """One setting that was changed to fit, what it saves and what it costs."""

    setting: str
    value: Any
    saves_bytes: int
    costs: str


@dataclass(frozen=True)
class Plan:
    """memory_bytes: by part of training, with the autoencoder and the phase of the text encoders beside it; `peak` is the largest of
    the phases.  peak_parts_bytes: what is there at the peak, which is their sum.  settings: what the run will use where a recipe says "auto".
    budget_bytes: memory that it may take.  flops_per_step: with accumulation.  notes: what a reader must know.
    host_bytes, host_budget_bytes: of weights that wait in pinned host memory for a GPU, and what there is for them."""

    device: str
    parameters: int
    trainable: int
    memory_bytes: dict[str, int]
    phases_bytes: dict[str, int]
    peak_parts_bytes: dict[str, int]
    budget_bytes: int
    flops_per_step: float
    seconds_per_step: float
    disk_bytes: dict[str, int]
    settings: dict[str, Any]
    savings: list[Saving] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    host_bytes: int = 0
    host_budget_bytes: int = 0

    @property
    def fits_device(self) -> bool:
        return self.memory_bytes["peak"] <= self.budget_bytes

    @property
    def fits_host(self) -> bool:
        return self.host_bytes <= self.host_budget_bytes

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    def as_json(self) -> dict[str, Any]:
        """Plain values; the keys that `brushwork plan --json` prints and `plan.json` holds."""
        return {"fits": self.fits} | {key: value for key, value in vars(self).items() if key != "savings"} | {"savings": [vars(saving) for saving in self.savings]}


def estimate(ground: Ground, recipe: Recipe, hold: Hold, checkpointed: int, budget: int, encoded: bool = False) -> Plan:
    """The plan for these settings. encoded: as if everything were in the cache, so that no encoder will be loaded."""
    facts, device, around = ground.base.family.facts, ground.device, ground.surroundings
    compute_bytes, vae_bytes = float(torch.finfo(hold.compute).bits // 8), around.vae_bytes(hold.compute)
    cost = ground.cost(recipe, hold, checkpointed > 0)
    trainable = plan_model.adapter_parameters(ground.model, resolve_targets(facts, recipe.adapter.targets), adapter_size(recipe))
    if recipe.adapter.text_encoders:
        trainable += sum(recipe.adapter.rank * sum(shape) for shape in around.live_layers)
    optimizer = choose_optimizer(recipe.training.optimizer, device).name
    whole, shared = ground.weight_bytes(hold), ground.sharding
    weights = whole if shared is None else divided_bytes(ground.model, shared, compute_bytes)
    proof_as = hold if shared is None else proof_hold(hold)
    activations = cost.activation_bytes(checkpointed) * (1 + FRAGMENTS[device.type if cost.traced else "formula"])
    workspace = plan_model.largest_linear(ground.model) * compute_bytes if hold.name != "fp32" else 0
    parts = {
        "libraries": ground.library_bytes(hold, optimizer), "weights": weights, "autoencoder": around.vae_parameters * vae_bytes, "adapter": trainable * 4,
        "gradients": trainable * 4, "optimizer": trainable * OPTIMIZER_BYTES[optimizer], "activations": activations + workspace,
        "encodings": min(_encodings_bytes(ground), MEMORY_BYTES) if device.type == "cpu" else 0,
    } | plan_extras.weight_copies(recipe, trainable * 4, ground.held_out)
    if device.type == "cpu":
        # The bytes of its files are copies, beside what the heap keeps of the activations; on a GPU they lie in host memory.
        parts["checkpoint"] = parts["adapter"] + parts["optimizer"]
    text_bytes = plan_model.BYTES[choose_base_dtype(recipe.base.dtype, choose_precision(recipe.training.precision, device)).name]
    if recipe.adapter.text_encoders:
        parts["text encoders"] = around.live_parameters * text_bytes
    encoded = encoded or ground.encoded
    # The autoencoder is there while pictures are encoded or drawn; what those import stays.
    later = {plan_phases.LATER: around.later_bytes}
    training = {name: size for name, size in parts.items() if name != "autoencoder"} | (later if recipe.samples.every or not encoded else {})
    phases = {"training": training} | around.phases({name: parts[name] for name in ("libraries", "weights", "adapter")}, text_bytes, vae_bytes, encoded)
    if recipe.samples.every:
        # On the way: where activations and gradients were.
        without = {name: size for name, size in training.items() if name not in ("activations", "gradients")}
        phases["drawing samples"] = without | {name: phases["drawing samples"][name] for name in ("autoencoder", "decoding")}
    passing = device.type == "cuda" and sum(phases.get("encoding captions", {}).values()) > budget
    if passing:
        phases["encoding captions"] = {"text encoders": budget}  # `place_encoders`
    # The trained adapter and its moments are still there, beside the file's own copy and the one that was put into the fresh base.
    phases["proof"] = {name: parts[name] for name in ("libraries", "autoencoder", "encodings", "optimizer")} | later | {
        "weights": ground.weight_bytes(proof_as), "adapter": 3 * parts["adapter"], "baking": plan_phases.proof_bytes(ground.model, facts, proof_as, recipe, around)}
    whole_phases = {phase: {name: int(size) for name, size in its.items() if size} for phase, its in phases.items()}
    totals = {phase: sum(its.values()) for phase, its in whole_phases.items()}
    memory = {name: int(size) for name, size in (parts | training).items()} | {"encoders": totals.get("encoding captions", 0), "peak": max(totals.values())}
    work = cost.work(checkpointed) * recipe.training.accumulation * ground.usual_share
    pinned = pinned_bytes(ground.model, facts, hold, device, around.file_bytes)
    seconds = recipe.training.accumulation * ground.step_seconds(cost, hold, recipe.training.batch_size, checkpointed) * ground.usual_share
    return Plan(device.type, sum(parameter.numel() for parameter in ground.model.parameters()), trainable, memory,
                totals, whole_phases[max(totals, key=totals.get)], int(budget), work, seconds, _disk(ground, recipe, trainable, optimizer, hold),
                {"hold": hold.name, "checkpointed_blocks": min(checkpointed, cost.blocks), "blocks": cost.blocks, "batch_size": recipe.training.batch_size,
                 "accumulation": recipe.training.accumulation, "optimizer": optimizer, "kind": recipe.adapter.kind, "rank": recipe.adapter.rank, "sizes": [list(size) for size in ground.sizes]},
                notes=_notes(ground, recipe, cost.traced, seconds, whole, passing), host_bytes=pinned, host_budget_bytes=available_bytes(torch.device("cpu")) if pinned else 0)


def _notes(ground: Ground, recipe: Recipe, traced: bool, seconds: float, whole: float, passing: bool) -> list[str]:
    """What a reader must know. whole: bytes of the base's weights in one place.  passing: whether encoders do not fit the GPU."""
    notes = [] if traced else ["activations are from a general formula: this family's model cannot be traced"]
    if ground.sharding is not None:
        notes.append(plan_extras.divided_note(ground.sharding, whole))
    notes += plan_extras.time_notes(recipe, seconds, ground.held_out)
    if recipe.adapter.text_encoders:
        notes.append("the trained text encoders stay in memory beside the transformer, and captions pass through them at every step (time not counted)")
    if ground.speed.busy > BUSY:
        notes.append(f"other programs use this machine now: steps take {ground.speed.busy:.1f} times as long as on a quiet one, which seconds_per_step counts in")
    if ground.to_draw:
        passes = ground.to_draw * recipe.samples.steps * (2 if recipe.samples.guidance > 1 else 1)
        # Half of a step is its forward pass; the pictures are drawn at the largest size.
        drawing = passes * seconds / ground.usual_share / (2 * recipe.training.batch_size * recipe.training.accumulation)
        notes.append(f"{ground.to_draw} regularisation pictures are drawn before training: about {drawing:.0f} s")
    if passing:
        notes.append("the text encoders do not fit: the weights of the largest wait in ordinary memory and come one by one, once for every caption")
    if ground.device.type == "cuda":
        notes.append("memory of the GPU, without its driver's own; not measured")
    return notes


def _encodings_bytes(ground: Ground) -> int:
    """Of all latents and captions."""
    shape = ground.base.family.shape(ground.config)
    latents = 2 * 4 * shape.latent_channels * ground.pixels / shape.latent_factor**2
    return int(latents + max(ground.captions, 1) * conditioning_bytes(ground.base.family.facts.name, ground.config))


def _disk(ground: Ground, recipe: Recipe, trainable: int, optimizer: str, hold: Hold) -> dict[str, int]:
    """Bytes that the run will add to the cache and to its folder."""
    checkpoint = trainable * (4 + 4 + OPTIMIZER_BYTES[optimizer] + 4 * copies_of_weights(recipe, ground.held_out > 0))
    found = {"cache": _encodings_bytes(ground), "checkpoints": checkpoint * recipe.training.keep_checkpoints, "adapter": trainable * 4,
             "quantised_base": plan_model.weight_bytes(ground.model, ground.base.family.facts, hold.name, 0, 0) if hold.name in QUANTISED else 0}
    return {name: int(size) for name, size in found.items()} | {"total": int(sum(found.values()))}


def fewest_checkpoints(ground: Ground, recipe: Recipe, hold: Hold, budget: int, encoded: bool = False, least: int | None = None) -> Plan:
    """The plan with as few checkpointed blocks as fit, or with all when none is few enough. A number in the recipe is kept, unless
    `least` says how many there must be at any rate."""
    wanted = recipe.training.checkpointed_blocks
    if wanted != "auto" and least is None:
        return estimate(ground, recipe, hold, wanted, budget, encoded)
    fewest = estimate(ground, recipe, hold, least or 0, budget, encoded)
    low, high = fewest.settings["checkpointed_blocks"] + 1, fewest.settings["blocks"]
    if fewest.fits or low > high:
        return fewest
    while low < high:
        middle = (low + high) // 2
        if estimate(ground, recipe, hold, middle, budget, encoded).fits:
            high = middle
        else:
            low = middle + 1
    return estimate(ground, recipe, hold, low, budget, encoded)


def resolved_hold(recipe: Recipe, device: torch.device) -> Hold:
    precision = choose_precision(recipe.training.precision, device)
    return choose_hold(recipe.base.hold, choose_base_dtype(recipe.base.dtype, precision), precision)


def plan(recipe: Recipe, *, fit: str | int | None = None, fixed: Collection[str] = (), processes: int = 1, cache_folder: Path | None = None, progress: Progress | None = None,
         scans: FolderScans | None = None) -> Plan:
    """What this recipe needs on this machine, without encoding what the cache holds already. fit: "12GB" or bytes chooses settings that fit it and says what each saving costs.
    fixed: settings, as "section.key", that are not to be changed for that.  processes: between which the base is divided, as
    recipes/accelerate/fsdp.yaml does it; memory is then that of one.  cache_folder: of the encodings, beside which traces are kept;
    None: the user's.  scans: what was seen of the pictures' folders already.

    Raises BaseModelError, DataError, AdapterError and BadInput as training would.
    """
    from finetune.training.plan_fit import fitted

    sharding = Sharding(processes, reshard_after_forward=True, offload=False) if processes > 1 else None
    ground = survey(recipe, progress=progress, sharding=sharding, kept_in=cache_folder or default_cache_folder(), scans=scans)
    if sharding is not None:
        check_divisible(resolved_hold(recipe, ground.device))
    if fit is not None:
        return fitted(ground, recipe, size_in_bytes(fit) if isinstance(fit, str) else fit, fixed)
    return fewest_checkpoints(ground, recipe, resolved_hold(recipe, ground.device), available_bytes(ground.device))

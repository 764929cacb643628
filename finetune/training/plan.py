"""What a run will need, before anything is loaded: memory by part, work and time of a step, disk. And the truth beside it."""

from __future__ import annotations

import json
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
from finetune.training.allocator import heap_settings
from finetune.training.encoding_cache import MEMORY_BYTES
from finetune.training.loop_state import copies_of_weights
from finetune.training.optimizers import choose_optimizer
from finetune.training.placement import QUANTISED, Hold, choose_hold, held_linears, memory_is_short
from finetune.training.plan_speed import Speed, probe_expansion, probe_speed
from finetune.training.plan_tracing import Trace
from finetune.training.precision import choose_base_dtype, choose_precision
from finetune.training.preloading import import_libraries
from finetune.training.regularisation import requests_of
from finetune.training.sharding import Sharding, check_divisible, divided_bytes, proof_hold
from finetune.training.training_set import resolutions_of

# Bytes of optimizer state for one trainable number.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "paged_adamw8bit": 2.1, "adafactor": 0.1, "lion8bit": 1.05}
# Freed memory that the allocator keeps between the parts of a step, as a share of the activations. A CPU's heap is asked
# itself (`plan_allocator`); a formula knows nothing of it; a GPU's allocator rounds sizes, and was not measured.
FRAGMENTS = {"cpu": 0.0, "formula": 1.0, "cuda": 0.1}
GIB = 1 << 30
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
    """memory_bytes: by part, `peak` is the largest of the phases.  settings: what the run will use where a recipe says "auto".
    budget_bytes: memory that it may take.  flops_per_step: with accumulation.  notes: what a reader must know."""

    device: str
    parameters: int
    trainable: int
    memory_bytes: dict[str, int]
    phases_bytes: dict[str, int]
    budget_bytes: int
    flops_per_step: float
    seconds_per_step: float
    disk_bytes: dict[str, int]
    settings: dict[str, Any]
    savings: list[Saving] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory_bytes["peak"] <= self.budget_bytes

    def as_json(self) -> dict[str, Any]:
        """Plain values; the keys that `brushwork plan --json` prints and `plan.json` holds."""
        return {"fits": self.fits} | {key: value for key, value in vars(self).items() if key != "savings"} | {"savings": [vars(saving) for saving in self.savings]}


@dataclass
class Ground:
    """What does not change while settings are tried: base, sizes, traced costs by batch size.

    pixels: of all pictures, each at every size that it is trained at.  usual_share: pixels of the mean use of a picture, as a
    share of those of the largest size.  to_draw: regularisation pictures that the base draws before training.
    sharding: how the base is divided between processes; the plan is then of one of them.
    """

    recipe: Recipe
    base: Any
    device: torch.device
    sizes: list[tuple[int, int]]
    pixels: int
    usual_share: float
    to_draw: int
    captions: int
    surroundings: plan_phases.Surroundings
    model: torch.nn.Module
    config: dict[str, Any]
    held_out: int = 0
    sharding: Sharding | None = None
    costs: dict[tuple[int, bool, bool], plan_model.StepCost] = field(default_factory=dict)
    traces: dict[tuple[int, bool], Trace] = field(default_factory=dict)
    speed: Speed | None = None
    expansions: dict[str, float] = field(default_factory=dict)
    quantiser: int | None = None
    kept_in: Path | None = None

    def library_bytes(self, hold: Hold, optimizer: str) -> int:
        """Of a run with this hold and optimizer; the library of quantised numbers is only loaded where it is needed."""
        if self.device.type != "cpu" or not (hold.name in QUANTISED or optimizer.endswith("8bit")):
            return self.surroundings.library_bytes
        if self.quantiser is None:
            self.quantiser = plan_phases.quantiser_bytes()
        return self.surroundings.library_bytes + self.quantiser

    def weight_bytes(self, hold: Hold) -> float:
        """Of all weights of the base in one process."""
        compute_bytes = float(torch.finfo(hold.compute).bits // 8)
        return plan_model.weight_bytes(self.model, self.base.family.facts, hold.name, compute_bytes, self.surroundings.file_bytes, stay_in_file=self.device.type == "cpu")

    def step_seconds(self, cost: plan_model.StepCost, hold: Hold, batch: int, checkpointed: int) -> float:
        """Of one forward and backward pass. The machine is probed once, and once more for each way to hold the weights."""
        if self.speed is None:
            shape = self.base.family.shape(self.config)
            tokens = int(batch * max(height * width for height, width in self.sizes) * shape.tokens_per_pixel)
            self.speed = probe_speed(shape, tokens, self.device, hold.compute)
        if hold.name not in self.expansions:
            self.expansions[hold.name] = probe_expansion(hold, self.device)
        held = sum(linear.weight.numel() for linear in held_linears(self.model, self.base.family.facts).values())
        return self.speed.step_seconds(cost, checkpointed, held, self.expansions[hold.name])

    def cost(self, recipe: Recipe, hold: Hold, checkpointed: bool) -> plan_model.StepCost:
        """Traced once for a batch size, and once more where blocks are checkpointed."""
        batch, short = recipe.training.batch_size, memory_is_short(hold)
        if (batch, checkpointed, short) not in self.costs:
            largest = max(self.sizes, key=lambda size: size[0] * size[1])
            targets = resolve_targets(self.base.family.facts, recipe.adapter.targets)
            heap = heap_settings(short) if self.device.type == "cpu" else None
            self.costs[batch, checkpointed, short] = plan_model.step_cost(
                self.base.family, self.config["_class_name"], self.config, targets, adapter_size(recipe), batch, largest,
                float(torch.finfo(hold.compute).bits // 8), checkpointed, heap, self.traces, self.kept_in)
        return self.costs[batch, checkpointed, short]


def available_bytes(device: torch.device) -> int:
    """Memory that a run could take now: free on the GPU, or what this process has and could still get."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def survey(recipe: Recipe, training_set: Any = None, progress: Progress | None = None, sharding: Sharding | None = None,
           kept_in: Path | None = None) -> Ground:
    """Read configurations, picture sizes and the libraries' own size. training_set: where it is known already. kept_in: see `plan_kept`."""
    from finetune.families.base_models import locate_base

    base = locate_base(recipe.base.model, recipe.base.revision, parts=())
    facts = base.family.facts
    import_libraries(base.folder)
    if training_set is None and recipe.data.folder is not None:
        from finetune.training.training_set import build_training_set

        training_set = build_training_set(recipe, facts, progress or Progress())
    to_draw = len(requests_of(recipe, facts)) if training_set is None or not any(picture.regularisation for picture in training_set.pictures) else 0
    edge = max(resolutions_of(recipe, facts)) // facts.size_multiple * facts.size_multiple
    sizes, pixels, usual_share, captions = [(edge, edge)], to_draw * edge**2, 1.0, 0
    if training_set is not None:
        buckets = [picture.placement.bucket for picture in training_set.pictures]
        sizes = sorted({(bucket.height, bucket.width) for bucket in buckets})
        pixels += sum(bucket.height * bucket.width for bucket in buckets)
        usual_share, captions = _usual_share(training_set), len(set(training_set.captions.every_caption()))
    config = json.loads((base.folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = plan_model.build_on_meta(config["_class_name"], config)
    held_out = len(training_set.held_out) if training_set is not None else 0
    return Ground(recipe, base, device, sizes, pixels, usual_share, to_draw, captions, plan_phases.surroundings(base, sizes, device, kept_in), model, config, held_out, sharding, kept_in=kept_in)


def _usual_share(training_set: Any) -> float:
    """Own and regularisation pictures are used equally often in all; within their kind by their repeats."""
    shares = []
    largest = max(picture.placement.bucket.height * picture.placement.bucket.width for picture in training_set.pictures)
    for kind in (False, True):
        uses = [(picture.placement.bucket.height * picture.placement.bucket.width, picture.repeats) for picture in training_set.pictures if picture.regularisation == kind]
        if uses:
            shares.append(sum(area * repeats for area, repeats in uses) / sum(repeats for _, repeats in uses) / largest)
    return sum(shares) / len(shares)


def estimate(ground: Ground, recipe: Recipe, hold: Hold, checkpointed: int, budget: int, encoded: bool = False) -> Plan:
    """The plan for these settings. encoded: everything is in the cache, so that no encoder will be loaded."""
    facts, device, around = ground.base.family.facts, ground.device, ground.surroundings
    compute_bytes = float(torch.finfo(hold.compute).bits // 8)
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
        "libraries": ground.library_bytes(hold, optimizer), "weights": weights, "autoencoder": around.vae_parameters * compute_bytes, "adapter": trainable * 4,
        "gradients": trainable * 4, "optimizer": trainable * OPTIMIZER_BYTES[optimizer], "activations": activations + workspace,
        "encodings": min(_encodings_bytes(ground), MEMORY_BYTES) if device.type == "cpu" else 0,
    } | plan_extras.weight_copies(recipe, trainable * 4, ground.held_out)
    text_bytes = plan_model.BYTES[choose_base_dtype(recipe.base.dtype, choose_precision(recipe.training.precision, device)).name]
    if recipe.adapter.text_encoders:
        parts["text encoders"] = around.live_parameters * text_bytes
    phases = {"training": sum(parts.values())} | around.phases(weights + trainable * 4 + parts["libraries"] - around.library_bytes, text_bytes, compute_bytes, encoded)
    # The trained adapter and its moments are still there, beside the file's own copy and the one that was put into the fresh base.
    adapters = 2 * parts["adapter"] + parts["adapter"] + parts["optimizer"]
    phases["proof"] = around.later_bytes + sum(parts[name] for name in ("libraries", "autoencoder", "encodings")) + ground.weight_bytes(proof_as) + adapters + plan_phases.proof_bytes(
        ground.model, facts, proof_as, recipe, around)
    memory = {name: int(size) for name, size in parts.items()} | {"encoders": int(phases.get("encoding captions", 0)), "peak": int(max(phases.values()))}
    work = cost.work(checkpointed) * recipe.training.accumulation * ground.usual_share
    seconds = recipe.training.accumulation * ground.step_seconds(cost, hold, recipe.training.batch_size, checkpointed) * ground.usual_share
    notes = [] if cost.traced else ["activations are from a general formula: this family's model cannot be traced"]
    if shared is not None:
        notes.append(plan_extras.divided_note(shared, whole))
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
    if device.type == "cuda":
        notes.append("memory of the GPU, without its driver's own; not measured")
    return Plan(device.type, sum(parameter.numel() for parameter in ground.model.parameters()), trainable, memory,
                {name: int(size) for name, size in phases.items()}, int(budget), work, seconds, _disk(ground, recipe, trainable, optimizer, hold),
                {"hold": hold.name, "checkpointed_blocks": min(checkpointed, cost.blocks), "blocks": cost.blocks, "batch_size": recipe.training.batch_size,
                 "accumulation": recipe.training.accumulation, "optimizer": optimizer, "kind": recipe.adapter.kind, "rank": recipe.adapter.rank, "sizes": [list(size) for size in ground.sizes]},
                notes=notes)


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


def plan(recipe: Recipe, *, fit: str | int | None = None, fixed: Collection[str] = (), processes: int = 1, progress: Progress | None = None) -> Plan:
    """What this recipe needs on this machine. fit: "12GB" or bytes chooses settings that fit it and says what each saving costs.
    fixed: settings, as "section.key", that are not to be changed for that.  processes: between which the base is divided, as
    recipes/accelerate/fsdp.yaml does it; memory is then that of one.

    Raises BaseModelError, DataError, AdapterError and BadInput as training would.
    """
    from finetune.training.plan_fit import fitted, size_in_bytes

    sharding = Sharding(processes, reshard_after_forward=True, offload=False) if processes > 1 else None
    ground = survey(recipe, progress=progress, sharding=sharding)
    if sharding is not None:
        check_divisible(resolved_hold(recipe, ground.device))
    if fit is not None:
        return fitted(ground, recipe, size_in_bytes(fit) if isinstance(fit, str) else fit, fixed)
    return fewest_checkpoints(ground, recipe, resolved_hold(recipe, ground.device), available_bytes(ground.device))

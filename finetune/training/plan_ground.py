"""What a plan stands on: the base's configuration, the sizes of the pictures, what is encoded already, the machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.progress import Progress
from finetune.families.picture_limits import picture_limits
from finetune.families.targets import resolve_targets
from finetune.families.preloading import import_libraries
from finetune.offload import free_bytes
from finetune.recipe import Recipe
from finetune.training import plan_model, plan_phases
from finetune.training.adapter_size import adapter_size
from finetune.training.allocator import heap_settings
from finetune.training.data_sources import FolderScans
from finetune.training.encode import is_encoded
from finetune.training.encoding_cache import EncodingCache
from finetune.training.placement import QUANTISED, Hold, held_linears, memory_is_short
from finetune.training.plan_speed import Speed, probe_expansion, probe_speed
from finetune.training.plan_tracing import Trace
from finetune.training.regularisation import requests_of
from finetune.training.samples import plan_samples
from finetune.training.sharding import Sharding
from finetune.training.training_set import TrainingSet, resolutions_of

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel


@dataclass
class Ground:
    """What does not change while settings are tried: base, sizes, traced costs by batch size.

    pixels: of all pictures, each at every size that it is trained at.  usual_share: pixels of the mean use of a picture, as a
    share of those of the largest size.  to_draw: regularisation pictures that the base draws before training.
    sharding: how the base is divided between processes; the plan is then of one of them.  encoded: whether every picture and
    caption is in the cache already, so that no encoder will be loaded.
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
    costs: dict[tuple[int, bool, bool, torch.dtype], plan_model.StepCost] = field(default_factory=dict)
    traces: dict[tuple[int, bool, torch.dtype | None], Trace] = field(default_factory=dict)
    speed: Speed | None = None
    expansions: dict[str, float] = field(default_factory=dict)
    quantiser: int | None = None
    kept_in: Path | None = None
    encoded: bool = False

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
        key = batch, checkpointed, short, hold.compute
        if key not in self.costs:
            largest = max(self.sizes, key=lambda size: size[0] * size[1])
            targets = resolve_targets(self.base.family.facts, recipe.adapter.targets)
            on_cpu = self.device.type == "cpu"
            self.costs[key] = plan_model.step_cost(
                self.base.family, self.config["_class_name"], self.config, targets, adapter_size(recipe), batch, largest, float(torch.finfo(hold.compute).bits // 8),
                checkpointed, heap_settings(short) if on_cpu else None, self.traces, self.kept_in, None if on_cpu or hold.compute == torch.float32 else hold.compute)
        return self.costs[key]


def available_bytes(device: torch.device) -> int:
    """Memory that a run could take now: free on the GPU, or what this process has and could still get."""
    if (free := free_bytes(device)) is not None:
        return free
    import psutil

    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def survey(recipe: Recipe, training_set: TrainingSet | None = None, progress: Progress | None = None, sharding: Sharding | None = None,
           kept_in: Path | None = None, held_bytes: int = 0, scans: FolderScans | None = None) -> Ground:
    """Read configurations, picture sizes and the libraries' own size. training_set: of a run that has encoded it; where it is not
    given it is scanned, and looked for in the cache. kept_in: folder of the cache, see `plan_kept`.  held_bytes: of encodings that
    are in this process's memory already, which a plan counts by themselves.  scans: as `build_training_set` has them."""
    from finetune.families.base_models import locate_base

    base = locate_base(recipe.base.model, recipe.base.revision, parts=())
    facts = base.family.facts
    import_libraries(base.folder)
    encoded = training_set is not None
    if training_set is None and recipe.data.folder is not None:
        from finetune.training.training_set import build_training_set

        training_set = build_training_set(recipe, facts, progress or Progress(), limits=picture_limits(base), scans=scans)
        encoded = kept_in is not None and _found_encoded(base, training_set, recipe, kept_in)
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
    around = plan_phases.surroundings(base, sizes, device, kept_in)
    around = replace(around, library_bytes=max(around.library_bytes - held_bytes, 0))
    return Ground(recipe, base, device, sizes, pixels, usual_share, to_draw, captions, around, model, config, held_out, sharding, kept_in=kept_in, encoded=encoded)


def _found_encoded(base: BaseModel, training_set: TrainingSet, recipe: Recipe, cache_folder: Path) -> bool:
    """Whether no encoder will be loaded for this."""
    if recipe.data.regularisation_prompt is not None:
        return False  # its pictures are drawn in the run, by a base whose encoders are loaded for that
    prompts = plan_samples(recipe, base.family.facts, training_set).every_prompt()
    return is_encoded(base, training_set.with_held_out(), prompts, recipe.data, EncodingCache(cache_folder))


def _usual_share(training_set: TrainingSet) -> float:
    """Own and regularisation pictures are used equally often in all; within their kind by their repeats."""
    shares = []
    largest = max(picture.placement.bucket.height * picture.placement.bucket.width for picture in training_set.pictures)
    for kind in (False, True):
        uses = [(picture.placement.bucket.height * picture.placement.bucket.width, picture.repeats) for picture in training_set.pictures if picture.regularisation == kind]
        if uses:
            shares.append(sum(area * repeats for area, repeats in uses) / sum(repeats for _, repeats in uses) / largest)
    return sum(shares) / len(shares)

"""The end of a run: the adapter file is loaded back into a fresh base and has to prove itself before anyone says "done"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.atomic_files import whole_file
from data_tools.progress import Progress
from finetune.errors import TrainingError, VerifyError
from finetune.families.protocol import ModelFamily
from finetune.objectives import NoiseLevel
from finetune.randomness import generator
from finetune.sampling_sheets import before_after_sheet
from finetune.training.allocator import keep_freed_memory
from finetune.training.checkpoints import ADAPTER, newest_checkpoint
from finetune.training.encode import Encodings
from finetune.training.placement import Hold, give_back, mapped_files
from finetune.training.run_folder import RunFolder
from finetune.training.samples import BEFORE, SamplePlan, draw_samples
from finetune.training.text_training import cached_only, prove_encoders, together
from finetune.training.token_training import export_tokens, with_tokens_from_file, without_tokens
from finetune.training.training_set import TrainingSet

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.adapters.verify import VerifyResult
    from finetune.families.base_models import BaseModel

# Largest relative difference between the trained model and the file attached to a fresh base. The trained model keeps
# alpha / rank apart, the file has it folded in, so the last bits of the format differ.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Proof:
    """The verification's numbers, and the sample pictures of the base and of the adapter as loaded back."""

    verified: VerifyResult
    before: list[Path] = field(default_factory=list)
    after: list[Path] = field(default_factory=list)


def probe(family: ModelFamily, transformer: Any, encodings: Encodings, training_set: TrainingSet) -> torch.Tensor:
    """One deterministic forward of `transformer`: the first picture of the data, half way into the noise."""
    device = next(transformer.parameters()).device
    latents = encodings.latents(0).mean[None].to(device)
    noise = torch.randn(latents.shape, generator=generator(0, "probe")).to(device)
    level = NoiseLevel(sigma=torch.tensor([0.5]), timestep=torch.tensor([500.0]))
    conditioning = encodings.conditioning(training_set.captions.variants[0][0])
    with torch.no_grad():
        return family.predict(transformer, (latents + noise) * 0.5**0.5, level, [conditioning], [training_set.pictures[0].geometry])


def reference_prediction(family: ModelFamily, pipeline: Any, encodings: Encodings, training_set: TrainingSet) -> torch.Tensor:
    """What the trained model predicts for the probe, on the CPU."""
    pipeline.transformer.eval()
    return probe(family, pipeline.transformer, encodings, training_set).cpu()


def _exported(run: RunFolder, step: int, base: BaseModel) -> AdapterFile:
    """Copy the last checkpoint's adapter to the place from which it is published."""
    from finetune.adapters.adapter_file import read_adapter, usual_name, write_adapter

    checkpoint, _ = newest_checkpoint(run.checkpoints)
    if checkpoint is None or checkpoint.step != step:
        raise TrainingError(f"the checkpoint of step {step} is gone", where=str(run.checkpoints), fix="go on with --resume: what is missing is trained again")
    adapter = export_tokens(checkpoint, read_adapter(checkpoint.folder / ADAPTER), run, base)
    write_adapter(run.adapter / usual_name(adapter), adapter)
    return adapter


def _check_same_as_trained(family: ModelFamily, transformer: Any, adapter: AdapterFile, reference: torch.Tensor, encodings: Encodings, training_set: TrainingSet,
                           dtype: torch.dtype, where: str) -> None:
    from finetune.adapters.attach import attach

    attach(transformer, replace(adapter, text_encoders={}), "loaded")
    loaded = probe(family, transformer, encodings, training_set).cpu()
    difference = float((loaded - reference).norm() / reference.norm().clamp_min(1e-30))
    if not difference <= TOLERANCE[dtype]:
        raise VerifyError(f"the file does not do what the trained model did (relative difference {difference:.1e})", where=where)


def _base_pictures(samples: SamplePlan, family: ModelFamily, base: Any, encodings: Encodings, run: RunFolder, progress: Progress) -> list[Path]:
    """The sample pictures without an adapter: those that were drawn before training, or drawn now."""
    drawn = sorted(run.samples.glob(f"{BEFORE}-*.png"))
    if len(drawn) == len(samples.requests):
        return drawn
    return draw_samples(samples, family, base, without_tokens(cached_only(encodings)), run.samples, BEFORE, progress)


def write_sheet(before: list[Path], after: list[Path], prompts: list[str], path: Path) -> None:
    """Before and after as one picture."""
    from PIL import Image

    sheet = before_after_sheet([Image.open(picture) for picture in before], [Image.open(picture) for picture in after], prompts)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def prove_adapter(base: BaseModel, load: Callable[[], Any], hold: Hold, run: RunFolder, step: int, reference: torch.Tensor, encodings: Encodings, training_set: TrainingSet,
                  samples: SamplePlan, device: torch.device, progress: Progress) -> Proof:
    """Export the adapter of `step`, load it into a fresh base, verify it, draw with it and put before and after side by side.
    Where the base's pictures are not there yet, the fresh base draws them first.

    load: gives a fresh pipeline, its weights held as in training.  hold: how that is.

    Raises VerifyError naming what failed; the checkpoint is untouched then.
    """
    from finetune.adapters.adapter_file import read_adapter
    from finetune.adapters.verify import verify_adapter

    family = base.family
    trained = _exported(run, step, base)
    progress.say("loading the adapter file into a fresh base and checking it")
    pipeline = load()
    if device.type == "cpu":
        # Hashing and baking take and free memory of a weight's size between tensors that stay: in a heap that keeps what is freed, 1.3 GiB
        # of holes with 1.5 billion weights in fp32.
        keep_freed_memory(short=True)
    pipeline.transformer.eval()
    before = _base_pictures(samples, family, pipeline, encodings, run, progress)
    encodings = with_tokens_from_file(encodings, run, device)
    parts = []
    if trained.text_encoders:
        caption = training_set.captions.variants[0][0]
        part, encodings = prove_encoders(base, pipeline, read_adapter(run.adapter_file), encodings, caption, hold.compute, str(run.adapter_file))
        parts.append(part)
    files = mapped_files(base) if hold.storage is None else []
    parts.append(verify_adapter(run.adapter_file, pipeline.transformer, lambda model: probe(family, model, encodings, training_set), trained=trained,
                                seen=lambda tensor: give_back(tensor, files)))
    verified = together(parts)
    _check_same_as_trained(family, pipeline.transformer, trained, reference, encodings, training_set, hold.compute, str(run.adapter_file))
    after = draw_samples(samples, family, pipeline, encodings, run.samples, f"step-{step:06d}", progress)
    write_sheet(before, after, [request.prompt for request in samples.requests], run.sheet)
    return Proof(verified, before, after)

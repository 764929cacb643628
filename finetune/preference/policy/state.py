"""Everything that changes in a preference run, to disk and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import RunFolderError, TrainingError
from finetune.families.base_models import BaseModel
from finetune.preference.policy.guard import Guard
from finetune.preference.policy.settings import PreferenceSettings, dump_settings
from finetune.training.checkpoints import Checkpoint, keep_newest, write_checkpoint
from finetune.training.optimizers import optimizer_state, restore_optimizer
from finetune.training.run_folder import RunFolder

CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class TrainedModel:
    """The transformer with its LoRA and the optimizer of it. scaler: of the loss, where fp16 is computed in; else None."""

    transformer: torch.nn.Module
    named: Sequence[tuple[str, torch.nn.Parameter]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return [parameter for _, parameter in self.named]

    def adapter(self, settings: PreferenceSettings, base: BaseModel, step: int) -> Any:
        """The LoRA as a file would hold it, joined with the adapter that the run started from."""
        from finetune.adapters.adapter_file import read_adapter
        from finetune.adapters.arithmetic import Weighted, merge
        from finetune.adapters.lora import collect_lora
        from finetune.families.key_layouts import KEY_MAPS

        learned = collect_lora(self.transformer)
        if settings.start:
            # What the start trains of the text encoders is not learned on; in the sum it stays as it is.
            learned = merge([Weighted(read_adapter(Path(settings.start), KEY_MAPS), 1.0), Weighted(learned, 1.0)]).adapter
        import hashlib

        return learned.with_provenance(
            base_model=base.identifier, base_revision=base.revision, family=base.family.facts.name, licence=base.licence.identifier, steps=step,
            preference_method=settings.method, recipe_hash=hashlib.sha256(dump_settings(settings).encode()).hexdigest(),
        )

    def keep_best(self, run: RunFolder, settings: PreferenceSettings, base: BaseModel, step: int) -> None:
        """Write the adapter of the best healthy check beside the checkpoints."""
        from finetune.adapters.adapter_file import write_adapter

        write_adapter(best_file(run), self.adapter(settings, base, step))


def best_file(run: RunFolder) -> Path:
    """The adapter of the best healthy check."""
    return run.checkpoints / "best.safetensors"


def save_checkpoint(run: RunFolder, settings: PreferenceSettings, base: BaseModel, model: TrainedModel, guard: Guard, step: int, stopped: str | None) -> None:
    """Parameters, optimizer and guard of `step` finished steps. Raises TrainingError when the disk does not take it."""
    from finetune.adapters.adapter_file import write_adapter

    tensors, structure = optimizer_state(model.optimizer)
    tensors |= {f"parameter/{name}": parameter.detach().cpu().clone() for name, parameter in model.named}
    state = {"optimizer": structure, "scaler": model.scaler.state_dict() if model.scaler is not None else None, "guard": guard.to_state(), "stopped": stopped, "threads": torch.get_num_threads(), "torch": torch.__version__}
    try:
        write_checkpoint(run.checkpoints, step, tensors, state, lambda path: write_adapter(path, model.adapter(settings, base, step)))
    except OSError as problem:
        raise TrainingError(f"cannot write the checkpoint of step {step}: {problem.strerror or problem}", where=str(run.checkpoints), fix="free disk space and go on with --resume") from problem
    keep_newest(run.checkpoints, CHECKPOINTS_KEPT, step)


def restore_checkpoint(checkpoint: Checkpoint, model: TrainedModel, guard: Guard) -> str | None:
    """Put everything back; the reason for which the guard had stopped, if it had."""
    with torch.no_grad():
        for name, parameter in model.named:
            saved = checkpoint.tensors.get(f"parameter/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise RunFolderError(f"the checkpoint has no fitting {name}", where=str(checkpoint.folder), fix="resume with the settings that the run was started with")
            parameter.copy_(saved)
    restore_optimizer(model.optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
    if model.scaler is not None and checkpoint.state.get("scaler"):
        model.scaler.load_state_dict(checkpoint.state["scaler"])
    guard.restore(checkpoint.state["guard"])
    return checkpoint.state["stopped"]

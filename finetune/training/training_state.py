"""Everything that changes while training, to disk and back: parameters, optimizer, the loop's state, scaler."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import RunFolderError, TrainingError
from finetune.training.checkpoints import Checkpoint, keep_newest, write_checkpoint
from finetune.training.loop_state import LoopState
from finetune.training.optimizers import optimizer_state, restore_optimizer
from finetune.training.preparation import Prepared
from finetune.training.run_folder import RunFolder
from finetune.training.text_training import with_encoders

if TYPE_CHECKING:
    from accelerate import Accelerator

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


def restore(checkpoint: Checkpoint, named: NamedParameters, frozen: NamedParameters, optimizer: Any, accelerator: Accelerator, state: LoopState) -> int:
    """Put a checkpoint back into the model, the optimizer and `state`. Returns its step.

    named: what is trained.  frozen: what the adapter started from, where that is not the base.
    """
    with torch.no_grad():
        for name, parameter in (*named, *frozen):
            saved = checkpoint.tensors.get(f"parameter/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise RunFolderError(f"the checkpoint has no fitting {name}", where=str(checkpoint.folder), fix="resume with the adapter settings that the run was started with")
            parameter.copy_(saved)
    restore_optimizer(optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
    if accelerator.scaler is not None and checkpoint.state.get("scaler"):
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    state.restore([name for name, _ in named], checkpoint.tensors, checkpoint.state)
    return checkpoint.step


def check_disk(run: RunFolder, parameters: Sequence[torch.nn.Parameter], kept: int, copies: int) -> None:
    """A run that cannot store its checkpoints stops before the first step, not at the last. copies: of the weights beside the trained ones."""
    # A checkpoint holds the adapter, the parameters and two moments; one more is written before the oldest goes.
    needed = (4 + copies) * sum(parameter.numel() * 4 for parameter in parameters) * (kept + 1)
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise TrainingError(f"the disk has {free / 2**20:.0f} MiB left and the checkpoints need {needed / 2**20:.0f} MiB", where=str(run.path),
                            fix="free disk space, lower training.keep_checkpoints, or choose another folder with --out")


def save(prepared: Prepared, transformer: torch.nn.Module, named: NamedParameters, optimizer: Any, step: int, loop: LoopState) -> None:
    """Write the checkpoint of `step`; its adapter file is what the run would export if it ended here."""
    from finetune.adapters.adapter_file import write_adapter
    from finetune.adapters.kinds import start_parameters
    from finetune.adapters.lora import collect_lora

    tensors, structure = optimizer_state(optimizer)
    tensors |= {f"parameter/{name}": parameter.detach().cpu().clone() for name, parameter in (*named, *start_parameters(transformer))} | loop.tensors([name for name, _ in named])
    scaler = prepared.accelerator.scaler
    state = {
        "optimizer": structure, "scaler": scaler.state_dict() if scaler is not None else None,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "settings_hash": prepared.recipe.settings_hash(),
        "data_hash": prepared.training_set.data_hash,
    } | loop.as_json()
    with loop.exported():
        learned = with_encoders(collect_lora(transformer), prepared.encodings, prepared.base.family)
        adapter = learned.with_provenance(**_provenance(prepared, loop.exported_step(step)))
    try:
        write_checkpoint(prepared.run.checkpoints, step, tensors, state, lambda path: write_adapter(path, adapter))
    except OSError as problem:
        raise TrainingError(f"cannot write the checkpoint of step {step}: {problem.strerror or problem}", where=str(prepared.run.checkpoints),
                            fix="free disk space and go on with --resume from the last whole checkpoint") from problem
    keep_newest(prepared.run.checkpoints, prepared.recipe.training.keep_checkpoints, step)


def _provenance(prepared: Prepared, step: int) -> dict[str, Any]:
    return {
        "base_model": prepared.base.identifier, "base_revision": prepared.base.revision, "family": prepared.base.family.facts.name,
        "kind": prepared.recipe.adapter.kind,
        "recipe_hash": prepared.recipe.settings_hash(), "data_hash": prepared.training_set.data_hash, "trigger": prepared.recipe.data.trigger,
        "licence": prepared.recipe.publish.licence or prepared.base.licence.identifier, "steps": step, "pictures": len(prepared.training_set.own()),
    } | ({"ema_decay": prepared.recipe.training.ema_decay} if prepared.recipe.training.ema_decay else {})

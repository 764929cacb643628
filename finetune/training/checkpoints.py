"""Checkpoints that are whole or not there: written beside, flushed, renamed; read back only when every hash agrees."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from data_tools.atomic_files import flush_folder

if TYPE_CHECKING:
    import torch

STATE = "state.json"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. tensors: trainable parameters and optimizer state by path.  state: everything else."""

    folder: Path
    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def _hash(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with open(path, "rb+") as written:
        os.fsync(written.fileno())


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as problem:
        # The library wraps what the system says (disk full, file too large) in an error of its own.
        code = re.search(r"os error (\d+)", str(problem))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from problem


def write_checkpoint(
    parent: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], write_adapter: Callable[[Path], None]
) -> Path:
    """Write `parent`/step-N. `write_adapter` puts the adapter file at the path it is given.

    Raises OSError (disk full, read-only); earlier checkpoints are untouched then, and nothing half stays behind.
    """
    final = parent / f"step-{step:06d}"
    partial = parent / f".{final.name}.{os.getpid()}.partial"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        write_adapter(partial / ADAPTER)
        _save_tensors(tensors, partial / OPTIMIZER)
        _flush(partial / OPTIMIZER)
        state = state | {"step": step, "hashes": {name: _hash(partial / name) for name in (ADAPTER, OPTIMIZER)}}
        (partial / STATE).write_text(json.dumps(state, sort_keys=True), encoding="utf-8")
        _flush(partial / STATE)
        flush_folder(partial)
        # A broken checkpoint of the same step may stand there after a power cut; a rename cannot replace it.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush_folder(parent)
    return final


def _steps(parent: Path) -> list[tuple[int, Path]]:
    found = [(NAME.fullmatch(path.name), path) for path in parent.glob("step-*")] if parent.is_dir() else []
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _whole_state(folder: Path, step: int) -> dict[str, Any]:
    """What state.json says. Raises ValueError with the reason when anything in the folder is missing or differs from its hash."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name in (ADAPTER, OPTIMIZER):
            if _hash(folder / name) != state["hashes"][name]:
                raise ValueError(f"{name} is damaged")
        if state["step"] != step:
            raise ValueError(f"{STATE} speaks of step {state['step']}")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as problem:
        raise ValueError(f"{type(problem).__name__}: {problem}") from problem
    return state


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Raises ValueError with the reason when it is not whole."""
    from safetensors.torch import load_file

    state = _whole_state(folder, step)
    try:
        return Checkpoint(folder, step, load_file(folder / OPTIMIZER), state)
    except (OSError, SafetensorError) as problem:
        raise ValueError(f"{type(problem).__name__}: {problem}") from problem


def newest_step(parent: Path) -> int | None:
    """Of the newest checkpoint whose files are whole, without loading it; None where there is none."""
    for step, folder in _steps(parent):
        with suppress(ValueError):
            _whole_state(folder, step)
            return step
    return None


def newest_checkpoint(parent: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and what was passed over on the way to it with the reasons."""
    passed_over = []
    for step, folder in _steps(parent):
        try:
            return read_checkpoint(folder, step), passed_over
        except ValueError as problem:
            passed_over.append((folder, str(problem)))
    return None, passed_over


def keep_newest(parent: Path, count: int, step: int) -> None:
    """Remove all but the newest `count` checkpoints up to that of `step`, which was written last. What lies beyond it is broken, or
    the run would not have gone back: it counts for nothing and is replaced when its step comes again."""
    for _, folder in [found for found in _steps(parent) if found[0] <= step][count:]:
        shutil.rmtree(folder)

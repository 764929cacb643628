"""What a run leaves on disk, and the lock that keeps two runs out of one folder. The only place that knows the paths."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_text
from finetune.errors import RunFolderError


class RunFolder:
    """Paths and small files of one run.

        recipe.toml      resolved, reruns the run
        plan.json        the estimate; after the run, the truth beside it
        log.jsonl        one line a step
        validation.jsonl one line a measurement on held-out or sample pictures
        learning_rate.json  the search for a learning rate, where one was asked for
        samples/         step-000100.png: same prompts, same seeds
        regularisation/  pictures that the base drew before training, where the recipe asks for them
        checkpoints/     step-000100/
        adapter/         what is published
        report.html
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.data_summary = self.path / "data.json"
        self.plan = self.path / "plan.json"
        self.log = self.path / "log.jsonl"
        self.learning_rate = self.path / "learning_rate.json"
        self.result = self.path / "result.json"
        self.validation = self.path / "validation.jsonl"
        self.samples = self.path / "samples"
        self.regularisation = self.path / "regularisation"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.sheet = self.path / "before_after.png"
        self.report = self.path / "report.html"
        self._lock = None
        self._is_new = False

    @property
    def adapter_file(self) -> Path:
        """The weights to publish: a LoRA file, or that of a PEFT folder for kinds that need one."""
        of_peft = self.adapter / "adapter_model.safetensors"
        return of_peft if of_peft.exists() else self.adapter / "pytorch_lora_weights.safetensors"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.recipe.exists()

    def claim(self) -> None:
        """Create the folder and lock it for this process. Raises RunFolderError when another process holds it.

        The lock belongs to the operating system, so a process that died, however it died, does not block the folder.
        """
        try:
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / "lock", "a+")
        except OSError as problem:
            raise RunFolderError(f"cannot write here: {problem.strerror}", where=str(self.path), fix="choose another folder with --out, or free the disk") from problem
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            raise RunFolderError(f"in use by {holder}", where=str(self.path), fix="wait for that run, or choose another folder with --out") from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        self._lock = handle

    def release(self) -> None:
        """Let others use the folder. One that was made for a run that was refused before it began goes away again, so that the
        next run has its name."""
        if self._lock is None:
            return
        with suppress(OSError):  # taken away meanwhile, or somebody else has just begun there
            if self._is_new and os.listdir(self.path) == ["lock"]:
                (self.path / "lock").unlink()
                self.path.rmdir()
        self._lock.close()
        self._lock = None

    def write_json(self, path: Path, content: Any) -> None:
        """Write JSON whole or not at all."""
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n")

    def append_log(self, row: dict[str, Any]) -> None:
        """One line of log.jsonl. Lines are appended, so a kill loses at most the last one."""
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(_line(row))

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last line is left out (it is taken again by the resumed run)."""
        return _whole_rows(self.log)

    def read_validation(self) -> list[dict[str, Any]]:
        """What was measured on the way, one row a measurement."""
        return _whole_rows(self.validation)

    def cut_log(self, steps_done: int) -> None:
        """Drop rows of steps that the resumed run will take again, so that each step stands there once; likewise of what was measured."""
        for path in (self.log, self.validation):
            if path is self.log or path.exists():
                rows = [row for row in _whole_rows(path) if row["step"] <= steps_done] if steps_done else []
                write_text(path, "".join(map(_line, rows)))


def _line(row: dict[str, Any]) -> str:
    """JSON knows no NaN: a number that is none, of a step that was left out, is written as null."""
    return json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}, ensure_ascii=False) + "\n"


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows

"""What a run leaves on disk, and the lock that keeps two runs out of one folder. The only place that knows the paths."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_text
from finetune.errors import RunFolderError


class RunFolder:
    """Paths and small files of one run.

        recipe.toml      resolved, reruns the run
        plan.json        the estimate; after the run, the truth beside it
        log.jsonl        one line a step
        samples/         step-000100.png: same prompts, same seeds
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
        self.result = self.path / "result.json"
        self.validation = self.path / "validation.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.adapter_file = self.adapter / "pytorch_lora_weights.safetensors"
        self.sheet = self.path / "before_after.png"
        self.report = self.path / "report.html"
        self._lock = None

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.recipe.exists()

    def claim(self) -> None:
        """Create the folder and lock it for this process. Raises RunFolderError when another process holds it.

        The lock belongs to the operating system, so a process that died, however it died, does not block the folder.
        """
        try:
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
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_json(self, path: Path, content: Any) -> None:
        """Write JSON whole or not at all."""
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n")

    def append_log(self, row: dict[str, Any]) -> None:
        """One line of log.jsonl. Lines are appended, so a kill loses at most the last one."""
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last line is left out (it is taken again by the resumed run)."""
        if not self.log.exists():
            return []
        rows = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def cut_log(self, steps_done: int) -> None:
        """Drop rows of steps that the resumed run will take again, so that each step stands there once."""
        rows = [row for row in self.read_log() if row["step"] <= steps_done]
        write_text(self.log, "".join(json.dumps(row) + "\n" for row in rows))

"""plan.json of a run: the estimate before the first step, and the truth beside it at the end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from data_tools.atomic_files import write_text
from finetune.training.plan import Plan


def write_plan(path: Path, made: Plan) -> None:
    """plan.json before the first step."""
    write_text(path, json.dumps({"estimate": made.as_json(), "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, ensure_ascii=False, indent=1))


def write_truth(path: Path, peak_memory_bytes: int, seconds_per_step: float | None, run_folder: Path) -> None:
    """What really was, beside the estimate."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    disk = sum(os.path.getsize(file) for file in run_folder.rglob("*") if file.is_file())
    content["truth"] = {"peak_memory_bytes": peak_memory_bytes, "seconds_per_step": seconds_per_step, "run_folder_bytes": disk}
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1))

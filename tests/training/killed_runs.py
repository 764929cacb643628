"""Kill a training run with SIGKILL at random moments, resume it each time, and compare with an unbroken run. Only kills that
hit a living process count.

Run as a program: `python -m tests.training.killed_runs BASE PICTURES FOLDER KILLS SEED`; prints one JSON object. It
imports everything once and forks a child for every attempt, so that hundreds of kills take minutes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from finetune.training import run as training_run
from tests.libraries_stay import let_libraries_stay
from tests.training.small_job import small_recipe


def attempt(recipe, out: Path, cache: Path) -> int:
    """Fork a child that trains (resuming what is there) and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        training_run.train(recipe, out, resume=True, cache_folder=cache / "encodings")
        code = 0
    except BaseException as problem:  # a child must never return into the parent's program
        (out.parent / "problem.txt").write_text(f"{type(problem).__name__}: {problem}")
    finally:
        os._exit(code)


def finished(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def half_files(run: Path) -> list[str]:
    """Safetensors and JSON files under a final name that cannot be read whole."""
    from safetensors import safe_open

    broken = []
    for path in run.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(run).parts)
        if hidden or not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                safe_open(path, "pt").keys()
            if path.suffix == ".json":
                json.loads(path.read_text())
        except Exception as problem:
            broken.append(f"{path.relative_to(run)}: {problem}")
    return broken


def main(base: str, pictures: str, folder: str, kills: str, seed: str) -> None:
    work, draw = Path(folder), random.Random(int(seed))
    recipe = small_recipe(base, Path(pictures), training__checkpoint_every=2, samples__every=5)
    # Everything is imported here, once: a child then spends its life on the run and not on imports.
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    training_run.train(small_recipe(base, Path(pictures), training__steps=1), work / "imports", cache_folder=work / "cache" / "encodings")
    let_libraries_stay()
    began = time.monotonic()
    if not finished(attempt(recipe, work / "unbroken", work / "cache")):
        raise SystemExit((work / "problem.txt").read_text())
    longest = time.monotonic() - began
    expected = (work / "unbroken" / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()

    result = {"kills": 0, "runs": 0, "equal": 0, "broken": []}
    while result["kills"] < int(kills):
        # Every third run starts with an empty cache, so that kills land in scanning and encoding too.
        run, cache = work / "killed", work / ("cache" if result["runs"] % 3 else "fresh cache")
        shutil.rmtree(run, ignore_errors=True)
        if cache.name == "fresh cache":
            shutil.rmtree(cache, ignore_errors=True)
        for number in range(3):
            pause, child = draw.uniform(0, longest), attempt(recipe, run, cache)
            time.sleep(pause)
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                # It ended before: nothing was killed. A machine that has become faster since the unbroken run has sooner kills.
                longest = longest if number else pause
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            result["kills"] += 1
            result["broken"] += half_files(run) if run.exists() else []
        # A run that got to its end is complete; resuming it says so instead of training again.
        if not (run / "result.json").exists() and not finished(attempt(recipe, run, cache)):
            result["broken"].append((work / "problem.txt").read_text())
        result["runs"] += 1
        adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
        result["equal"] += adapter.exists() and adapter.read_bytes() == expected
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

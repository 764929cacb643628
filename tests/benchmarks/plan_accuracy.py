"""The plan's peak memory and seconds beside the measured ones, over models and settings.

    python -m tests.benchmarks.plan_accuracy FOLDER [--large] [--start N] [--only N]

Every combination is planned in one new process and trained for some steps in another, on random bases kept in FOLDER.
--large adds the model of 1.5 billion parameters. Prints one row a combination, and the errors' median and extremes.
Seconds are only worth something on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "hidden_size": 128, "num_layers": 6, "mlp_ratio": 2.0, "cross_attention_dim": 128, "cross_attention_dim_t5": 128, "pooled_projection_dim": 128}
MIDDLE = {"num_attention_heads": 8, "attention_head_dim": 64, "hidden_size": 512, "num_layers": 8, "mlp_ratio": 4.0}
WIDE = {"num_attention_heads": 12, "attention_head_dim": 64, "hidden_size": 768, "num_layers": 12, "mlp_ratio": 4.0}
BASES = {"small": SMALL, "middle": MIDDLE, "wide": WIDE, "large": {}}

# (base, hold, pixels, batch, rank, checkpointed blocks)
COMBINATIONS = [
    ("small", "fp32", 64, 1, 4, 0), ("small", "fp32", 128, 8, 16, 0), ("small", "bf16", 256, 4, 16, 0), ("small", "fp32", 256, 8, 16, 6),
    ("small", "nf4", 128, 4, 8, 3), ("small", "streamed", 256, 2, 64, 0), ("small", "int8", 128, 2, 8, 0), ("small", "fp32", 256, 16, 4, 0),
    ("middle", "fp32", 128, 1, 16, 0), ("middle", "fp32", 256, 4, 16, 0), ("middle", "fp32", 256, 4, 16, 8), ("middle", "bf16", 256, 2, 16, 0),
    ("middle", "nf4", 256, 2, 16, 4), ("middle", "streamed", 256, 1, 64, 8), ("middle", "int8", 256, 1, 16, 0), ("middle", "fp32", 512, 1, 16, 0),
    ("middle", "fp32", 256, 8, 16, 4), ("middle", "bf16", 128, 4, 32, 8),
    ("wide", "fp32", 128, 1, 16, 0), ("wide", "fp32", 256, 2, 16, 0), ("wide", "fp32", 256, 2, 16, 12), ("wide", "bf16", 256, 1, 64, 6),
    ("wide", "nf4", 256, 2, 16, 12), ("wide", "streamed", 256, 1, 16, 0), ("wide", "int8", 256, 1, 16, 12), ("wide", "fp32", 512, 1, 16, 6),
]
LARGE = [("large", "nf4", 256, 1, 16, 40), ("large", "streamed", 256, 1, 16, 40), ("large", "fp32", 256, 1, 16, 40)]
# Of a run, and of one of the large model: the first two warm up where there are more.
STEPS = (3, 2)


def in_own_process(job: str, *arguments: Any) -> dict:
    """The JSON result of one of `JOBS` in a new process: nothing is imported there but what it needs itself."""
    command = [sys.executable, "-m", "tests.benchmarks.plan_accuracy", "--job", job, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1][:300] if run.stderr.strip() else f"ended with {run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def build(folder: str, changes: dict) -> dict:
    """A random base, unless it is there."""
    import torch

    from tests.benchmarks.random_base import hunyuan_dit

    return {"folder": str(hunyuan_dit(Path(folder), torch.bfloat16, **changes))}


def planned(recipe: dict, cache: str) -> dict:
    """What `brushwork plan --json` says, where the cache is the run's."""
    from finetune.recipe import load_recipe
    from finetune.training.plan import plan

    return plan(load_recipe(recipe), cache_folder=Path(cache)).as_json()


def trained(recipe: dict, run: str, cache: str) -> dict:
    """Peak bytes and seconds of a real run. An adapter of some steps on random weights need not pass the proof; the run went
    through all of it."""
    import torch

    from finetune.errors import VerifyError
    from finetune.recipe import load_recipe
    from finetune.training.memory import peak_memory_bytes
    from finetune.training.plan_run import record_truth
    from finetune.training.run import train
    from finetune.training.run_folder import RunFolder

    try:
        train(load_recipe(recipe), Path(run), cache_folder=Path(cache))
    except VerifyError:
        record_truth(RunFolder(Path(run)), peak_memory_bytes(torch.device("cpu")))
    return json.loads(RunFolder(Path(run)).plan.read_text())


JOBS = {"build": build, "planned": planned, "trained": trained}


def pictures(folder: Path, pixels: int) -> Path:
    """Sixteen captioned squares."""
    from PIL import Image

    target = folder / f"pictures-{pixels}"
    target.mkdir(parents=True, exist_ok=True)
    for number in range(16):
        Image.new("RGB", (pixels, pixels), (number * 15, 90, 200 - number * 10)).save(target / f"{number}.png")
        (target / f"{number}.txt").write_text(f"a plain square, number {number}")
    return target


def measure(folder: Path, number: int, combination: tuple) -> tuple[dict, dict]:
    """(what the plan says, the run's own plan.json with the truth in it)."""
    base, hold, pixels, batch, rank, blocks = combination
    in_own_process("build", str(folder / base), BASES[base])
    recipe = {
        "base": {"model": str(folder / base), "hold": hold}, "data": {"folder": str(pictures(folder, pixels)), "resolution": pixels}, "adapter": {"rank": rank},
        "training": {"steps": STEPS[base == "large"], "batch_size": batch, "checkpointed_blocks": blocks, "optimizer": "adamw", "checkpoint_every": 0},
        "samples": {"steps": 2, "prompts": ["a square"]},
    }
    run = folder / f"run-{os.getpid()}-{number}"
    try:
        cache = str(folder / "encodings")
        return in_own_process("planned", recipe, cache), in_own_process("trained", recipe, str(run), cache)
    finally:
        shutil.rmtree(run, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--start", type=int, default=0, help="leave out the first N combinations")
    parser.add_argument("--only", type=int, help="stop after the Nth combination")
    parser.add_argument("--details", type=argparse.FileType("a"), help="write both plans of every combination to this file, a line each")
    parser.add_argument("--job", nargs=2)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(JOBS[options.job[0]](*json.loads(options.job[1]))))
        return
    os.environ["XDG_CACHE_HOME"] = str(options.folder / "scan")
    errors, ratios = [], []
    # A large stride, so that a run of the first N has some of every size.
    combinations = [COMBINATIONS[number * 9 % len(COMBINATIONS)] for number in range(len(COMBINATIONS))] + (LARGE if options.large else [])
    print("| parameters | hold | pixels | batch | rank | checkpointed | planned MiB | measured MiB | error | peak while | planned s | measured s | busy |\n" + "|---" * 13 + "|")
    for number, combination in list(enumerate(combinations))[options.start:options.only]:
        _, hold, pixels, batch, rank, blocks = combination
        try:
            made, found = measure(options.folder, number, combination)
        except RuntimeError as problem:
            print(f"| {combination} | failed: {problem} |", flush=True)
            continue
        truth, own = found["truth"], found["estimate"]
        estimated, measured = made["memory_bytes"]["peak"], truth["peak_memory_bytes"]
        errors.append(estimated / measured - 1)
        ratios.append(own["seconds_per_step"] / truth["seconds_per_step"])
        phase = max(made["phases_bytes"], key=made["phases_bytes"].get)
        busy = "busy" if any("other programs" in note for note in own["notes"]) else ""
        print(f"| {made['parameters'] / 1e6:.1f} M | {hold} | {pixels} | {batch} | {rank} | {blocks} | {estimated / 2**20:.0f} | {measured / 2**20:.0f} | {errors[-1]:+.1%} | {phase} "
              f"| {own['seconds_per_step']:.2f} | {truth['seconds_per_step']:.2f} | {busy} |", flush=True)
        if options.details:
            print(json.dumps({"planned": made, "run": found}), file=options.details, flush=True)
    print(f"{len(errors)} combinations: median error {statistics.median(map(abs, errors)):.1%}, largest {max(errors):+.1%}, lowest {min(errors):+.1%}; "
          f"planned / measured seconds {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()

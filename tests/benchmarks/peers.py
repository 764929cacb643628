"""Ours beside diffusers' official LoRA scripts, on the same random models: seconds a step, start-up, memory, the whole job.

    python -m tests.benchmarks.peers FOLDER [--models flux sd3 ...] [--pairs 5] [--steps 12] [--full]

Pairs are kept in FOLDER/peers.jsonl and count together with those of earlier calls; `--pairs 0` only prints the table.

Both train LoRA of the same rank on the same layers from the same folder of pictures with the same caption, in float32 on one thread, latents and
text cached; each run is a process of its own, and the sides take turns. `ours` is `brushwork train`; `peer` is `peer_scripts`, which says what it
is written after. Ours is measured twice: with an empty cache, as the peer always starts, and with the cache that the first run left.
--full: autoencoders of the size that the families ship, and the peer as the commands in its scripts' READMEs run it, without a cache of latents.

start: from asking for the process to the end of its first step.  step: median after the first two.  job: to the written adapter, drawn out from
the measured steps to 200.  proven: the whole process likewise, ours with the file loaded back into a fresh base, verified, and a picture drawn
before and after (4 sampler steps), which the peer does not do.  Ratios are the median over pairs; CPU seconds do not count other programs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.peer_models import MODELS, write
from tests.benchmarks.step_clock import StepClock

RANK, JOB_STEPS, WARM_UP = 16, 200, 2
PROMPT = "a picture in the style of sks, with a disc on a soft ground"
RESULTS = "peers.jsonl"
SIDES = ("peer", "ours", "ours, cached")
MEASURES = ("step cpu", "step wall", "start cpu", "start wall", "training peak", "peak", "job cpu", "job wall", "proven cpu")


class _EnoughSeen(BaseException):
    """Ends a run after its last step, before the proof."""


def train_ours(base: Path, pictures: Path, out: Path, pixels: int, steps: int, clock_file: Path, started: float, short: bool) -> None:
    """`brushwork train` in this process, its steps clocked. short: without loading back, proof and pictures."""
    from finetune import cli
    from finetune.training import loop, run

    clock = StepClock(started)
    take_step, whole_loop = loop.take_step, run.training_loop

    def clocked_step(*arguments: object) -> object:
        numbers = take_step(*arguments)
        clock.step_done()
        return numbers

    def clocked_loop(*arguments: object) -> int:
        done = whole_loop(*arguments)
        clock.training_done()
        clock.adapter_written()  # the last checkpoint holds it
        if short:
            raise _EnoughSeen
        return done

    loop.take_step, run.training_loop = clocked_step, clocked_loop
    settings = {"data.resolution": pixels, "data.missing_caption": "trigger", "data.caption_dropout": 0.0, "adapter.rank": RANK, "training.steps": steps,
                "training.optimizer": "adamw", "samples.steps": 4, "samples.guidance": 1.0, "samples.prompts": [PROMPT]}
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    try:
        cli.main(["train", str(pictures), "--base", str(base), "--trigger", PROMPT, "--out", str(out), "--json", *changes])
    except _EnoughSeen:
        pass
    finally:
        clock.write(clock_file)


def run_side(side: str, name: str, folder: Path, steps: int, cache: Path, short: bool, full: bool) -> dict[str, float]:
    """One process, measured."""
    base, pictures = write(name, folder, full_autoencoder=full)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out, clock = Path(scratch) / "run", Path(scratch) / "clock.json"
        module = "tests.benchmarks.peer_scripts" if side == "peer" else "tests.benchmarks.peers"
        first = [name] if side == "peer" else ["--ours", *(["--short"] if short else [])]
        if side == "ours":
            shutil.rmtree(cache, ignore_errors=True)
        command = [sys.executable, "-m", module, *first, str(base), str(pictures), str(out), str(clock), "--pixels", str(MODELS[name].pixels), "--steps", str(steps),
                   "--rank", str(RANK), "--started", repr(time.time()), *(["--encode-in-steps"] if full and side == "peer" else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "BRUSHWORK_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{side} on {name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return figures(json.loads(clock.read_text()), steps)


def figures(clock: dict, steps: int) -> dict[str, float]:
    """From a clock's notes to the measures; memory in MiB, times in seconds."""
    ends = clock["ends"]
    wall, cpu = ([later[axis] - earlier[axis] for earlier, later in zip(ends[WARM_UP - 1:], ends[WARM_UP:], strict=False)] for axis in (0, 1))
    step_wall, step_cpu, more = statistics.median(wall), statistics.median(cpu), JOB_STEPS - steps
    return {"step cpu": step_cpu, "step wall": step_wall, "start cpu": ends[0][1], "start wall": ends[0][0], "training peak": clock["training_peak"] / 2**20,
            "peak": clock["peak"] / 2**20, "job cpu": clock["written_cpu"] + more * step_cpu, "job wall": clock["written_wall"] + more * step_wall,
            "proven cpu": clock["whole_cpu"] + more * step_cpu}


def measure_pair(name: str, folder: Path, steps: int, short: bool, full: bool) -> None:
    """Each side once, in turn; kept in the results file, so that pairs of several calls count together."""
    pair = {side: run_side(side, name, folder, steps, folder / f"cache-{name}", short, full) for side in SIDES}
    with open(folder / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"model": name + "-full" * full, "pair": pair}) + "\n")
    for side, result in pair.items():
        print(name, side, {key: round(value, 3) for key, value in result.items()}, flush=True)


def summarise(name: str, folder: Path) -> None:
    """Print one line a measure: peer, ours and the ratio, with an empty cache and a full one."""
    rows = [json.loads(line) for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines()]
    pairs = [row["pair"] for row in rows if row["model"] == name]
    if not pairs:
        return
    found = {side: [pair[side] for pair in pairs] for side in SIDES}
    print(f"{name}: {len(pairs)} pairs")
    for key in MEASURES:
        middle = {side: statistics.median(result[key] for result in results) for side, results in found.items()}
        ratios = {side: statistics.median(ours[key] / peer[key] for ours, peer in zip(found[side], found["peer"], strict=True)) for side in SIDES[1:]}
        print(f"| {name} | {key} | {middle['peer']:.4g} | {middle['ours']:.4g} | {ratios['ours']:.2f} | {middle['ours, cached']:.4g} | {ratios['ours, cached']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FOLDER", help="where models, pictures and caches are made")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--short", action="store_true", help="end ours with its last step: no proof, so that `proven` and `peak` say nothing")
    parser.add_argument("--full", action="store_true", help="autoencoders of full size, and the peer without a cache of latents (flux, sd3, qwen_image, z_image)")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("pixels", int), ("rank", int), ("started", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        base, pictures, out, clock = options.paths
        train_ours(base, pictures, out, options.pixels, options.steps, clock, options.started, options.short)
        return
    folder = options.paths[0]
    for _ in range(options.pairs):
        for name in options.models:
            measure_pair(name, folder, options.steps, options.short, options.full)
    for name in options.models:
        summarise(name + "-full" * options.full, folder)


if __name__ == "__main__":
    main()

"""Where the time of a cached run goes before its first step: python -m tests.benchmarks.first_step [--base mini] [--pictures FOLDER] [--rounds 3]

Each round is a `brushwork train` in a process of its own that ends after its first step; the first round fills the cache and is not counted.
Seconds are wall and CPU seconds from asking for the process to the end of each phase.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.benchmarks.step_clock import StepClock

PHASES = ("python and the trainer imported", "pictures looked at, libraries imported", "encodings checked", "planned", "transformer loaded, LoRA injected", "first step taken")


class _EnoughSeen(BaseException):
    """Ends the run after its first step."""


def _then(function: Callable, note: Callable[[], None]) -> Callable:
    def noted(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        note()
        return result

    return noted


def run_to_first_step(base: str, pictures: str, out: str, started: float) -> list[tuple[float, float]]:
    """In this process: (wall, CPU) at the end of each phase."""
    from finetune import cli
    from finetune.training import loop, preparation, run

    clock = StepClock(started)
    clock.step_done()
    preparation._say_what_was_found = _then(preparation._say_what_was_found, clock.step_done)
    run.prepare = _then(run.prepare, clock.step_done)
    run.settle = _then(run.settle, clock.step_done)
    run._load_transformer = _then(run._load_transformer, clock.step_done)
    take_step = loop.take_step

    def first_step(*arguments: object) -> None:
        take_step(*arguments)
        clock.step_done()
        raise _EnoughSeen

    loop.take_step = first_step
    try:
        cli.main(["train", pictures, "--base", base, "--out", out, "--quiet"])
    except _EnoughSeen:
        pass
    return clock.ends


def main() -> None:
    from finetune.mini_base import style_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--pictures", default=str(style_folder()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.started:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_to_first_step(options.base, options.pictures, f"{folder}/run", options.started)))
        return
    rounds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(options.rounds + 1):
            command = [sys.executable, "-m", "tests.benchmarks.first_step", "--base", options.base, "--pictures", options.pictures, "--started", repr(time.time())]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"BRUSHWORK_CACHE": cache, "OMP_NUM_THREADS": "1"}).stdout
            rounds.append(json.loads(output.splitlines()[-1]))
    before = (0.0, 0.0)
    for phase, ends in zip(PHASES, zip(*rounds[1:], strict=True), strict=True):
        wall, cpu = (statistics.median(end[axis] for end in ends) for axis in (0, 1))
        print(f"{phase:42} {wall:6.2f} s wall ({wall - before[0]:+.2f}), {cpu:6.2f} s CPU ({cpu - before[1]:+.2f})")
        before = (wall, cpu)


if __name__ == "__main__":
    main()

"""Memory and seconds of two processes that share a base: whole in each, divided by FSDP2, divided by DeepSpeed (where it is installed).

    python -m tests.benchmarks.divided_base FOLDER [--layers 16] [--checkpointed 0]

A HunyuanDiT of full width with random fp32 weights, 64 px, one picture a step and process. Memory is what is resident while steps are
taken, looked at every 5 ms; what was needed to load and divide is in the highest ever.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from data_tools.progress import Progress

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "accelerate"
WAYS = {
    "whole in each": ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    "FSDP2": ["--config_file", str(RECIPES / "fsdp.yaml")],
    "ZeRO-3": ["--config_file", str(RECIPES / "deepspeed.yaml")],
}


def resident(which: str) -> int:
    """MiB of this process: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


class Looking(Progress):
    """Memory before and while steps are taken, and when each was done."""

    def __init__(self):
        self.before, self.most, self.done, self.over = 0, 0, [], threading.Event()

    def _look(self):
        while not self.over.wait(0.005):
            self.most = max(self.most, resident("VmRSS"))

    @contextmanager
    def phase(self, name, total=None):
        if name != "training":
            yield lambda count=1, note="": None
            return
        self.before, looker = resident("VmRSS"), threading.Thread(target=self._look)
        looker.start()
        yield lambda count=1, note="": self.done.append(time.perf_counter())
        self.over.set()
        looker.join()


def one_process(base: str, folder: str, checkpointed: str) -> None:
    from finetune.training.run import train
    from tests.training.small_job import small_recipe

    progress = Looking()
    recipe = small_recipe(base, Path(folder) / "pictures", training__steps=5, training__batch_size=1, training__checkpoint_every=0, training__optimizer="adamw",
                          training__checkpointed_blocks=int(checkpointed), samples__every=0)
    train(recipe, Path(folder) / f"run {os.getppid()}", progress=progress, cache_folder=Path(folder) / "cache")
    seconds = statistics.median(after - before for before, after in zip(progress.done, progress.done[1:]))
    print(f"measured {os.environ['RANK']}: {progress.before} MiB before the steps, {progress.most} while they are taken, {resident('VmHWM')} ever; {seconds:.2f} s a step", flush=True)


def main() -> None:
    import torch

    from tests.benchmarks.random_base import hunyuan_dit
    from tests.training.small_job import write_pictures

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--checkpointed", type=int, default=0)
    asked = parser.parse_args()
    base = hunyuan_dit(asked.folder / f"base of {asked.layers}", torch.float32, num_layers=asked.layers)
    write_pictures(asked.folder / "pictures", 4)
    for name, how in WAYS.items():
        if name == "ZeRO-3" and importlib.util.find_spec("deepspeed") is None:
            continue
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *how, "-m", "tests.benchmarks.divided_base", "process", str(base), str(asked.folder), str(asked.checkpointed)]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        print(f"{name}:", *sorted(re.findall(r"measured .*", finished.stdout)) or [finished.stderr[-2000:]], sep="\n  ", flush=True)


if __name__ == "__main__":
    one_process(*sys.argv[2:]) if sys.argv[1:2] == ["process"] else main()

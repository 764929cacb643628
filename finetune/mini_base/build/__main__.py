"""`python -m finetune.mini_base.build --out DIR`: the embedded model again, from the pinned packages to the measured folder."""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

# With glibc's defaults a third of the time went into page faults: large activations were handed back to the system and
# asked for again in every step. One thread, because the number of threads changes the order of sums.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000",
               "MALLOC_TOP_PAD_": "268435456", "THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
STAGES = ("prepare", "transformer", "decoder", "assemble")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finetune.mini_base.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the finished model and its style folders go")
    parser.add_argument("--work", type=Path, help="intermediate files (default: OUT/work)")
    parser.add_argument("--packages", type=Path, help="a node_modules folder with the pinned packages (default: npm installs them)")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage, on what the earlier ones left in the work folder")
    return parser.parse_args(arguments)


def run_stage(stage: str, packages: Path, work: Path, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    from . import stages

    if stage == "prepare":
        stages.prepare(packages, work)
    elif stage == "transformer":
        from .transformer import TransformerPlan

        stages.transformer(packages, work, TransformerPlan())
    elif stage == "decoder":
        from .decoder import DecoderPlan

        stages.decoder(work, DecoderPlan())
    else:
        stages.assemble(packages, work, out)


def run_all(packages: Path, work: Path, out: Path) -> None:
    """The two trainings do not need each other and run side by side."""
    def start(stage: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "finetune.mini_base.build", "--stage", stage, "--packages", str(packages),
                   "--work", str(work), "--out", str(out)]
        return subprocess.Popen(command)

    for group in (("prepare",), ("transformer", "decoder"), ("assemble",)):
        running = {stage: start(stage) for stage in group}
        failed = [f"stage {stage} ended with {process.wait()}" for stage, process in running.items() if process.wait()]
        if failed:
            raise SystemExit("; ".join(failed))    # a negative number is the signal that ended it


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ.update(ENVIRONMENT)    # the allocator reads them only at the start of a process
        given = sys.argv[1:] if arguments is None else arguments
        os.execv(sys.executable, [sys.executable, "-m", "finetune.mini_base.build", *given])
    from .packages import check_packages, install_packages

    work = options.work or options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    packages = check_packages(options.packages) if options.packages else install_packages(work / "npm")
    if options.stage:
        run_stage(options.stage, packages, work, options.out)
    else:
        run_all(packages, work, options.out)


if __name__ == "__main__":
    main()

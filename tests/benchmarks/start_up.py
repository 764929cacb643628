"""How long help and recipe errors take, against an interpreter that does nothing, in turn: python tests/benchmarks/start_up.py"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "brushwork --help": ["-m", "finetune", "--help"],
    "brushwork train --help": ["-m", "finetune", "train", "--help"],
    "brushwork recipe check": ["-m", "finetune", "recipe", "check", "mini/style"],
}
ROUNDS = 7


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of one process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            measured[name].append(seconds_of(arguments))
    nothing = statistics.median(wall for wall, _ in measured["python -c pass"])
    for name, rounds in measured.items():
        wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:24} {wall:.3f} s wall ({wall - nothing:+.3f} s), {cpu:.3f} s CPU")


if __name__ == "__main__":
    main()

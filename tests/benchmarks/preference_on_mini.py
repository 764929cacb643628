"""What preference learning does to the embedded model, and whether the guard stops runs that are made to go wrong.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.preference_on_mini --out FOLDER

First `examples/preference_loop.py` as it stands; then the same methods without anything that holds them back. Prints one
JSON object: the proof (accuracy, best-of-8, true gain of each method with its interval, divergence) and the wrecking runs
(which must all have been stopped, with the reason and the divergence of the adapter that was kept).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from finetune.errors import TrainingError

EXAMPLE = Path(__file__).parents[2] / "examples" / "preference_loop.py"
WRECKING = {
    "draft without a leash": ("draft", {"kl_weight": 0.0, "learning_rate": 1e-2, "steps": 40, "check_every": 4}),
    "refl without a leash": ("refl", {"kl_weight": 0.0, "learning_rate": 1e-2, "steps": 40, "check_every": 4}),
    "grpo without a leash": ("grpo", {"kl_weight": 0.0, "learning_rate": 1e-2, "steps": 12, "check_every": 2, "clip_nats": 50.0}),
}


def load_example() -> ModuleType:
    """The example as a module; it is a program, not part of the package."""
    specification = importlib.util.spec_from_file_location("preference_loop", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["preference_loop"] = module
    specification.loader.exec_module(module)
    return module


def wreck(example: ModuleType, base: str, out: Path) -> dict[str, dict]:
    """Every run that is made to go wrong, and what stopped it."""
    example.METHODS.setdefault("refl", dict(example.METHODS["draft"]))
    found = {}
    for name, (method, changes) in WRECKING.items():
        try:
            finished = example.optimise(method, base, out / "candidates", out / "reward.safetensors", out / name.replace(" ", "-"), changes)
            found[name] = {"stopped": finished.stopped, "steps": finished.steps, "kept_step": finished.best_step, "kl_of_kept": finished.kl}
        except TrainingError as error:
            found[name] = {"stopped": error.what, "steps": None, "kept_step": None, "kl_of_kept": None}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="mini")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    example = load_example()
    if not (options.out / "results.json").exists():
        sys.argv = [str(EXAMPLE), "--base", options.base, "--out", str(options.out)]
        example.main()
    results = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
    results["wrecking"] = wreck(example, options.base, options.out)
    (options.out / "benchmark.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

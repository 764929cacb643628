"""What was tried to break it, and how often it held: the table of the README, in the form n/n.

    python -m tests.benchmarks.reliability [--quick]

Runs the long form of the kills and of the failing writes (about half an hour on one core; --quick: their short form), then the
tests of bad input, and counts passed against run. A count below its total is a defect, and the program ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]

# What was tried -> the tests that try it: arguments for pytest.
TESTS = {
    "torn, zeroed, overgrown or missing checkpoint files": ["tests/training/test_checkpoints.py", "-k", "torn or missing_file"],
    "damaged entries of the encoding cache": ["tests/training/test_encoding_cache.py", "-k", "damaged or another_tool or full_disk"],
    "broken recipes": ["tests/recipe/test_broken_recipes.py", "-k", "broken_recipe_is_refused"],
    "bad pictures, captions, rows, archives and layouts": ["tests/data_tools/test_bad_inputs.py", "tests/data_tools/test_odd_folders.py", "tests/data_tools/test_bad_containers.py"],
    "broken, lying or hostile adapter files": ["tests/adapters/test_broken_files.py", "tests/adapters/test_broken_bytes.py", "tests/adapters/test_misfits.py"],
    "adapter layouts of other tools read or refused as they must be": ["tests/adapters/test_layout_cases.py", "tests/adapters/test_foreign_forms.py"],
    "bad input to the command": ["tests/cli/test_bad_input.py"],
    "faults of servers (Hub, caption endpoint)": ["tests/adapters/test_publish.py", "tests/data_tools/test_captions.py"],
    "hostile replies of thinking models": ["tests/thinking/test_thinking_reply.py"],
    "fuzzing: recipes, overrides, adapter headers, keys": ["tests/recipe/test_recipe.py", "tests/adapters/test_fuzz.py", "-k", "no_file or no_override or fuzz"],
}


def counted(arguments: list[str]) -> tuple[int, int]:
    """(passed, run) of one call of pytest. Skipped tests count as neither."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-n", "0", *arguments, f"--junitxml={result}"], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        suite = ElementTree.parse(result).getroot().find("testsuite")
    total = int(suite.get("tests")) - int(suite.get("skipped"))
    return total - int(suite.get("failures")) - int(suite.get("errors")), total


def reported(program: str, *arguments: str) -> dict:
    """The JSON that one of the programs of tests/training prints."""
    finished = subprocess.run([sys.executable, "-m", f"tests.training.{program}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stderr[-2000:])
    return json.loads(finished.stdout.splitlines()[-1])


def made_to_fail(quick: bool) -> Iterator[tuple[str, int, int]]:
    """Rows of the kills and the failing writes, on a tiny base made here."""
    from tests.tiny_models import hunyuan_dit
    from tests.training.small_job import write_pictures

    with tempfile.TemporaryDirectory() as folder:
        base, pictures = Path(folder) / "base", write_pictures(Path(folder) / "pictures")
        hunyuan_dit.build().save_pretrained(base)
        kills = reported("killed_runs", str(base), str(pictures), str(Path(folder) / "kills"), "9" if quick else "300", "0")
        yield f"runs ended bit-identical after {kills['kills']} SIGKILLs in all", kills["equal"], kills["runs"]
        writes = reported("failed_writes", str(base), str(pictures), str(Path(folder) / "writes"), "5" if quick else "0")
        yield "runs with a failed write, each at another one, that ended bit-identical when resumed", writes["equal"], writes["tried"]
        leaked, total = len(kills["broken"]) + len(writes["leaked"]), kills["kills"] + writes["tried"]
        yield "of both: left no half file and no other exception than a clear one", total - leaked, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    all_held = True
    print("| tried | held |\n|---|---|", flush=True)
    for what, arguments in TESTS.items():
        held, total = counted(arguments)
        all_held &= held == total > 0
        print(f"| {what} | {held}/{total} |", flush=True)
    for what, held, total in made_to_fail(options.quick):
        all_held &= held == total > 0
        print(f"| {what} | {held}/{total} |", flush=True)
    sys.exit(0 if all_held else 1)


if __name__ == "__main__":
    main()

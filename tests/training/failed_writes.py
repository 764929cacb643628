"""Let the n-th flush to disk of a training run fail as a full disk does, for one n after another, and resume each run.

Run as a program: `python -m tests.training.failed_writes BASE PICTURES FOLDER MOST`; prints one JSON object: `leaked` are
other exceptions and half files, `unequal` the runs that ended otherwise. MOST is how many of a run's flushes are tried,
spread evenly over all of them (0: every one). Each attempt is a forked child: it must end with an error that the command
turns into one line, never with another exception, and the resumed run must end with the adapter of an unbroken one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

from data_tools.errors import BrushworkError
from finetune.training import run as training_run
from tests.libraries_stay import let_libraries_stay
from tests.training.killed_runs import half_files
from tests.training.small_job import small_recipe

ENDED, CLEAR_ERROR, LEAKED = 0, 1, 2


class FailingFlush:
    """Stands in for os.fsync; the call numbered `fails_at` (from 1) finds the disk full."""

    def __init__(self, fails_at: int | None) -> None:
        self.calls, self.fails_at, self.flush = 0, fails_at, os.fsync

    def __call__(self, descriptor: int) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.flush(descriptor)


def attempt(recipe, out: Path, cache: Path, fails_at: int | None) -> tuple[int, int, str]:
    """Train in a forked child: how it ended, how often it flushed, what it said."""
    told = out.parent / "told.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code, said, failing = LEAKED, "", FailingFlush(fails_at)
        try:
            os.environ["XDG_CACHE_HOME"] = str(cache)
            os.fsync = failing
            training_run.train(recipe, out, resume=True, cache_folder=cache / "encodings")
            code = ENDED
        except (BrushworkError, OSError) as problem:
            code, said = CLEAR_ERROR, str(problem)
        except BaseException as problem:  # a child must never return into the parent's program
            said = f"{type(problem).__name__}: {problem}"
        finally:
            told.write_text(json.dumps([failing.calls, said]))
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls, said = json.loads(told.read_text())
    return code, calls, said


def main(base: str, pictures: str, folder: str, most: str) -> None:
    work = Path(folder)
    recipe = small_recipe(base, Path(pictures), training__checkpoint_every=4, training__steps=8)
    training_run.train(small_recipe(base, Path(pictures), training__steps=1), work / "imports", cache_folder=work / "imports cache")
    let_libraries_stay()
    code, flushes, said = attempt(recipe, work / "unbroken", work / "first cache", None)
    if code != ENDED:
        raise SystemExit(said)
    expected = (work / "unbroken" / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()
    count = min(int(most) or flushes, flushes)
    result = {"flushes": flushes, "tried": 0, "failed_clearly": 0, "went_on": 0, "equal": 0, "leaked": [], "unequal": []}
    for number in range(count):
        place = 1 + number * (flushes - 1) // max(count - 1, 1)
        run, cache = work / "run", work / "cache"
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        code, _, said = attempt(recipe, run, cache, place)
        result["tried"] += 1
        result["failed_clearly"] += code == CLEAR_ERROR
        # A flush of what may be lost (a scan's notes) does not end the run.
        result["went_on"] += code == ENDED
        if code == LEAKED:
            result["leaked"].append(f"flush {place}: {said}")
        result["leaked"] += [f"flush {place}: {half}" for half in half_files(run)] if run.exists() else []
        # The last flushes come after the result stands; such a run is complete.
        if code != ENDED and not (run / "result.json").exists():
            code, _, said = attempt(recipe, run, cache, None)
        adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
        equal = adapter.exists() and adapter.read_bytes() == expected
        result["equal"] += equal
        if not equal:
            result["unequal"].append(f"flush {place}: {said}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

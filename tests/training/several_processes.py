"""What each process of `accelerate launch` does in the tests: train, be stopped at one process, resume.

Run as `accelerate launch ... -m tests.training.several_processes BASE PICTURES FOLDER`. Writes FOLDER/<process>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from data_tools.progress import Progress
from finetune.errors import Interrupted
from finetune.training.run import train
from tests.libraries_stay import let_libraries_stay
from tests.training.small_job import small_recipe


class Watched(Progress):
    """Keeps what is said and which phases there were; `stop_at`: a Ctrl-C after that many steps, at this process alone."""

    def __init__(self, stop_at: int | None = None):
        self.said: list[str] = []
        self.phases: list[str] = []
        self.stop_at = stop_at

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def phase(self, name, total=None):
        self.phases.append(name)
        seen = 0

        def advance(count=1, note=""):
            nonlocal seen
            seen += count
            if name == "training" and seen == self.stop_at:
                signal.raise_signal(signal.SIGINT)

        yield advance


def recipe_of(base: str, pictures: str, **changes: object):
    """Eight pictures, square and wide, one of them held out, in batches of two: batches of one, of two, and of two sizes. The
    held-out one is measured in a single batch, which two processes cannot share."""
    always = {"training__steps": 6, "training__checkpoint_every": 2, "training__ema_decay": 0.5, "samples__every": 3,
              "validation__share": 0.1, "validation__every": 3, "validation__levels": 1, "validation__keep_best": False}
    return small_recipe(base, Path(pictures), **(always | changes))


def main(base: str, pictures: str, folder: str) -> None:
    from accelerate import PartialState

    work = Path(folder)
    recipe = recipe_of(base, pictures)
    whole, stopped = Watched(), Watched(stop_at=3 if os.environ["RANK"] == "1" else None)
    result = train(recipe, work / "unbroken", progress=whole, cache_folder=work / "cache")
    let_libraries_stay()
    PartialState().wait_for_everyone()
    try:
        train(recipe, work / "stopped", progress=stopped, cache_folder=work / "cache")
        interrupted = ""
    except Interrupted as interruption:
        interrupted = interruption.what
    PartialState().wait_for_everyone()
    resumed = train(recipe, work / "stopped", resume=True, cache_folder=work / "cache")
    report = {
        "result": result is not None, "said": whole.said, "phases": whole.phases, "interrupted": interrupted,
        "resumed_from": resumed.resumed_from if resumed else None, "processes": PartialState().num_processes,
    }
    (work / f"{PartialState().process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A small real job: a tiny random base saved as a pipeline, six pictures in two shapes, a few steps."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw

from data_tools.progress import Progress
from finetune.recipe import Recipe, load_recipe


def write_pictures(folder: Path, count: int = 6, captions: bool = True) -> Path:
    """Discs on coloured grounds; every third picture is wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture = Image.new("RGB", (96, 48) if number % 3 == 2 else (64, 64), (40 * number % 256, 200 - 20 * number % 200, 90))
        ImageDraw.Draw(picture).ellipse((10, 10, 40, 40), fill=(255, number * 30 % 256, 0))
        picture.save(folder / f"picture{number}.png")
        if captions:
            (folder / f"picture{number}.txt").write_text(f"a round thing number {number}")
    return folder


def small_recipe(base: Path | str, data: Path, **changes: object) -> Recipe:
    """changes: "section__key" -> value."""
    content = {
        "base": {"model": str(base)},
        "data": {"folder": str(data), "resolution": 64, "trigger": "sks"},
        "adapter": {"rank": 4},
        "training": {"steps": 12, "batch_size": 2, "checkpoint_every": 4, "learning_rate": 1e-2, "optimizer": "adamw8bit"},
        "samples": {"steps": 2, "prompts": ["a cat"]},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        content.setdefault(section, {})[key] = value
    return load_recipe(content)


def log_of(run: Path) -> list[dict]:
    """Rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def newest_step(run: Path) -> int:
    """Of the checkpoints, whole or not."""
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


class AtStep(Progress):
    """Does something when `step` steps of the phase of that name are reported."""

    def __init__(self, step: int, phase: str = "training"):
        self.step, self.watched = step, phase

    def act(self) -> None:
        raise NotImplementedError

    @contextmanager
    def phase(self, name, total=None):
        done = 0

        def advance(count=1, note=""):
            nonlocal done
            done += count
            if name == self.watched and done == self.step:
                self.act()

        yield advance


class Crash(Exception):
    pass


class CrashingProgress(AtStep):
    """Ends the run as a crash would, after a step was taken and before it is saved."""

    def act(self):
        raise Crash


class SignallingProgress(AtStep):
    """Sends this process a signal, which Python handles before the run's next line."""

    def __init__(self, step: int, number: int, phase: str = "training"):
        super().__init__(step, phase)
        self.number = number

    def act(self):
        os.kill(os.getpid(), self.number)

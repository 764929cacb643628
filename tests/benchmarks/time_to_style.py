"""Time to style: how many training seconds until held-out subjects are drawn in the new style, by setting.

`python -m tests.benchmarks.time_to_style [--only NAME ...] [--styles NAME ...]` prints a Markdown table. Every run is a
run of the product on the embedded model; seconds are CPU seconds of the optimizer steps alone (steps taken times the
median of a step), so that other work on the machine counts little. A run has reached the style when the palette
distance of held-out subjects is at most 0.3 of what it was before training while the shape score is at least 0.7, at
two looks in a row; it is looked at every 20 steps, and ends when the style is reached.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.progress import Progress
from finetune import mini_base
from finetune.mini_base.build.measures import palette_distance, shape_score
from finetune.recipe import load_recipe
from finetune.recipe_shelf import find_recipe
from finetune.training.run import train

EVERY, SUBJECTS = 20, 12

# Each differs from the shipped recipe in what it names.
SETTINGS: dict[str, list[str]] = {
    "the mini recipe": [],
    "learning rate 5e-4": ["training.learning_rate=5e-4"],
    "learning rate 1e-3": ["training.learning_rate=1e-3"],
    "learning rate 4e-3": ["training.learning_rate=4e-3"],
    "learning rate 8e-3": ["training.learning_rate=8e-3"],
    "rank 4": ["adapter.rank=4"],
    "rank 32": ["adapter.rank=32"],
    "batch 4": ["training.batch_size=4"],
    "batch 16": ["training.batch_size=16"],
    "batch 32": ["training.batch_size=32"],
    "self-attention only": ["adapter.targets=self_attention"],
    "attention and feed-forward": ["adapter.targets=attention_ff"],
    "logit-normal timesteps": ["objective.timesteps=logit_normal"],
    "timesteps shifted by 3": ["objective.timesteps=shifted", "objective.shift=3.0"],
    "timesteps not stratified": ["objective.stratified=false"],
    # peft's LoraConfig (r 8, alpha 8) with torch AdamW's default rate.
    "peft's defaults": ["adapter.rank=8", "training.learning_rate=1e-3", "training.batch_size=1", "training.schedule=constant", "training.warmup=0",
                        "objective.stratified=false", "data.caption_dropout=0.0", "training.steps=400"],
    # diffusers' DreamBooth LoRA scripts: rank 4, 1e-4, batch 4, constant, 500 steps of warm-up cut to none.
    "the common scripts' defaults": ["adapter.rank=4", "training.learning_rate=1e-4", "training.batch_size=4", "training.schedule=constant",
                                     "training.warmup=0", "objective.stratified=false", "data.caption_dropout=0.0", "training.steps=400"],
}


def luminance(picture: Image.Image) -> np.ndarray:
    """(H, W, 1) in [0, 1], stretched to the picture set's own range."""
    grey = np.asarray(picture.convert("L"), np.float32)[..., None] / 255
    return np.clip((grey - 0.2) / 0.62, 0, 1)


def bundled(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), np.float32) / 255


def night(picture: Image.Image) -> np.ndarray:
    """Inverted: light subjects on a dark green ground."""
    light, dark = np.array([0.90, 0.96, 0.72], np.float32), np.array([0.02, 0.22, 0.18], np.float32)
    return light + (dark - light) * luminance(picture)


def two_inks(picture: Image.Image) -> np.ndarray:
    """Hard threshold, navy on mustard. (A pale ground would share white's bin of the coarse palette, and measure nothing.)"""
    ground, ink = np.array([0.93, 0.72, 0.20], np.float32), np.array([0.10, 0.12, 0.38], np.float32)
    share = np.clip((0.62 - luminance(picture)) * 8 + 0.5, 0, 1)
    return ground + (ink - ground) * share


STYLES = {"bundled duotone": bundled, "night": night, "two inks": two_inks}


def write_style(style: str, folder: Path) -> tuple[Path, list[str], np.ndarray]:
    """The training folder in this style; captions and true pictures (n, H, W, 3) of held-out subjects."""
    data = folder / "pictures"
    data.mkdir(parents=True)
    for path in sorted(mini_base.style_folder().glob("*.png")):
        Image.fromarray((STYLES[style](Image.open(path)) * 255).round().astype(np.uint8)).save(data / path.name)
        (data / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text(encoding="utf-8"), encoding="utf-8")
    held_out = sorted(mini_base.held_out_folder().glob("*.png"))[::2][:SUBJECTS]
    truth = np.stack([STYLES[style](Image.open(path)) for path in held_out])
    return data, [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in held_out], truth


def drawn(run: Path, step: int) -> np.ndarray:
    paths = sorted((run / "samples").glob(f"step-{step:06d}-*.png"))
    return np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) / 255 for path in paths])


class StyleReachedError(Exception):
    """Ends a run that has shown what was asked."""


class StyleWatch(Progress):
    """Notes the CPU seconds of the process after every optimizer step, and looks at the pictures that the run drew."""

    def __init__(self, run: Path, truth: np.ndarray) -> None:
        self.run, self.truth, self.ends, self.looks = run, truth, [], {}

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        yield self.after_step if name == "training" else (lambda count=1, note="": None)

    def after_step(self, count: int = 1, note: str = "") -> None:
        self.ends.append(time.process_time())
        # The pictures of a step are drawn after its step was told.
        if len(self.ends) > 1 and (len(self.ends) - 1) % EVERY == 0:
            self.look(len(self.ends) - 1)
            if self.reached():
                raise StyleReachedError

    def look(self, step: int) -> None:
        before, pictures = drawn(self.run, 0), drawn(self.run, step)
        self.looks[step] = palette_distance(pictures, self.truth) / palette_distance(before, self.truth), shape_score(pictures, self.truth)

    def reached(self) -> int | None:
        """The first of two looks in a row at which the style was there."""
        steps = sorted(self.looks)
        good = [palette <= 0.3 and shape >= 0.7 for palette, shape in (self.looks[step] for step in steps)]
        return next((step for step, now, then in zip(steps, good, good[1:], strict=False) if now and then), None)

    def step_seconds(self) -> float:
        """Median of a step; the few steps after which pictures were drawn do not shift it."""
        return float(np.median(np.diff(self.ends)))


def time_to_style(style: str, changes: list[str], folder: Path, cache: Path) -> str:
    """One run, as a cell of the table: CPU seconds and steps to the style, palette ratio and shape score at the last look."""
    data, prompts, truth = write_style(style, folder)
    recipe = load_recipe(find_recipe("mini/style"), [
        f"data.folder={json.dumps(str(data))}", f"data.trigger={json.dumps(mini_base.TRIGGER)}", f"samples.prompts={json.dumps(prompts, ensure_ascii=False)}",
        f"samples.every={EVERY}", "samples.steps=12", "samples.width=64", "samples.height=64", *changes])
    watch = StyleWatch(folder / "run", truth)
    try:
        train(recipe, folder / "run", progress=watch, cache_folder=cache)
        watch.look(recipe.training.steps)
    except StyleReachedError:
        pass
    step = watch.reached()
    palette, shape = watch.looks[max(watch.looks)]
    spent = f"{step * watch.step_seconds():.1f} ({step})" if step else f"not in {recipe.training.steps}"
    return f"{spent}, {palette:.2f}, {shape:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--styles", nargs="*", choices=STYLES, default=list(STYLES))
    chosen = parser.parse_args()
    print(f"| setting | {' | '.join(f'{style}: s (step), palette, shape' for style in chosen.styles)} |\n|---|{'---|' * len(chosen.styles)}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(chosen.only):
            cells = [time_to_style(style, SETTINGS[name], Path(work) / f"{number} {style}", Path(work) / "cache") for style in chosen.styles]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

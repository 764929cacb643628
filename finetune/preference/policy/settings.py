"""Every setting of `brushwork prefer train`: type, unit, default, range and meaning; checked before anything is loaded."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from data_tools.errors import BadInput
from data_tools.near_names import nearest
from finetune.errors import RecipeError
from finetune.recipe_settings import Section, setting
from finetune.training.run_folder import RunFolder

METHODS = ("dpo", "grpo", "draft", "refl")


class PreferenceSettings(Section):
    """One run. `held_out` prompts are never trained on; all curves and the guard look at them alone."""

    method: Literal["dpo", "grpo", "draft", "refl"] = setting(..., "dpo: from comparisons, no reward; grpo: clipped policy gradient; draft, refl: gradients of the reward itself.")
    data: str = setting(..., "Folder of candidates; its prompts are trained on, and for dpo its comparisons.")
    reward: str | None = setting(None, "Reward file, ready-made name or measure:NAME; dpo needs none and uses it for its curves only.")
    witness: str | None = setting(None, "A second reward that is only watched; left out: the second head of the reward file.")
    base: str = setting(..., "The base model: `mini`, a folder in diffusers layout, or a Hub id.")
    revision: str | None = setting(None, "Hub branch, tag or commit.")
    start: str | None = setting(None, "Adapter file to start from; it becomes part of the reference, and of the result.")
    rank: int = setting(8, "Rank of the LoRA.", "dimensions", ge=1, le=1024)
    targets: str = setting("attention", "Which modules get LoRA: a preset of the family, or a regular expression.")
    steps: int = setting(100, "Optimizer steps for dpo, draft and refl; rounds of drawing and learning for grpo.", "steps", ge=1, le=1_000_000)
    learning_rate: float = setting(1e-4, "Step size.", "", gt=0, le=1)
    warmup: int = setting(5, "Steps over which the learning rate rises.", "steps", ge=0, le=100_000)
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "lion8bit"] = setting("auto", "Optimizer.")
    gradient_clip: float = setting(1.0, "Largest gradient norm.", "", ge=0)
    seed: int = setting(0, "Names every random number of the run.", "", ge=0)
    batch_size: int = setting(8, "Pairs (dpo) or pictures (draft, refl) a step.", "", ge=1, le=4096)
    micro_batch: int = setting(8, "Pictures that go through the model at once.", "", ge=1, le=1024)
    prompts_per_round: int = setting(4, "grpo: prompts of one round.", "prompts", ge=1, le=4096)
    group: int = setting(8, "grpo: pictures of one prompt that are compared with each other.", "pictures", ge=2, le=1024)
    updates: int = setting(2, "grpo: optimizer steps on the pictures of one round.", "steps", ge=1, le=64)
    window: int = setting(3, "grpo: how many sampler steps are random and learned from; it moves through the sampler. 0: all.", "steps", ge=0, le=1000)
    window_rounds: int = setting(5, "grpo: rounds after which the window moves on by one step.", "rounds", ge=1)
    clip_nats: float = setting(0.2, "grpo: how far one update may move a transition's log-probability.", "nats per picture", gt=0)
    kl_weight: float = setting(0.1, "grpo: weight of the divergence from the base per step; draft, refl: weight of the squared distance from the base's prediction.", "", ge=0)
    beta: float = setting(2000.0, "dpo: how strongly the base holds; less moves further.", "", gt=0)
    gradient_steps: int = setting(1, "draft: last sampler steps that carry gradients.", "steps", ge=1, le=100)
    enough: float | None = setting(None, "refl: reward above which a picture is left alone, in the reward's own units.")
    sampler_steps: int = setting(10, "Denoising steps of training and of checks.", "steps", ge=2, le=1000)
    noise: float = setting(1.0, "Randomness of a random step: eta of DDPM, the noise level of a flow model (0.7 is usual).", "", gt=0, le=2)
    guidance: float = setting(1.0, "Classifier-free guidance while training and checking; 1 is none and half the work.", "", ge=1, le=50)
    height: int | None = setting(None, "Height of drawn pictures; left out: of the candidates.", "pixels", ge=16, le=8192)
    width: int | None = setting(None, "Width of drawn pictures; left out: of the candidates.", "pixels", ge=16, le=8192)
    held_out: float = setting(0.25, "Share of prompts kept for checks.", "share", gt=0, lt=1)
    check_every: int = setting(10, "Steps between checks on held-out prompts.", "steps", ge=1)
    check_seeds: int = setting(4, "Pictures a held-out prompt in a check.", "pictures", ge=2, le=256)
    check_prompts: int = setting(16, "Most held-out prompts in a check. Where at least 5 more are held out, the reward is reported on those, which chose nothing.", "prompts", ge=1, le=4096)
    max_kl: float = setting(30.0, "Most divergence from the base along the path; beyond it the run stops.", "nats per picture", gt=0)
    min_diversity: float = setting(0.8, "Least variety within a prompt, relative to the base.", "share", ge=0, le=1)
    max_drift: float = setting(1.25, "Most loss on the base's own pictures, relative to the base's.", "factor", ge=1)
    max_out_of_range: float = setting(0.05, "Most additional share of pixel values that are no valid colour.", "share", ge=0, le=1)

    def check(self) -> None:
        """Raises BadInput for combinations that cannot work."""
        if self.method != "dpo" and self.reward is None:
            raise BadInput(f"{self.method} needs a reward", where="--reward", fix="--reward FILE, or --method dpo, which learns from the comparisons alone")
        if self.gradient_steps > self.sampler_steps:
            raise BadInput(f"{self.gradient_steps} gradient steps of {self.sampler_steps} sampler steps", where="gradient_steps")
        if self.window > self.sampler_steps - 1:
            raise BadInput(f"a window of {self.window} does not fit into {self.sampler_steps} sampler steps, the last of which is never random", where="window")

    def differences(self, other: PreferenceSettings) -> list[str]:
        """Lines "name: old -> new" of what differs from `other` and shapes the adapter; more steps do not."""
        old, new = other.model_dump(), self.model_dump()
        return [f"{name}: {old[name]} -> {new[name]}" for name in new if name not in ("steps", "data") and old[name] != new[name]]


def build_settings(given: Mapping[str, Any], changes: Sequence[str] = ()) -> PreferenceSettings:
    """Settings from the command line: named options, then `name=value` changes. Raises RecipeError with every mistake."""
    values = {name: value for name, value in given.items() if value is not None}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise BadInput(f"{change!r} is not name=value", where="--set")
        values[name.strip().removeprefix("preference.")] = _value(text.strip())
    try:
        settings = PreferenceSettings(**values)
    except ValidationError as error:
        raise RecipeError([_problem(detail) for detail in error.errors()]) from None
    settings.check()
    return settings


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _problem(detail: Any) -> BadInput:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = nearest(name, PreferenceSettings.model_fields)
        return BadInput("there is no such setting", where=name, fix=f"did you mean {near}?" if near else f"known: {', '.join(PreferenceSettings.model_fields)}")
    meaning = PreferenceSettings.model_fields[name].description if name in PreferenceSettings.model_fields else None
    return BadInput(f"{detail['msg'][:1].lower()}{detail['msg'][1:]}", where=name, fix=meaning)


def dump_settings(settings: PreferenceSettings) -> str:
    """TOML that `read_settings` reads back equal."""
    lines = ["[preference]"]
    lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.model_dump().items() if value is not None]
    return "\n".join(lines) + "\n"


def settings_file(run: RunFolder) -> Path:
    """Where a run keeps its settings; not `recipe.toml`, which other verbs read as a training recipe."""
    return run.path / "preference.toml"


def read_settings(path: Path) -> PreferenceSettings:
    """The settings of a run folder. Raises BadInput where the file is not one of this command."""
    try:
        return PreferenceSettings(**tomllib.loads(path.read_text(encoding="utf-8"))["preference"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, ValidationError, TypeError):
        raise BadInput("this run was not started by `brushwork prefer train`", where=str(path), fix="choose another folder with --out") from None

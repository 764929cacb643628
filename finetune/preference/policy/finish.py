"""The end of a preference run: the best healthy adapter is exported, loaded into a fresh base, proven, drawn and scored."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_tools.atomic_files import whole_file
from data_tools.progress import Progress
from finetune.errors import TrainingError
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.policy.guard import Guard
from finetune.preference.policy.settings import PreferenceSettings
from finetune.preference.policy.state import best_file
from finetune.preference.rewards.preference_head import pixels_of
from finetune.preference.rewards.protocol import Reward
from finetune.preference.rewards.reward_files import load_reward
from finetune.randomness import generator
from finetune.resampling import FEWEST_PROMPTS, interval
from finetune.sampling import PictureRequest, save_picture
from finetune.training.memory import peak_memory_bytes
from finetune.training.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.adapters.verify import VerifyResult

SHEET_PICTURES = 12
USUAL_STEPS, USUAL_GUIDANCE = 20, 5.0


@dataclass(frozen=True)
class Finished:
    """What `prefer train` tells. reward_before, reward_after: mean over held-out prompts, drawn as a user draws, by the
    base and by the adapter file as loaded back; gain_interval: of their paired difference, 95 % over prompts, None for too few or where all gained alike.
    chosen_from: the number of checks from which those same prompts chose what was exported, 0 where they chose nothing.
    kl: of the exported adapter.  stopped: why the guard ended the run early, or None.  best_step: what was exported."""

    run: Path
    adapter: Path
    steps: int
    resumed_from: int | None
    seconds: float
    peak_memory_bytes: int
    verified: VerifyResult
    sheet: Path
    reward_before: float | None
    reward_after: float | None
    gain_interval: tuple[float, float] | None
    chosen_from: int
    kl: float
    stopped: str | None
    best_step: int
    held_out: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def gain_line(self) -> str:
        """What became of the reward, in words, with as much as the held-out prompts allow to say."""
        means = f"{self.reward_before:.3f} before, {self.reward_after:.3f} after"
        if self.gain_interval is None:
            said = f"{means} (no interval: too few held-out prompts, or all gained alike)"
        else:
            low, high = self.gain_interval
            said = f"{means} (gain {low:+.3f} to {high:+.3f}, 95 %)"
        return said + (f"; the same prompts, on other seeds, chose step {self.best_step} of {self.chosen_from} checks, so prompts that chose nothing may gain less" if self.chosen_from else "")

    def as_json(self) -> dict[str, Any]:
        """Keys as `train --json` has them, and those of preference."""
        return {**asdict(self), "verified": self.verified.as_json(), "left_out": [{"path": place, "reason": reason} for place, reason in self.left_out]}


def finish(settings: PreferenceSettings, run: RunFolder, base: Any, folder: CandidateFolder, conditionings: dict[str, Any],
           size: tuple[int, int], facts: tuple, began: float, progress: Progress) -> Finished:
    """Everything after the last step. Raises VerifyError, and TrainingError where no check was healthy."""
    from finetune.adapters.adapter_file import read_adapter
    from finetune.families.key_layouts import KEY_MAPS

    guard, held_out, left_out, stopped, shape, resumed_from = facts
    if guard.best is None:
        raise TrainingError(f"no check was healthy, so there is no adapter to keep: {stopped}", where=str(run.path), fix="lower learning_rate, raise kl_weight or beta, or check more often")
    run.adapter.mkdir(parents=True, exist_ok=True)
    with whole_file(run.adapter_file) as temporary:
        shutil.copyfile(best_file(run), temporary)
    progress.say("loading the adapter file into a fresh base and checking it")
    prompts = reported_prompts(settings, held_out)
    loaded, requests = LoadedBase(base), _requests(settings, folder, prompts, size)
    adapter = read_adapter(run.adapter_file, KEY_MAPS)
    if not adapter.text_encoders:
        loaded.conditionings = conditionings
    before = loaded.draw(requests, progress=progress)
    loaded.worn, loaded.conditionings = [(adapter, 1.0)], conditionings
    verified = _verify(loaded, run.adapter_file, shape, size, held_out[0])
    after = _draw_with(loaded, adapter, requests, progress)
    # Loaded again: a reward that reads a base's hidden states would keep the trained one in memory, and here reads the fresh one's.
    reward = load_reward(settings.reward, loaded) if settings.reward else None
    rewards = [_scores(reward, pictures, requests) for pictures in (before, after)]
    _write_pictures(run, requests, before, after, guard.best.step)
    finished = Finished(
        run=run.path, adapter=run.adapter_file, steps=guard.history[-1].step, resumed_from=resumed_from, seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory_bytes(loaded.device), verified=verified, sheet=run.sheet, reward_before=_mean(rewards[0]), reward_after=_mean(rewards[1]),
        gain_interval=_gain_interval(rewards, requests), chosen_from=choices(guard, stopped) if set(prompts) & set(held_out[:settings.check_prompts]) else 0, kl=guard.best.kl, stopped=stopped, best_step=guard.best.step, held_out=tuple(held_out), left_out=tuple(left_out),
    )
    _write_result(run, finished, guard)
    return finished


def _verify(loaded: LoadedBase, file: Path, shape: Sequence[int], size: tuple[int, int], prompt: str) -> VerifyResult:
    from finetune.adapters.verify import verify_adapter
    from finetune.objectives import NoiseLevel

    x = torch.randn(tuple(shape), generator=generator(0, "probe"))[None].to(loaded.device)
    level = NoiseLevel(torch.tensor([0.5]), torch.tensor([500.0]))

    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return loaded.family.predict(model, x, level, loaded.conditions([prompt]), [loaded.geometry(*size)])

    return verify_adapter(file, loaded.transformer, run)


def reported_prompts(settings: PreferenceSettings, held_out: Sequence[str]) -> Sequence[str]:
    """What the reward is reported on: held-out prompts that no check has looked at, where there are enough for an interval; else
    those of the checks. Few prompts are not divided further, since the guard needs them to see a fall of the witness."""
    unseen = held_out[settings.check_prompts:]
    return (unseen if len(unseen) >= FEWEST_PROMPTS else held_out)[:settings.check_prompts]


def choices(guard: Guard, stopped: str | None) -> int:
    """The number of healthy checks that were compared by their scores; 0 where there was nothing to choose from, or no score."""
    healthy = guard.history[1:-1] if stopped else guard.history[1:]
    has_scores = any(check.witness is not None or check.reward is not None for check in healthy)
    return len(healthy) if has_scores and len(healthy) > 1 else 0


def _requests(settings: PreferenceSettings, folder: CandidateFolder, prompts: Sequence[str], size: tuple[int, int]) -> list[PictureRequest]:
    """The prompts as the candidates were drawn, on seeds that no check has used."""
    first = next(iter(folder.candidates().values()))
    steps, guidance = first.steps or USUAL_STEPS, USUAL_GUIDANCE if first.guidance is None else first.guidance
    return [
        PictureRequest(prompt, 10_000 + number, *size, steps, guidance, first.negative)
        for prompt in prompts for number in range(settings.check_seeds)
    ]


def _draw_with(loaded: LoadedBase, adapter: AdapterFile, requests: Sequence[PictureRequest], progress: Progress) -> list[Any]:
    from finetune.adapters.attach import attach, detach

    attach(loaded.transformer, replace(adapter, text_encoders={}), "loaded")
    try:
        return loaded.draw(requests, progress=progress)
    finally:
        detach(loaded.transformer)


def _scores(reward: Reward | None, pictures: Sequence[Any], requests: Sequence[PictureRequest]) -> np.ndarray | None:
    if reward is None:
        return None
    with torch.no_grad():
        return np.array([float(reward.score(pixels_of([picture]), [request.prompt])[0]) for picture, request in zip(pictures, requests, strict=True)])


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else float(values.mean())


def _gain_interval(rewards: Sequence[np.ndarray | None], requests: Sequence[PictureRequest]) -> tuple[float, float] | None:
    if rewards[0] is None:
        return None
    return paired_interval(rewards[1] - rewards[0], [request.prompt for request in requests])


def paired_interval(differences: np.ndarray, prompts: Sequence[str], resamples: int = 4000) -> tuple[float, float] | None:
    """95 % interval of the mean difference, resampling prompts, never pictures: those of one prompt are alike. None for fewer
    than `resampling.FEWEST_PROMPTS` prompts and where all differ alike, which would have one of no width."""
    names = sorted(set(prompts))
    means = np.array([differences[[name == prompt for prompt in prompts]].mean() for name in names])
    drawn = np.random.default_rng(0).choice(means, (resamples, len(means))).mean(1)
    return interval(drawn, len(means))


def _write_pictures(run: RunFolder, requests: Sequence[PictureRequest], before: Sequence[Any], after: Sequence[Any], step: int) -> None:
    from finetune.sampling_sheets import before_after_sheet

    every = max(1, len(requests) // SHEET_PICTURES)
    chosen = range(0, len(requests), every)[:SHEET_PICTURES]
    for number, place in enumerate(chosen):
        for name, pictures in ((f"step-000000-{number:02d}", before), (f"step-{step:06d}-{number:02d}", after)):
            save_picture(pictures[place], run.samples / f"{name}.png", vars(requests[place]))
    with whole_file(run.sheet) as temporary:
        before_after_sheet([before[place] for place in chosen], [after[place] for place in chosen], [requests[place].prompt for place in chosen]).save(temporary, format="PNG")


def _write_result(run: RunFolder, finished: Finished, guard: Guard) -> None:
    from finetune.training.report import write_report

    result = finished.as_json()
    result |= {name: str(result[name]) for name in ("run", "adapter", "sheet")}
    result["checks"] = [check.to_record() for check in guard.history]
    reasons = {"exported": f"step {finished.best_step}, the best healthy check", "guard": finished.stopped or "nothing to object to"}
    if finished.reward_before is not None:
        reasons["reward on held-out prompts"] = finished.gain_line()
    reasons["divergence from the base"] = f"{finished.kl:.2f} nats a picture along the path"
    run.write_json(run.result, result | {"reasons": reasons})
    run.write_json(run.data_summary, {"pictures": len(finished.held_out), "left_out": result["left_out"]})
    write_report(run)

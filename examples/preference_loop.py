"""The whole preference loop on the embedded model, on a CPU: draw, rate, learn a reward, optimise, choose.

    python examples/preference_loop.py --out preference_demo          about four minutes of one core

The annotator is simulated: it likes warm pictures (more red than blue) and is wrong 15 % of the time. With real people,
`brushwork prefer rate preference_demo/candidates --annotator YOU` takes its place; everything else stays.

The embedded model draws nearly the same picture for every seed. So that there is something to choose from, candidates are
drawn with six random little adapters, as a studio would draw with several checkpoints of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

from data_tools.images import open_image
from data_tools.progress import for_terminal
from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.attach import attach, detach
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.preference.best_of import gain_over_one, rank_pictures
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.candidate_requests import AdapterUse, Prompt, prompt_id
from finetune.preference.candidates import CandidateSettings, make_candidates
from finetune.preference.comparisons import Judgement
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.policy.finish import Finished, paired_interval
from finetune.preference.policy.run import train_preference
from finetune.preference.policy.settings import build_settings
from finetune.preference.rewards.features import build_features
from finetune.preference.rewards.measures import warmth
from finetune.preference.rewards.preference_head import pixels_of, train_reward
from finetune.randomness import generator, python_random
from finetune.sampling import PictureRequest

RATED = ("dog face", "automobile", "red apple", "panda", "guitar", "umbrella", "rocket", "house", "sunflower", "airplane",
         "cat face", "fish", "tree", "banana", "lion", "key", "clock", "bus", "frog", "bread")
NEVER_RATED = ("strawberry", "rose", "bicycle", "rabbit face", "cow face", "ship", "gift", "camera", "mouse face", "carrot", "bell", "tomato")
MISTAKES = 0.15
DRAWING = (12, 1.0)  # steps and guidance; a picture costs half as much without guidance
WARMTH = "measure:warmth"
METHODS = {
    "dpo": {"steps": 30, "learning_rate": 2e-3, "beta": 500.0, "batch_size": 8, "check_every": 10},
    "grpo": {"steps": 8, "learning_rate": 1e-3, "prompts_per_round": 3, "group": 6, "kl_weight": 0.1, "window": 3, "window_rounds": 2, "check_every": 2},
    "draft": {"steps": 12, "learning_rate": 3e-4, "batch_size": 8, "kl_weight": 20.0, "check_every": 4},
}


def variation_adapters(base: LoadedBase, out: Path, count: int, strength: float = 0.8) -> tuple[tuple[AdapterUse, ...], ...]:
    """Random adapters of rank 2, one file each, written once."""
    variants = []
    for number in range(count):
        path = out / f"variation-{number}.safetensors"
        if not path.exists():
            inject_lora(base.transformer, base.family.facts.targets["attention"], 2, seed=number, name="variation")
            for place, (name, parameter) in enumerate(lora_parameters(base.transformer, "variation")):
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=strength, generator=generator(number, "variation", index=place))
            write_adapter(path, collect_lora(base.transformer, "variation"))
            detach(base.transformer)
        variants.append((AdapterUse(path),))
    return tuple(variants)


def rate_as_annotator(folder: CandidateFolder, mistakes: float, seed: int = 0) -> int:
    """Judge every pair of every prompt by warmth, with mistakes; the number of judgements."""
    chance, log, count = python_random(seed, "simulated annotator"), folder.log(), 0
    for identifier, group in folder.by_prompt().items():
        pixels = pixels_of([open_image(folder.picture(candidate)) for candidate in group])
        truth = dict(zip([candidate.id for candidate in group], warmth(pixels).tolist(), strict=True))
        for one, other in itertools.combinations(truth, 2):
            better, worse = (one, other) if truth[one] > truth[other] else (other, one)
            choice = worse if chance.random() < mistakes else better
            log.append(Judgement("simulated", "pair", identifier, group[0].prompt, (one, other), choice=choice, id=f"simulated-{one}-{other}"))
            count += 1
    return count


def held_out_warmth(base: LoadedBase, adapter: Path | None, seeds: int) -> tuple[np.ndarray, list[str]]:
    """True quality of pictures of prompts that were never rated, drawn by the base or with an adapter."""
    requests = [PictureRequest(prompt, 500 + seed, 64, 64, *DRAWING) for prompt in NEVER_RATED for seed in range(seeds)]
    if adapter is not None:
        attach(base.transformer, read_adapter(adapter), "tested")
    try:
        pictures = base.draw(requests, batch_size=12)
    finally:
        if adapter is not None:
            detach(base.transformer)
    return warmth(pixels_of(pictures)).numpy(), [request.prompt for request in requests]


def spread_within_prompts(values: np.ndarray, seeds: int) -> float:
    """Standard deviation among pictures of one prompt: the unit in which gains can be compared with those of other bases."""
    return float(np.sqrt(values.reshape(-1, seeds).var(1, ddof=1).mean()))


def best_of_eight(base: LoadedBase, reward: Path) -> dict[str, float]:
    """How much choosing the best of eight by the learned reward raises the true quality."""
    requests = [PictureRequest(prompt, 900 + seed, 64, 64, *DRAWING) for prompt in NEVER_RATED for seed in range(8)]
    pictures = base.draw(requests, batch_size=12)
    groups = [(prompt, pictures[8 * place:8 * place + 8]) for place, prompt in enumerate(NEVER_RATED)]
    ranked = rank_pictures(reward, groups, base)
    true = [warmth(pixels_of(group)).numpy() for _, group in groups]
    gains = np.array([values[one.best] - values.mean() for values, one in zip(true, ranked, strict=True)])
    low, high = paired_interval(gains, list(NEVER_RATED))
    return {"true_gain": float(gains.mean()), "low": low, "high": high, "reward_gain": gain_over_one(ranked).mean, "spread": spread_within_prompts(np.concatenate(true), 8)}


def optimise(method: str, base: str, folder: Path, reward: Path, out: Path, changes: dict) -> Finished:
    """One method with the settings above."""
    settings = {"method": method, "data": str(folder), "base": base, "reward": str(reward), "check_seeds": 3, "sampler_steps": 8, "micro_batch": 12,
                "max_kl": 30.0, **METHODS[method], **changes}
    return train_preference(build_settings(settings), out, progress=for_terminal())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="mini")
    parser.add_argument("--out", type=Path, default=Path("preference_demo"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    base, folder, began = LoadedBase.named(options.base), options.out / "candidates", time.monotonic()
    settings = CandidateSettings(1, steps=DRAWING[0], guidance=DRAWING[1], height=64, width=64, batch_size=12, variants=variation_adapters(base, options.out, 6))
    make_candidates(base, [Prompt(prompt_id(text), text) for text in RATED], settings, folder, for_terminal())
    print(f"{rate_as_annotator(CandidateFolder(folder), MISTAKES)} judgements, {MISTAKES:.0%} of them wrong")
    report = train_reward(CandidateFolder(folder), build_features("pixels"), options.out / "reward.safetensors", witness_features=build_features("latents", base=base))
    results = {"reward": {"accuracy": report.accuracy, "interval": report.accuracy_interval, "calibration_error": report.calibration_error, "warnings": report.warnings}}
    results["best_of_8"] = best_of_eight(base, report.file)
    before, prompts = held_out_warmth(base, None, options.seeds)
    print(json.dumps(results, indent=1))
    for method in options.methods:
        run = options.out / method
        finished = optimise(method, options.base, folder, report.file, run, {})
        after, _ = held_out_warmth(base, finished.adapter, options.seeds)
        low, high = paired_interval(after - before, prompts)
        results[method] = {"warmth_before": float(before.mean()), "warmth_after": float(after.mean()), "low": low, "high": high, "kl": finished.kl,
                           "stopped": finished.stopped, "steps": finished.steps, "seconds": round(finished.seconds), "sheet": str(finished.sheet)}
        print(method, json.dumps(results[method], indent=1))
    results["minutes"] = {"wall": round((time.monotonic() - began) / 60, 1), "processor": round(time.process_time() / 60, 1)}
    print(f"finished in {results['minutes']['wall']} minutes, {results['minutes']['processor']} of them on the processor; the sheets lie in {options.out}/METHOD/before_after.png")
    (options.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

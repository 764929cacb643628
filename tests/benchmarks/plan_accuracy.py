"""The plan's peak memory beside the measured one, over models and settings.

    python -m tests.benchmarks.plan_accuracy FOLDER [--large] [--start N] [--only N]

Every combination is planned in one forked process and trained for two steps in another, on random bases kept in FOLDER.
--large adds the model of 1.5 billion parameters. Prints one row a combination, and the errors' median and extremes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "hidden_size": 128, "num_layers": 6, "mlp_ratio": 2.0, "cross_attention_dim": 128, "cross_attention_dim_t5": 128, "pooled_projection_dim": 128}
MIDDLE = {"num_attention_heads": 8, "attention_head_dim": 64, "hidden_size": 512, "num_layers": 8, "mlp_ratio": 4.0}
WIDE = {"num_attention_heads": 12, "attention_head_dim": 64, "hidden_size": 768, "num_layers": 12, "mlp_ratio": 4.0}
BASES = {"small": SMALL, "middle": MIDDLE, "wide": WIDE, "large": {}}

# (base, hold, pixels, batch, rank, checkpointed blocks)
COMBINATIONS = [
    ("small", "fp32", 64, 1, 4, 0), ("small", "fp32", 128, 8, 16, 0), ("small", "bf16", 256, 4, 16, 0), ("small", "fp32", 256, 8, 16, 6),
    ("small", "nf4", 128, 4, 8, 3), ("small", "streamed", 256, 2, 64, 0), ("small", "int8", 128, 2, 8, 0), ("small", "fp32", 256, 16, 4, 0),
    ("middle", "fp32", 128, 1, 16, 0), ("middle", "fp32", 256, 4, 16, 0), ("middle", "fp32", 256, 4, 16, 8), ("middle", "bf16", 256, 2, 16, 0),
    ("middle", "nf4", 256, 2, 16, 4), ("middle", "streamed", 256, 1, 64, 8), ("middle", "int8", 256, 1, 16, 0), ("middle", "fp32", 512, 1, 16, 0),
    ("middle", "fp32", 256, 8, 16, 4), ("middle", "bf16", 128, 4, 32, 8),
    ("wide", "fp32", 128, 1, 16, 0), ("wide", "fp32", 256, 2, 16, 0), ("wide", "fp32", 256, 2, 16, 12), ("wide", "bf16", 256, 1, 64, 6),
    ("wide", "nf4", 256, 2, 16, 12), ("wide", "streamed", 256, 1, 16, 0), ("wide", "int8", 256, 1, 16, 12), ("wide", "fp32", 512, 1, 16, 6),
]
LARGE = [("large", "nf4", 256, 1, 16, 40), ("large", "streamed", 256, 1, 16, 40), ("large", "fp32", 256, 1, 16, 40)]


def import_all() -> None:
    """What a run imports, so that forked children need not."""
    import diffusers
    import peft  # noqa: F401
    import transformers

    import finetune.training.plan
    import finetune.training.run  # noqa: F401

    for name in ("HunyuanDiTPipeline", "HunyuanDiT2DModel", "AutoencoderKL", "DDPMScheduler"):
        getattr(diffusers, name)
    for name in ("BertModel", "T5EncoderModel", "BertTokenizer"):
        getattr(transformers, name)


def forked(work: Callable[[], Any]) -> Any:
    """The JSON result of `work` in a child process, whose memory is its own from here on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps({"result": work()}).encode())
            code = 0
        except BaseException as problem:  # a child must never return into the parent's program
            os.write(writing, json.dumps({"problem": f"{type(problem).__name__}: {problem}"[:300]}).encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        found = json.loads(answer.read() or b'{"problem": "the process was killed"}')
    os.waitpid(child, 0)
    if "problem" in found:
        raise RuntimeError(found["problem"])
    return found["result"]


def planned(recipe: dict) -> list:
    """[peak, largest phase, parameters]"""
    from finetune.recipe import load_recipe
    from finetune.training.plan import plan

    made = plan(load_recipe(recipe))
    return [made.memory_bytes["peak"], max(made.phases_bytes, key=made.phases_bytes.get), made.parameters]


def trained(recipe: dict, run: Path, cache: Path) -> int:
    """Peak bytes of a real run. An adapter of two steps on random weights need not pass the proof; the run went through all of it."""
    import torch

    from finetune.errors import VerifyError
    from finetune.recipe import load_recipe
    from finetune.training.memory import peak_memory_bytes
    from finetune.training.run import train

    try:
        return train(load_recipe(recipe), run, cache_folder=cache).peak_memory_bytes
    except VerifyError:
        return peak_memory_bytes(torch.device("cpu"))


def pictures(folder: Path, pixels: int) -> Path:
    """Sixteen captioned squares."""
    from PIL import Image

    target = folder / f"pictures-{pixels}"
    target.mkdir(parents=True, exist_ok=True)
    for number in range(16):
        Image.new("RGB", (pixels, pixels), (number * 15, 90, 200 - number * 10)).save(target / f"{number}.png")
        (target / f"{number}.txt").write_text(f"a plain square, number {number}")
    return target


def measure(folder: Path, number: int, combination: tuple) -> tuple[float, float, str, int]:
    """(estimated, measured) peak bytes, the phase that the plan says is the largest, parameters."""
    import torch

    from tests.benchmarks.random_base import hunyuan_dit

    base, hold, pixels, batch, rank, blocks = combination
    model = folder / base
    forked(lambda: str(hunyuan_dit(model, torch.bfloat16, **BASES[base])))
    recipe = {
        "base": {"model": str(model), "hold": hold}, "data": {"folder": str(pictures(folder, pixels)), "resolution": pixels}, "adapter": {"rank": rank},
        "training": {"steps": 2, "batch_size": batch, "checkpointed_blocks": blocks, "optimizer": "adamw", "checkpoint_every": 0},
        "samples": {"steps": 2, "prompts": ["a square"]},
    }
    estimated, phase, parameters = forked(lambda: planned(recipe))
    measured = forked(lambda: trained(recipe, folder / f"run-{os.getpid()}-{number}", folder / "encodings"))
    return estimated, measured, phase, parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--start", type=int, default=0, help="leave out the first N combinations")
    parser.add_argument("--only", type=int, help="stop after the Nth combination")
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = str(options.folder / "scan")
    import_all()
    errors = []
    # A large stride, so that a run of the first N has some of every size.
    combinations = [COMBINATIONS[number * 9 % len(COMBINATIONS)] for number in range(len(COMBINATIONS))] + (LARGE if options.large else [])
    print("| parameters | hold | pixels | batch | rank | checkpointed | planned MiB | measured MiB | error | peak while |\n|---|---|---|---|---|---|---|---|---|---|")
    for number, combination in list(enumerate(combinations))[options.start:options.only]:
        _, hold, pixels, batch, rank, blocks = combination
        try:
            estimated, measured, phase, parameters = measure(options.folder, number, combination)
        except RuntimeError as problem:
            print(f"| {combination} | failed: {problem} |", flush=True)
            continue
        errors.append(estimated / measured - 1)
        print(f"| {parameters / 1e6:.1f} M | {hold} | {pixels} | {batch} | {rank} | {blocks} | {estimated / 2**20:.0f} | {measured / 2**20:.0f} | {errors[-1]:+.1%} | {phase} |", flush=True)
    print(f"{len(errors)} combinations: median error {statistics.median(map(abs, errors)):.1%}, largest {max(errors):+.1%}, lowest {min(errors):+.1%}")


if __name__ == "__main__":
    main()

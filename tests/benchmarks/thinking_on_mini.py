"""Does thinking help the embedded model? Same prompts and seeds with and without, checked by rules, paired intervals.

    python -m tests.benchmarks.thinking_on_mini prompts --packages NODE_MODULES --out FILE
    python -m tests.benchmarks.thinking_on_mini adapters --out FILE

`prompts`: compositional prompts that were held out from the base's training. Checks that need no judgement: is the
ground the one asked for (nearest of 14 named colours to the rim); is the nearest of the 48 true pictures the one asked
for (16x16 luminance); how like the fainter of two asked-for things a picture is; how near an object's colour is.
`adapters`: LoRAs trained with plain captions, with thought captions, and with thinking tokens (with their control: the
same slots filled, not trained), measured on the style's held-out pictures.

Measured once, 20 steps, guidance 3, one seed a prompt; difference to the plain prompts with its 95 % interval over prompts:

| held-out prompts | check | plain | `--think` (rules) | all that was thought, in full |
|---|---|---|---|---|
| background and object (48) | right ground | 1.00 | 1.00, same prompts | 0.88, -0.13 (-0.23 .. -0.04) |
| background and object (48) | right subject | 1.00 | 1.00, same prompts | 0.35, -0.65 (-0.77 .. -0.52) |
| two objects (24) | nearest is one of the two | 0.92 | 0.71, -0.21 (-0.38 .. -0.08) | 0.21, -0.71 (-0.88 .. -0.50) |
| two objects (24) | likeness of the fainter | 0.66 | 0.65, -0.01 (-0.02 .. -0.00) | 0.55, -0.11 (-0.15 .. -0.07) |
| colour and object (24) | distance to the colour, less is better | 0.220 | 0.220, same prompts | 0.176, -0.044 (-0.075 .. -0.012) |

So on this base thinking is no gain: it was trained on captions of a few words, and more words draw away from the subject.
The rules therefore leave a prompt of one thing alone. They were changed after a first look at the last column, which is
what they wrote before, and half of the two-object prompts got "to the left of" in place of "and" then, so that there
is something to think about: none of this is a test on unseen prompts. Whether larger bases gain was not measured.

Adapters, measured once: 200 steps of the mini recipe each, the style's 24 held-out subjects at guidance 2.5, one seed; palette
distance to the style's pictures (less is better) and share of pictures whose nearest true picture is the one asked for:

| adapter | prompts | palette distance | difference to plain | right subject | difference to plain |
|---|---|---|---|---|---|
| none (the base) | plain | 0.908 | +0.724 (+0.694 .. +0.754) | 0.96 | -0.04 (-0.13 .. 0.00) |
| plain captions | plain | 0.185 | | 1.00 | |
| plain captions | thought, in full | 0.374 | +0.189 (+0.138 .. +0.247) | 0.25 | -0.75 (-0.92 .. -0.58) |
| trained with traces | thought, in full | 0.195 | +0.010 (-0.004 .. +0.024) | 0.96 | -0.04 (-0.13 .. 0.00) |
| plain captions and 4 thinking tokens | plain | 0.188 | +0.003 (-0.000 .. +0.006) | 1.00 | 0.00 |
| the same, tokens put back to their mean | plain | 0.186 | +0.001 (-0.005 .. +0.006) | 1.00 | 0.00 |

No variant gains over plain captions. What does show: long thought prompts ruin an adapter that was trained on short
captions, and training with traces (`data.thinking = "trace"`) undoes that almost wholly. Captions in training and
prompts in use must have one form. Thinking tokens change nothing that can be told from their untrained control.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.progress import PlainProgress
from data_tools.thinking_rules import think_by_rules
from data_tools.thinking_text import element_words, joined, relation_sentences
from finetune.evaluation.intervals import bootstrap_mean
from finetune.evaluation.pixel_features import oklab, palette_histogram, total_variation
from finetune.families.base_models import locate_base
from finetune.mini_base import TRIGGER, held_out_folder, style_folder
from finetune.mini_base.build.measures import ground_name, shape_vectors
from finetune.mini_base.build.subjects import COLOURS, NAMED, is_held_out

STEPS, GUIDANCE, SEED, SIZE = 20, 3.0, 7000, 64
OBJECT_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")


def drawn(base: Any, prompts: list[str], adapter: Path | None = None, guidance: float = GUIDANCE) -> np.ndarray:
    """(n, 64, 64, 3) in 0..1; the seed of a picture is its place, so that variants are paired."""
    import torch

    from finetune.adapters.adapter_file import read_adapter
    from finetune.adapters.attach import attach
    from finetune.sampling import PictureRequest, draw, encode_all
    from finetune.thinking.tokens import conditionings_with_tokens, tokens_of

    encoders = base.family.load(base.folder, frozenset({"text"}), torch.float32)
    conditionings = encode_all(base.family, encoders, [*prompts, ""])
    pipeline = base.family.load(base.folder, frozenset({"transformer", "vae"}), torch.float32)
    if adapter is not None:
        file = read_adapter(adapter)
        attach(pipeline.transformer, file, "studied")
        conditionings = conditionings_with_tokens(conditionings, tokens_of(file, adapter, base.family.facts.text_stream), {""})
    requests = [PictureRequest(prompt, SEED + index, SIZE, SIZE, STEPS, guidance) for index, prompt in enumerate(prompts)]
    pictures = draw(base.family, pipeline, requests, conditionings, batch_size=16, progress=PlainProgress())
    return np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])


def thought(prompts: list[str]) -> list[str]:
    """The same prompts as `--think` draws them."""
    return [think_by_rules(prompt).enhanced for prompt in prompts]


def in_full(prompt: str) -> str:
    """The prompt followed by all that was thought: elements, relations, background and layout, whether they add anything or not."""
    record = think_by_rules(prompt)
    comma = "，" if record.language == "zh" else ", "
    elements = comma.join(element_words(element, record.language) or element.name for element in record.elements)
    return joined(prompt, [text for text in (*relation_sentences(record), elements, record.environment, record.composition, comma.join(record.style)) if text], record.language)


def variants(base: Any, prompts: list[str]) -> dict[str, np.ndarray]:
    """Pictures of the prompts as they are, as `--think` draws them, and with everything in full; equal texts are drawn once."""
    pictures = {"plain": drawn(base, prompts)}
    shipped = thought(prompts)
    changed = [index for index, (one, other) in enumerate(zip(prompts, shipped, strict=True)) if one != other]
    pictures["thinking"] = drawn(base, shipped) if changed else pictures["plain"]
    pictures["thinking in full"] = drawn(base, [in_full(prompt) for prompt in prompts])
    return pictures


def interval(values: np.ndarray) -> dict[str, float | None]:
    found = bootstrap_mean(np.asarray(values, dtype=float), [str(index) for index in range(len(values))], "thinking")
    return {"value": round(found.value, 4), "low": found.low and round(found.low, 4), "high": found.high and round(found.high, 4), "prompts": found.prompts}


def paired(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means by variant, and the mean difference of each to the plain prompts with its interval."""
    plain = np.asarray(scores["plain"], float)
    return {name: {"mean": round(float(np.mean(own)), 4), "difference": interval(np.asarray(own, float) - plain)} for name, own in scores.items()}


def true_shapes(packages: Path) -> dict[str, np.ndarray]:
    """Ground name -> shape vectors of the 48 true pictures on it."""
    from finetune.mini_base.build.measure import true_pictures
    from finetune.mini_base.build.rasters import ICON_EDGE, rasterise_all
    from finetune.mini_base.build.subjects import load_subjects

    subjects = load_subjects(packages)[: len(NAMED)]
    icons = rasterise_all(packages, [subject.icon for subject in subjects])[ICON_EDGE[SIZE, SIZE]]
    return {colour: shape_vectors(true_pictures(icons, colour, (SIZE, SIZE))) for colour in COLOURS}


def grounds(base: Any, shapes: dict[str, np.ndarray]) -> dict[str, Any]:
    """One never trained pair of subject and ground for each of the 48 subjects; English and Chinese in turns."""
    colours = [name for name in COLOURS if name != "white"]
    pairs = [(row, next(c for c in colours[row % 13 :] + colours if is_held_out(row, c))) for row in range(len(NAMED))]
    prompts = [f"{COLOURS[c][1]}背景上的{NAMED[row][2]}" if row % 3 == 2 else f"{NAMED[row][1]} on a {c} background" for row, c in pairs]
    ground, shape = {}, {}
    for name, pictures in variants(base, prompts).items():
        ground[name] = np.array([ground_name(picture) == c for picture, (_, c) in zip(pictures, pairs, strict=True)])
        vectors = shape_vectors(pictures)
        shape[name] = np.array([(vectors[i] @ shapes[c].T).argmax() == row for i, (row, c) in enumerate(pairs)])
    return {"right ground": paired(ground), "right subject": paired(shape), "example": [prompts[0], thought(prompts)[0], in_full(prompts[0])]}


def two_objects(base: Any, shapes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Two subjects in one picture, which the base has never seen: how like the fainter of the two the picture is."""
    pairs = [(row, (row * 7 + 11) % len(NAMED)) for row in range(0, len(NAMED), 2)]
    # A relation gives `--think` something to say; a bare "and" does not.
    prompts = [f"a {NAMED[a][1]} to the left of a {NAMED[b][1]}" if i % 2 else f"a {NAMED[a][1]} and a {NAMED[b][1]}" for i, (a, b) in enumerate(pairs)]
    likeness, either = {}, {}
    for name, pictures in variants(base, prompts).items():
        cosines = shape_vectors(pictures) @ shapes["white"].T
        likeness[name] = np.array([min(cosines[i, a], cosines[i, b]) for i, (a, b) in enumerate(pairs)])
        either[name] = np.array([cosines[i].argmax() in pair for i, pair in enumerate(pairs)])
    return {"likeness of the fainter": paired(likeness), "nearest is one of the two": paired(either), "example": [prompts[0], thought(prompts)[0], in_full(prompts[0])]}


def object_colours(base: Any) -> dict[str, Any]:
    """A subject in a colour of its own: distance of what is not ground to that colour. The base knows colours of grounds only."""
    asked = [(row, OBJECT_COLOURS[row % len(OBJECT_COLOURS)]) for row in range(1, len(NAMED), 2)]
    prompts = [f"a {colour} {NAMED[row][1]} on a white background" for row, colour in asked]
    distances = {}
    for name, pictures in variants(base, prompts).items():
        found = []
        for picture, (_, colour) in zip(pictures, asked, strict=True):
            lab = oklab((picture * 255).astype(np.uint8)).reshape(-1, 3)
            wanted = oklab(np.array([[COLOURS[colour][0]]], np.uint8))[0, 0]
            shown = lab[np.linalg.norm(lab - np.median(lab[:SIZE], axis=0), axis=1) > 0.1]
            found.append(np.linalg.norm(shown.mean(0) - wanted) if len(shown) else 1.0)
        distances[name] = np.array(found)
    return {"distance to the colour": paired(distances), "example": [prompts[0], thought(prompts)[0], in_full(prompts[0])]}


def prompts_study(packages: Path) -> dict[str, Any]:
    base, shapes = locate_base("mini"), true_shapes(packages)
    return {"held-out background and object": grounds(base, shapes), "two objects": two_objects(base, shapes), "colour and object": object_colours(base)}


def trained(name: str, work: Path, steps: int, **settings: Any) -> Path:
    """A LoRA for the bundled style; returns its folder. settings: recipe keys."""
    from finetune.recipe import load_recipe
    from finetune.training.run import train

    overrides = [f"training.steps={steps}", "training.checkpoint_every=0"] + [f"{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(Path("recipes/mini/style.toml"), [f"data.folder={work / 'pictures'}", f"data.trigger={TRIGGER}", *overrides])
    return train(recipe, work / name, cache_folder=work / "cache", progress=PlainProgress()).adapter


def untrained_tokens(adapter: Path, work: Path) -> Path:
    """The control: a trained LoRA whose tokens are put back to a constant, so that the slots are filled and say nothing learned."""
    import torch

    from finetune.adapters.adapter_file import read_adapter, write_adapter
    from finetune.thinking.tokens import KEY, read_tokens, write_tokens

    tokens = read_tokens(adapter)
    folder = work / "control"
    stated = write_tokens(folder, replace(tokens, states=torch.full_like(tokens.states, float(tokens.states.mean()))))
    write_adapter(folder / "pytorch_lora_weights.safetensors", read_adapter(adapter).with_provenance(**{KEY: stated}))
    return folder


def adapters_study(work: Path, steps: int) -> dict[str, Any]:
    """Held-out palette distance and shape score of each variant at the same seeds, paired with the plain LoRA."""
    import shutil

    from PIL import Image

    from data_tools.thinking import thinking_path, write_record

    shutil.copytree(style_folder(), work / "pictures", dirs_exist_ok=True)
    for file in sorted((work / "pictures").glob("*.txt")):
        caption = file.read_text("utf-8").strip()
        write_record(thinking_path(file.with_suffix(".png")), replace(think_by_rules(caption), enhanced=in_full(caption)))
    truths = sorted(held_out_folder().glob("*.png"))
    true_pictures = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) / 255 for path in truths])
    captions = [path.with_suffix(".txt").read_text("utf-8").strip() for path in truths]
    plain = [f"{TRIGGER}, {caption}" for caption in captions]
    # The captions name one thing each, which `--think` leaves alone; traces are trained and used in full here.
    thinking = [f"{TRIGGER}, {in_full(caption)}" for caption in captions]
    base = locate_base("mini")
    tokens = trained("tokens", work, steps, **{"adapter.thinking_tokens": 4})
    without, traces = trained("plain", work, steps), trained("trace", work, steps, **{"data.thinking": "trace"})
    studied = {"base": (None, plain), "plain": (without, plain), "plain, thinking in use": (without, thinking), "trained with traces, thinking in use": (traces, thinking),
                "thinking tokens": (tokens, plain), "thinking tokens, filled with their mean": (untrained_tokens(tokens, work), plain)}
    style = np.mean([palette_histogram((picture * 255).astype(np.uint8), 4) for picture in true_pictures], axis=0)
    scores = {}
    for name, (adapter, prompts) in studied.items():
        pictures = drawn(base, prompts, adapter, 2.5)
        distance = np.array([total_variation(palette_histogram((picture * 255).astype(np.uint8), 4), style) for picture in pictures])
        right = (shape_vectors(pictures) @ shape_vectors(true_pictures).T).argmax(1) == np.arange(len(pictures))
        scores[name] = {"palette": distance, "shape": right.astype(float)}
    return {name: {measure: {"mean": round(float(values.mean()), 4), "difference to plain": interval(values - scores["plain"][measure])} for measure, values in own.items()}
            for name, own in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("prompts", "adapters"))
    parser.add_argument("--packages", type=Path, help="node_modules with the packages of the embedded model's build")
    parser.add_argument("--work", type=Path, default=Path("thinking_study"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = prompts_study(options.packages) if options.study == "prompts" else adapters_study(options.work, options.steps)
    options.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()

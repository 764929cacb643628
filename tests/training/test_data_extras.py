"""Masks, regularisation pictures, further folders, several resolutions and noise offset in whole runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from data_tools.progress import Progress
from finetune.cli.run_arguments import wanted_recipe
from finetune.errors import BadInput
from finetune.families.base_models import locate_base
from finetune.objectives import LossWeighting
from finetune.randomness import generator, stable_seed
from finetune.training.encode import encode_everything
from finetune.training.encoding_cache import EncodingCache
from finetune.training.held_out_loss import fixed_positions
from finetune.training.masks import place_weights
from finetune.training.run import train
from finetune.training.training_set import build_training_set
from tests.training.small_job import Crash, CrashingProgress, small_recipe, write_pictures

ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


def masked_pictures(folder, count, first=0):
    """Pictures number `first` and later, `count` of them, the first with a mask."""
    write_pictures(folder, first + count)
    for path in [path for number in range(first) for path in folder.glob(f"picture{number}.*")]:
        path.unlink()
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((10, 10, 40, 40), fill=255)
    mask.save(folder / f"picture{first}_mask.png")
    return folder


@pytest.fixture(scope="module")
def extras(tiny_base, tmp_path_factory):
    """A recipe with everything at once."""
    folder = tmp_path_factory.mktemp("extras")
    masked_pictures(folder / "main", 3)
    write_pictures(folder / "more", 1)
    masked_pictures(folder / "held out", 4, first=3)
    return small_recipe(
        tiny_base, folder / "main", data__also=[{"folder": str(folder / "more"), "repeats": 2, "weight": 0.5}], data__resolution=[32, 64],
        data__masked_loss=True, data__unmasked_weight=0.05, data__regularisation_prompt="a disc", data__regularisation_count=3, data__regularisation_weight=0.7,
        validation__folder=str(folder / "held out"), validation__every=2, validation__levels=3, training__ema_decay=0.5,
        objective__noise_offset=0.1, training__steps=6, training__checkpoint_every=2, training__keep_checkpoints=9, samples__every=3)


@pytest.fixture(scope="module")
def unbroken(extras, encodings_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    train(extras, out, cache_folder=encodings_folder)
    return out


@pytest.mark.parametrize("checkpoints, pictures", [(2, 3), (0, 1)], ids=["between steps", "while drawing regularisation pictures"])
def test_a_run_that_was_killed_ends_bit_identical(extras, unbroken, encodings_folder, tmp_path, checkpoints, pictures):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for path in [run / "result.json", run / ADAPTER, *sorted((run / "regularisation").glob("*.png"))[pictures:]]:
        path.unlink()
    for step in sorted((run / "checkpoints").iterdir())[checkpoints:]:
        shutil.rmtree(step)
    result = train(extras, run, resume=True, cache_folder=encodings_folder)
    assert result.resumed_from == (4 if checkpoints else None)
    assert (run / ADAPTER).read_bytes() == (unbroken / ADAPTER).read_bytes()
    assert (run / "validation.jsonl").read_bytes() == (unbroken / "validation.jsonl").read_bytes()
    assert [(path.name, path.read_bytes()) for path in sorted((run / "regularisation").iterdir())] == [(path.name, path.read_bytes()) for path in sorted((unbroken / "regularisation").iterdir())]


def test_a_run_that_was_killed_while_drawing_regularisation_pictures_goes_on_by_its_folder(extras, unbroken, encodings_folder, tmp_path):
    with pytest.raises(Crash):
        train(extras, tmp_path / "run", progress=CrashingProgress(2, "drawing regularisation pictures"), cache_folder=encodings_folder)
    assert len(list((tmp_path / "run" / "regularisation").glob("*.png"))) == 2
    goes_on = wanted_recipe(str(tmp_path / "run"), None, None, None, None)
    assert goes_on.recipe == extras and goes_on.run == tmp_path / "run"
    train(goes_on.recipe, goes_on.run, resume=True, cache_folder=encodings_folder)
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (unbroken / ADAPTER).read_bytes()


def test_the_run_says_what_was_trained_and_what_was_only_kept(unbroken):
    data = json.loads((unbroken / "data.json").read_text())
    assert data["pictures"] == 4 and data["masks"] == 1
    assert [Path(path).name for path in data["held_out"]] == [f"picture{number}.png" for number in range(3, 7)]
    assert [Path(path).name for path in data["regularisation"]] == ["00000.png", "00001.png", "00002.png"]
    assert [(row["pictures"], row["seen"], row["weight"], row["regularisation"]) for row in data["folders"]] == [(3, 3, 1.0, False), (1, 2, 0.5, False), (3, 3, 0.7, True)]
    assert {"64x64", "32x32"} <= {row["size"] for row in data["sizes"]}
    page = (unbroken / "report.html").read_text()
    assert "3 regularisation pictures" in page and "00002.png" in page and "1 of them where their masks say" in page and "<td>32x32</td>" in page
    assert (unbroken / "regularisation" / "00000.txt").read_text() == "a disc\n"
    assert len({path.read_bytes() for path in (unbroken / "regularisation").glob("*.png")}) == 3


def loss_by_hand(recipe, cache_folder):
    """Of the first step of a run with one picture: the base's own prediction, weighed as the settings say."""
    base, cache = locate_base(recipe.base.model), EncodingCache(cache_folder)
    training_set = build_training_set(recipe, base.family.facts, Progress())
    encodings = encode_everything(base, training_set, [], recipe.data, cache, torch.device("cpu"), torch.float32, 0, Progress())
    pipeline = base.family.load(base.folder, frozenset({"transformer"}), torch.float32)
    objective = base.family.objective(pipeline, None, LossWeighting())
    encoded, seed = encodings.latents(0), recipe.training.seed
    latents = (encoded.mean + encoded.std * torch.randn(encoded.mean.shape, generator=generator(seed, "latent", 0, 0)))[None]
    noise = torch.randn(encoded.mean.shape, generator=generator(seed, "noise", 0, 0))[None]
    offset = torch.randn(len(encoded.mean), 1, 1, generator=generator(seed, "noise offset", 0, 0))
    noise = noise + recipe.objective.noise_offset * offset[None]
    level = objective.level(torch.rand(1, generator=generator(seed, "noise level", 0)), latents)
    caption = encodings.conditioning(training_set.captions.variants[0][0])
    with torch.no_grad():
        predicted = base.family.predict(pipeline.transformer, objective.add_noise(latents, noise, level), level, [caption], [training_set.pictures[0].geometry])
    errors = (predicted - objective.target(latents, noise, level)).square()
    mask = encodings.mask(0)
    return (errors if mask is None else errors * place_weights(mask, recipe.data.unmasked_weight)).mean().item() * training_set.pictures[0].weight


@pytest.mark.parametrize("size", [64, [32, 64]])
def test_the_held_out_loss_counts_where_masks_say_at_every_size_that_is_trained_as_its_folder_does(tiny_base, tmp_path, encodings_folder, size):
    held_out = masked_pictures(tmp_path / "held out", 1, first=3)
    also = [{"folder": str(masked_pictures(held_out / "details", 1, first=4)), "repeats": 3, "weight": 0.5}]
    recipe = small_recipe(tiny_base, write_pictures(tmp_path / "main", 2), data__also=also, data__resolution=size, data__masked_loss=True, validation__folder=str(held_out), validation__levels=2,
                          training__steps=1)
    train(recipe, tmp_path / "run", cache_folder=encodings_folder)
    first = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    base, cache = locate_base(recipe.base.model), EncodingCache(encodings_folder)
    training_set = build_training_set(recipe, base.family.facts, Progress()).with_held_out()
    watched = [number for number, picture in enumerate(training_set.pictures) if held_out in picture.record.path.parents]
    assert len(watched) == (2 if size == 64 else 4)
    encodings = encode_everything(base, training_set, [], recipe.data, cache, torch.device("cpu"), torch.float32, 0, Progress())
    pipeline = base.family.load(base.folder, frozenset({"transformer"}), torch.float32)
    objective, seed = base.family.objective(pipeline, None, LossWeighting()), stable_seed(recipe.training.seed, "held-out loss")
    losses, seen = [], 0
    for place, number in enumerate(watched):
        weight, repeats = (0.5, 3) if training_set.pictures[number].record.path.parent.name == "details" else (1.0, 1)
        encoded, picture, mask = encodings.latents(number), training_set.pictures[number], encodings.mask(number)
        assert mask.shape == encoded.mean.shape[-2:] and mask.min() == 0 and mask.max() > 0.9
        for index in (2 * place, 2 * place + 1):
            latents = (encoded.mean + encoded.std * torch.randn(encoded.mean.shape, generator=generator(seed, "latent", 0, index)))[None]
            noise = torch.randn(encoded.mean.shape, generator=generator(seed, "noise", 0, index))[None]
            level = objective.level(fixed_positions(len(watched), 2, seed)[[index]], latents)
            caption = encodings.conditioning(training_set.captions.variants[number][0])
            with torch.no_grad():
                predicted = base.family.predict(pipeline.transformer, objective.add_noise(latents, noise, level), level, [caption], [picture.geometry])
            losses.append(weight * repeats * ((predicted - objective.target(latents, noise, level)).square() * (mask / mask.mean())).mean().item())
            seen += repeats
    assert first["held_out_loss"] == pytest.approx(sum(losses) / seen, rel=1e-4)


@pytest.mark.parametrize("changes", [
    {"data__masked_loss": True, "data__unmasked_weight": 0.3}, {"objective__noise_offset": 0.2},
], ids=["masked", "noise offset"])
def test_the_logged_loss_is_the_one_computed_by_hand(tiny_base, tmp_path, encodings_folder, changes):
    folder = masked_pictures(tmp_path / "main", 1)
    recipe = small_recipe(tiny_base, folder, training__steps=1, data__caption_dropout=0.0, **changes)
    train(recipe, tmp_path / "run", cache_folder=encodings_folder)
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert logged == pytest.approx(loss_by_hand(recipe, encodings_folder), rel=1e-4)


def test_a_picture_of_weight_zero_teaches_nothing(tiny_base, tmp_path, encodings_folder):
    """Nor is a loss that jumps from nothing to what it always is taken for one that blows up."""
    main, others = write_pictures(tmp_path / "main", 1), write_pictures(tmp_path / "others", 1)
    recipe = small_recipe(tiny_base, main, data__regularisation_folder=str(others), data__regularisation_weight=0.0, training__steps=4, training__batch_size=1)
    train(recipe, tmp_path / "run", cache_folder=encodings_folder)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sorted(loss > 0 for loss in losses) == [False, False, True, True]


def test_a_noise_offset_is_refused_for_a_flow_matching_base_before_anything_is_read(tmp_path):
    from tests.tiny_models import sd3

    sd3.build().save_pretrained(tmp_path / "base")
    with pytest.raises(BadInput, match="flow matching") as refusal:
        train(small_recipe(tmp_path / "base", tmp_path / "no pictures", objective__noise_offset=0.1), tmp_path / "run", cache_folder=tmp_path / "cache")
    assert refusal.value.where == "objective.noise_offset" and refusal.value.fix


def test_the_scale_of_guidance_is_told_to_a_distilled_base_and_refused_for_others(tmp_path):
    from tests.tiny_models import flux, sd3

    pictures, first_losses = write_pictures(tmp_path / "pictures", 1), []
    flux.build(guidance=True).save_pretrained(tmp_path / "flux")
    for scale in (1.0, 3.5):
        train(small_recipe(tmp_path / "flux", pictures, objective__guidance=scale, training__steps=1), tmp_path / f"run-{scale}", cache_folder=tmp_path / "cache")
        first_losses.append(json.loads((tmp_path / f"run-{scale}" / "log.jsonl").read_text().splitlines()[0])["loss"])
    assert first_losses[0] != first_losses[1]
    sd3.build().save_pretrained(tmp_path / "sd3")
    with pytest.raises(BadInput, match="not guidance-distilled") as refusal:
        train(small_recipe(tmp_path / "sd3", tmp_path / "no pictures", objective__guidance=3.5), tmp_path / "run", cache_folder=tmp_path / "cache")
    assert refusal.value.where == "objective.guidance" and refusal.value.fix

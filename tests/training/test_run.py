"""The main job on a tiny real base: what a run leaves, what it makes of its pictures, what it refuses."""

import gc
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.adapters import products
from finetune.errors import DataError, TrainingError, VerifyError
from finetune.families.hunyuan_dit import HunyuanDiT
from finetune.training import looks, loop, placement, proof
from finetune.training.allocator import keep_freed_memory
from finetune.training.run import train
from tests.training.small_job import AtStep, log_of, small_recipe, write_pictures

ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


def test_a_folder_of_pictures_becomes_a_proven_adapter(unbroken):
    out, result = unbroken
    assert result.verified.keys == result.verified.placed == 2 * 8 * 4
    assert result.verified.changed and result.verified.baked_equals_attached and result.verified.restored
    assert {path.name for path in out.iterdir()} >= {
        "recipe.toml", "data.json", "log.jsonl", "samples", "checkpoints", "adapter", "before_after.png", "report.html", "result.json"}
    assert [row["step"] for row in log_of(out)] == list(range(1, 13))
    assert set(log_of(out)[0]) >= {"step", "loss", "lr", "grad_norm", "seconds", "peak_memory_bytes"}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    assert not [path for path in out.rglob("*") if "partial" in path.name]


def test_the_pictures_before_and_after_differ_and_stand_on_one_sheet(unbroken):
    _, result = unbroken
    before, after = Image.open(result.before[0]), Image.open(result.after[0])
    assert before.size == after.size == (64, 64)
    assert before.tobytes() != after.tobytes()
    assert Image.open(result.sheet).width >= 64


def test_the_heap_keeps_freed_memory_for_steps_and_gives_it_back_in_the_proof(tiny_base, pictures, encodings_folder, tmp_path, monkeypatch):
    told, probe = [], proof.probe

    def telling(short=False):
        told.append("short" if short else "kept")
        return keep_freed_memory(short)

    for place in (placement, proof):
        monkeypatch.setattr(place, "keep_freed_memory", telling)
    monkeypatch.setattr(proof, "probe", lambda *arguments: told.append("probe") or probe(*arguments))
    train(small_recipe(tiny_base, pictures, training__steps=2), tmp_path / "run", cache_folder=encodings_folder)
    assert told[:5] == ["kept", "probe", "kept", "short", "probe"] and set(told[5:]) == {"probe"}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_frozen_layers_beside_the_adapted_ones_take_the_faster_products_and_the_loss_stays(unbroken, tiny_base, pictures, encodings_folder, tmp_path, monkeypatch):
    """As on a processor that has them, with layers of a real size."""
    frozen, taken, suits = set(), set(), products._by_onednn

    def noted(x, weight):
        is_taken = suits(x, weight)
        taken.update({weight.data_ptr()} if is_taken else ())
        return is_taken

    def watched(job, *rest):
        frozen.update(layer.weight.data_ptr() for name, layer in job.transformer.named_modules() if ".ff." in name and isinstance(layer, torch.nn.Linear))
        return loop.training_loop(job, *rest)

    for name, value in {"onednn_is_faster": lambda: True, "LEAST_ROWS": 1, "LEAST_NUMBERS": 1, "_by_onednn": noted}.items():
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr("finetune.training.run.training_loop", watched)
    train(small_recipe(tiny_base, pictures), tmp_path / "run", cache_folder=encodings_folder)
    assert frozen and frozen <= taken
    assert [row["loss"] for row in log_of(tmp_path / "run")] == pytest.approx([row["loss"] for row in log_of(unbroken[0])], rel=1e-3)


def test_the_recipe_in_the_run_folder_makes_the_same_adapter_again(unbroken, encodings_folder, tmp_path):
    from finetune.recipe import load_recipe

    out, _ = unbroken
    train(load_recipe(out / "recipe.toml"), tmp_path / "again", cache_folder=encodings_folder)
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (out / ADAPTER).read_bytes()


def test_another_seed_makes_another_adapter(unbroken, tiny_base, pictures, encodings_folder, tmp_path):
    train(small_recipe(tiny_base, pictures, training__seed=1), tmp_path / "run", cache_folder=encodings_folder)
    assert (tmp_path / "run" / ADAPTER).read_bytes() != (unbroken[0] / ADAPTER).read_bytes()


def test_the_loss_falls(tiny_base, pictures, encodings_folder, tmp_path):
    recipe = small_recipe(tiny_base, pictures, training__steps=60, training__batch_size=6, training__checkpoint_every=0, data__caption_dropout=0.0)
    train(recipe, tmp_path / "run", cache_folder=encodings_folder)
    losses = [row["loss"] for row in log_of(tmp_path / "run")]
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_the_data_folder_is_left_exactly_as_it_was(tiny_base, tmp_path):
    folder = write_pictures(tmp_path / "data", 3)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    train(small_recipe(tiny_base, folder, training__steps=2), tmp_path / "run", cache_folder=tmp_path / "cache")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.fixture
def loads(monkeypatch):
    """Which parts of the base were loaded, in order."""
    seen, load = [], HunyuanDiT.load

    def watched(self, folder, parts, dtype):
        seen.append(set(parts))
        return load(self, folder, parts, dtype)

    monkeypatch.setattr(HunyuanDiT, "load", watched)
    return seen


def test_encoders_are_loaded_once_one_after_the_other_and_never_with_the_transformer(tiny_base, pictures, tmp_path, loads):
    train(small_recipe(tiny_base, pictures, training__steps=1), tmp_path / "first", cache_folder=tmp_path / "cache")
    # Nothing is drawn on the way here, so the autoencoder comes back only for the pictures of the proof.
    assert loads == [{"vae"}, {"text"}, {"transformer"}, {"transformer", "vae"}]
    loads.clear()
    train(small_recipe(tiny_base, pictures, training__steps=1), tmp_path / "second", cache_folder=tmp_path / "cache")
    assert loads == [{"transformer"}, {"transformer", "vae"}]


def test_one_changed_picture_is_encoded_again_and_no_other(tiny_base, tmp_path):
    folder, cache = write_pictures(tmp_path / "data", 4), tmp_path / "cache"
    train(small_recipe(tiny_base, folder, training__steps=1), tmp_path / "first", cache_folder=cache)
    before = set(cache.rglob("*.safetensors"))
    Image.new("RGB", (64, 64), "red").save(folder / "picture0.png")
    train(small_recipe(tiny_base, folder, training__steps=1), tmp_path / "second", cache_folder=cache)
    assert len(set(cache.rglob("*.safetensors")) - before) == 1


def test_every_picture_meets_its_own_latent_and_caption(tiny_base, pictures, encodings_folder, unbroken):
    from finetune.families.base_models import locate_base
    from finetune.training.encode import latent_keys, text_keys
    from finetune.training.encoding_cache import EncodingCache
    from finetune.training.pixels import load_pixels
    from finetune.training.training_set import build_training_set
    from data_tools.progress import Progress

    base, cache = locate_base(str(tiny_base)), EncodingCache(encodings_folder)
    training_set = build_training_set(small_recipe(tiny_base, pictures), base.family.facts, Progress())
    pipeline = base.family.load(base.folder, frozenset({"vae", "text"}), torch.float32)
    for picture, key, variants in zip(training_set.pictures, latent_keys(base, training_set.pictures, "#ffffff", cache), training_set.captions.variants, strict=True):
        array = load_pixels(picture.record.path, picture.placement, "#ffffff")
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert torch.equal(cache.get(key)["mean"], base.family.encode_images(pipeline, pixels).mean[0])
        assert variants == (f"sks, {picture.record.path.with_suffix('.txt').read_text()}",)
        entry = cache.get(text_keys(base, variants, cache)[variants[0]])
        assert all(torch.equal(entry[name], value) for name, value in base.family.encode_prompts(pipeline, list(variants))[0].tensors.items())


def test_pictures_that_cannot_be_used_are_listed_with_their_reason(tiny_base, tmp_path):
    folder = write_pictures(tmp_path / "data", 3)
    (folder / "broken.png").write_bytes((folder / "picture0.png").read_bytes()[:60])
    shutil.copy(folder / "broken.png", folder / os.fsdecode(b"broken\xff.png"))  # a name that is not UTF-8, as old archives have them
    result = train(small_recipe(tiny_base, folder, training__steps=1), tmp_path / "run", cache_folder=tmp_path / "cache")
    assert [left.path.name for left in result.left_out] == ["broken.png", "broken\udcff.png"] and result.left_out[0].reason
    assert [Path(left["path"]).name for left in json.loads((tmp_path / "run" / "data.json").read_text())["left_out"]] == ["broken.png", "broken\udcff.png"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "broken.png" in page and "broken\\udcff.png" in page


@pytest.mark.parametrize("name", ["picture2.png", "picture2_mask.png"])
def test_a_picture_or_mask_that_changes_after_it_was_checked_is_not_kept_under_the_hash_of_what_it_was(tiny_base, tmp_path, name):
    folder = write_pictures(tmp_path / "data", 3)
    mask = Image.new("L", (96, 48), 255)
    mask.save(folder / "picture2_mask.png")

    class Changing(AtStep):
        def act(self):
            changed = Image.open(folder / name)
            changed.load()
            changed.putpixel((5, 5), 7)
            changed.save(folder / name)

    recipe, cache = small_recipe(tiny_base, folder, training__steps=1, data__masked_loss=True), tmp_path / "cache"
    with pytest.raises(DataError, match="changed while the run prepared"):
        train(recipe, tmp_path / "run", cache_folder=cache, progress=Changing(1, "encoding pictures"))
    kept = {path.name for path in cache.rglob("*.safetensors")}
    assert len(kept) == (2 if name == "picture2.png" else 3)  # the pictures before it; never the changed file


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_gone_when_its_turn_comes_is_named(tiny_base, tmp_path, workers):
    """Out of a worker process the error came home as that of a broken pool."""
    folder = write_pictures(tmp_path / "data", 14)

    class Removing(AtStep):
        def act(self):
            for number in range(8, 14):  # in no order of encoding: whichever was not read yet
                (folder / f"picture{number}.png").unlink()

    recipe = small_recipe(tiny_base, folder, training__steps=1, training__workers=workers)
    with pytest.raises(DataError, match=r"cannot be read any more: No such file") as refusal:
        train(recipe, tmp_path / "run", cache_folder=tmp_path / "cache", progress=Removing(1, "encoding pictures"))
    assert "picture" in refusal.value.where and refusal.value.fix


def test_one_single_picture_is_enough(tiny_base, tmp_path):
    folder = write_pictures(tmp_path / "data", 1)
    assert train(small_recipe(tiny_base, folder, training__steps=2), tmp_path / "run", cache_folder=tmp_path / "cache").verified.changed


def test_an_empty_folder_and_pictures_without_captions_are_refused_before_anything_is_loaded(tiny_base, tmp_path, loads):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        train(small_recipe(tiny_base, tmp_path / "empty"), tmp_path / "a", cache_folder=tmp_path / "cache")
    bare = write_pictures(tmp_path / "bare", 3, captions=False)
    with pytest.raises(DataError, match="3 of 3 pictures have no caption: picture0.png") as refusal:
        train(small_recipe(tiny_base, bare), tmp_path / "b", cache_folder=tmp_path / "cache")
    assert "brushwork data caption" in refusal.value.fix and loads == []


@pytest.mark.parametrize("policy, caption", [("empty", "sks"), ("trigger", "sks"), ("file_name", "sks, picture0")])
def test_missing_captions_are_filled_as_the_recipe_says(tiny_base, tmp_path, policy, caption):
    from data_tools.progress import Progress
    from finetune.training.training_set import build_training_set

    bare = write_pictures(tmp_path / "bare", 1, captions=False)
    training_set = build_training_set(small_recipe(tiny_base, bare, data__missing_caption=policy), HunyuanDiT.facts, Progress())
    assert training_set.captions.variants == ((caption,),)


@pytest.fixture(scope="module")
def poisoned_base(tiny_base, tmp_path_factory):
    """A base with one NaN in its last layer."""
    folder = tmp_path_factory.mktemp("poisoned") / "base"
    shutil.copytree(tiny_base, folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["proj_out.bias"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_a_number_stops_with_step_and_pictures_named(poisoned_base, pictures, encodings_folder, tmp_path):
    with pytest.raises(TrainingError, match=r"loss of step 1 is not finite; pictures: picture\d") as failure:
        train(small_recipe(poisoned_base, pictures), tmp_path / "run", cache_folder=encodings_folder)
    assert failure.value.exit_code == 1 and "learning_rate" in failure.value.fix


def test_skipped_steps_are_counted_and_a_run_that_learned_nothing_does_not_pass_the_proof(poisoned_base, pictures, encodings_folder, tmp_path):
    with pytest.raises(VerifyError):
        train(small_recipe(poisoned_base, pictures, training__non_finite="skip", training__steps=3), tmp_path / "run", cache_folder=encodings_folder)
    assert [row["applied"] for row in log_of(tmp_path / "run")] == [False] * 3
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["watch"]["skipped"] == 3


def test_a_loss_that_blows_up_stops_and_the_last_checkpoint_stays(tiny_base, pictures, encodings_folder, tmp_path):
    # The last layer: nothing behind it keeps its output in bounds.
    recipe = small_recipe(tiny_base, pictures, training__learning_rate=1.0, training__optimizer="adamw", training__steps=200, training__gradient_clip=0.0,
                          training__checkpoint_every=1, adapter__alpha=400.0, adapter__targets="proj_out")
    with pytest.raises(TrainingError, match="blew up|not finite"):
        train(recipe, tmp_path / "run", cache_folder=encodings_folder)
    assert list((tmp_path / "run").glob("checkpoints/step-*/state.json"))


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_checkpoint(tiny_base, pictures, encodings_folder, tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    recipe = small_recipe(tiny_base, pictures, adapter__rank=16)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(TrainingError, match="cannot write the checkpoint of step 4") as failure:
            train(recipe, tmp_path / "run", cache_folder=encodings_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "--resume" in failure.value.fix
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert train(recipe, tmp_path / "run", resume=True, cache_folder=encodings_folder).steps == 12


def test_bf16_trains_on_a_cpu_too(tiny_base, pictures, encodings_folder, tmp_path):
    result = train(small_recipe(tiny_base, pictures, training__precision="bf16", training__steps=3), tmp_path / "run", cache_folder=encodings_folder)
    assert result.verified.changed and result.reasons["precision"].startswith("bf16")


def test_the_autoencoder_is_there_only_while_pictures_are_drawn(tiny_base, pictures, encodings_folder, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    there: list[tuple[str, bool]] = []
    of_other_tests = [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL)]

    def look(moment, function):
        def looked(*arguments, **named):
            there.append((moment, any(isinstance(thing, AutoencoderKL) and thing not in of_other_tests for thing in gc.get_objects())))
            return function(*arguments, **named)

        return looked

    monkeypatch.setattr(loop, "take_step", look("step", loop.take_step))
    monkeypatch.setattr(looks, "draw_samples", look("drawing", looks.draw_samples))
    train(small_recipe(tiny_base, pictures, training__steps=4, samples__every=2), tmp_path / "run", cache_folder=encodings_folder)
    assert there == [("drawing", True), ("step", False), ("step", False), ("drawing", True), ("step", False), ("step", False)]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["step-000000-00.png", "step-000002-00.png", "step-000004-00.png"]

"""Drawing: a picture is a function of its request; its file says how it was made."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from finetune import sampling
from finetune.errors import BadInput
from finetune.families import image_encoding, registry
from finetune.families.hunyuan_dit import FAMILY
from finetune.sampling import PictureRequest
from tests.tiny_models import auraflow
from tests.tiny_models import hunyuan_dit as tiny


@pytest.fixture(scope="module")
def pipeline():
    return tiny.build()


@pytest.fixture(scope="module")
def encoded(pipeline):
    return sampling.encode_all(FAMILY, pipeline, ["a cat", "a dog", "", "blurry", "a cat"])


def request(prompt="a cat", seed=1, size=(64, 64), **settings):
    return PictureRequest(prompt, seed, *size, **({"steps": 3} | settings))


def test_each_prompt_is_encoded_once(encoded):
    assert list(encoded) == ["a cat", "a dog", "", "blurry"]
    assert sampling.prompts_of([request(), request("a dog", negative="blurry")]) == ["a cat", "", "a dog", "blurry"]


def test_a_picture_does_not_depend_on_batch_order_or_neighbours(pipeline, encoded):
    requests = [request(seed=1), request("a dog", seed=2), request(seed=3, size=(64, 96)), request("a dog", seed=4, guidance=1.0)]
    at_once = sampling.draw(FAMILY, pipeline, requests, encoded, batch_size=4, output_type="pt")
    one_by_one = sampling.draw(FAMILY, pipeline, requests[::-1], encoded, batch_size=1, output_type="pt")[::-1]
    assert [picture.shape for picture in at_once] == [(3, 64, 64), (3, 64, 64), (3, 64, 96), (3, 64, 64)]
    for together, alone in zip(at_once, one_by_one, strict=True):
        assert (together - alone).abs().max() < 1e-4


def test_seed_prompt_negative_and_guidance_all_count(pipeline, encoded):
    variants = [request(), request(seed=2), request("a dog"), request(negative="blurry"), request(guidance=2.0), request()]
    pictures = sampling.draw(FAMILY, pipeline, variants, encoded, output_type="pt")
    assert all((pictures[0] - other).abs().max() > 1e-5 for other in pictures[1:-1])
    assert (pictures[0] - pictures[-1]).abs().max() < 1e-4


def test_given_latents_replace_the_seeds_noise(pipeline, encoded):
    noise = sampling.initial_latents(7, (4, 8, 8))
    by_seed = sampling.draw(FAMILY, pipeline, [request(seed=7)], encoded, output_type="pt")[0]
    given = sampling.draw(FAMILY, pipeline, [request(seed=1)], encoded, output_type="pt", latents=[noise])[0]
    assert torch.equal(by_seed, given)


def test_the_pipeline_is_left_as_it_was(pipeline, encoded):
    shipped = pipeline.scheduler
    pipeline.transformer.train()
    sampling.draw(FAMILY, pipeline, [request()], encoded)
    assert pipeline.scheduler is shipped and pipeline.transformer.training
    pipeline.transformer.eval()


def test_ddpm_bases_are_drawn_with_dpm_solver_and_flow_bases_with_their_own():
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    class Holder:
        scheduler = tiny.build().scheduler

    holder = Holder()
    with sampling.solver(holder):
        assert isinstance(holder.scheduler, DPMSolverMultistepScheduler)
        assert holder.scheduler.config.prediction_type == "v_prediction" and holder.scheduler.config.beta_end == 0.018
    holder.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with sampling.solver(holder):
        assert isinstance(holder.scheduler, FlowMatchEulerDiscreteScheduler) and holder.scheduler.config.shift == 3.0


def test_progress_is_told_of_every_step(pipeline, encoded):
    steps = []
    sampling.draw(FAMILY, pipeline, [request(), request("a dog")], encoded, on_step=steps.append)
    assert steps == [2, 2, 2]


@pytest.mark.parametrize(("bad", "message"), [
    (request(size=(60, 64)), "64x60 cannot be drawn"), (request(size=(0, 64)), "cannot be drawn"), (request(steps=0), "0 denoising steps"),
    (request("never encoded"), "was not encoded")])
def test_impossible_requests_are_named_before_anything_is_drawn(pipeline, encoded, bad, message):
    with pytest.raises(BadInput, match=message):
        sampling.draw(FAMILY, pipeline, [request(), bad], encoded)


def test_a_picture_larger_than_the_table_of_positions_is_refused():
    family, pipeline = registry.family("auraflow"), auraflow.build()
    encoded = sampling.encode_all(family, pipeline, ["a cat", ""])
    with pytest.raises(BadInput, match="272x64 is more than this base has positions for: 256 pixels a side"):
        sampling.draw(family, pipeline, [request(size=(64, 272))], encoded)


def test_a_saved_picture_carries_its_settings_in_any_script(tmp_path):
    settings = {"prompt": "红色背景上的狗", "seed": 3, "adapters": [["style.safetensors", 0.8]]}
    sampling.save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / "deep" / "a.png", settings)
    assert sampling.read_settings(tmp_path / "deep" / "a.png") == settings
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert sampling.read_settings(tmp_path / "plain.png") == {}


def test_large_pictures_are_decoded_and_encoded_in_tiles(pipeline, encoded, monkeypatch):
    whole = sampling.draw(FAMILY, pipeline, [request()], encoded, output_type="pt")[0]
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(image_encoding, "TILED_ABOVE", 32 * 32)
    used = []
    monkeypatch.setattr(pipeline.vae, "tiled_decode", lambda *a, _plain=pipeline.vae.tiled_decode, **k: used.append("decode") or _plain(*a, **k))
    monkeypatch.setattr(pipeline.vae, "_tiled_encode", lambda *a, _plain=pipeline.vae._tiled_encode, **k: used.append("encode") or _plain(*a, **k))
    tiles = sampling.draw(FAMILY, pipeline, [request()], encoded, output_type="pt")[0]
    assert FAMILY.encode_images(pipeline, pixels).mean.shape == (1, 4, 8, 8)
    assert used == ["decode", "encode"] and tiles.shape == whole.shape
    assert not pipeline.vae.use_tiling

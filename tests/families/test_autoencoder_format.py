"""In fp16 many autoencoders overflow: on a card without bf16 they compute in float32, and pipelines hand them fp16 all the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.families.autoencoder_format import format_for
from finetune.sampling import PictureRequest, draw
from finetune.training.plan_phases import Surroundings
from tests.families.battery import Specimen
from tests.tiny_models.all import TINY

DRAWN = ("pixart_sigma", "auraflow", "flux_dev", "qwen_image")


@pytest.fixture(scope="module", params=TINY)
def specimen(request, tmp_path_factory):
    return Specimen(request.param, tmp_path_factory.mktemp(request.param))


def test_an_autoencoder_computes_in_float32_where_all_else_is_fp16(specimen):
    pipeline = specimen.family.load(specimen.folder, frozenset({"transformer", "vae"}), torch.float16)
    assert pipeline.vae.dtype == format_for(torch.float16, pipeline.vae.config) == torch.float32
    assert specimen.family.load(specimen.folder, frozenset({"vae"}), torch.bfloat16).vae.dtype == torch.bfloat16
    height, width = specimen.tiny.picture
    latents = specimen.family.encode_images(pipeline, torch.rand(1, 3, height, width) * 2 - 1)
    assert latents.mean.isfinite().all() and latents.std.isfinite().all()


def test_a_picture_of_fp16_is_no_black_one(specimen):
    """Numbers beyond 65504 in the decoder, as SDXL's autoencoder has them."""
    if specimen.name not in DRAWN:
        pytest.skip("drawing in fp16 is slow on a CPU")
    path = next((specimen.folder / "vae").glob("*.safetensors"))
    before = path.read_bytes()
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("decoder.conv_in") and name.endswith("weight"))
    save_file(tensors | {name: tensors[name] * 3e4, name.replace("weight", "bias"): tensors[name.replace("weight", "bias")] + 6e4}, path)
    height, width = specimen.tiny.picture
    try:
        pipeline = specimen.family.load(specimen.folder, frozenset({"transformer", "vae"}), torch.float16)
        picture = draw(specimen.family, pipeline, [PictureRequest("a cat", 1, height, width, 2, 1.0)], dict.fromkeys(["a cat", ""], specimen.conditionings[0]), output_type="pt")[0]
    finally:
        path.write_bytes(before)
    assert torch.as_tensor(picture).isfinite().all() and torch.as_tensor(picture).std() > 0


def test_one_whose_makers_say_that_fp16_is_enough_stays_in_it(tmp_path):
    specimen = Specimen("pixart_sigma", tmp_path)
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    assert specimen.family.load(tmp_path, frozenset({"vae"}), torch.float16).vae.dtype == torch.float16


def test_the_plan_counts_the_autoencoder_in_the_format_it_computes_in():
    made = {overflows: Surroundings(0, 0.0, 0, 0, 0.0, 0.0, vae_overflows=overflows) for overflows in (True, False)}
    assert [made[True].vae_bytes(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)] == [4, 2, 4]
    assert made[False].vae_bytes(torch.float16) == 2

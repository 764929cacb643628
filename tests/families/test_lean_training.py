"""A transformer that is prepared for training is the library's own: same prediction, same gradients, for every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.families.lean_attention import LinearAttention
from tests.families.battery import Specimen, close
from tests.tiny_models.all import TINY

# Families whose training form differs from the library's.
LEAN = ("flux_dev", "flux_schnell", "sd3", "sana", "qwen_image", "z_image", "hunyuan_image_2", "lumina2", "hunyuan_video", "hunyuan_video_15")


def trained_once(specimen: Specimen, prepared: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The prediction of two pictures and the adapter's gradients."""
    model = specimen.fresh_transformer()
    inject_lora(model, specimen.family.facts.targets["attention"], 4, seed=0)
    for name, factor in lora_parameters(model):
        if "lora_B" in name:
            factor.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    if prepared:
        specimen.family.prepare(model, 0)
    noisy, timesteps = specimen.noisy()
    prediction = specimen.predict(model.train(), noisy, timesteps, specimen.conditionings)
    prediction.sin().sum().backward()
    return prediction.detach(), {name: factor.grad for name, factor in lora_parameters(model) if factor.grad is not None}


@pytest.mark.parametrize("name", [name for name in LEAN if name in TINY])
def test_prepared_models_predict_and_learn_as_the_library_s_own(name: str, tmp_path: Path) -> None:
    specimen = Specimen(name, tmp_path / name)
    found, gradients = trained_once(specimen, prepared=True)
    expected, expected_gradients = trained_once(specimen, prepared=False)
    assert close(found, expected, 1e-6)
    # The last block's text queries are computed by the library and read by nobody: their gradient is zero or absent.
    read = {key for key, gradient in expected_gradients.items() if gradient.abs().max() > 0}
    assert read <= set(gradients)
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[key], rtol=1e-3, atol=1e-5 * float(expected_gradients[key].abs().max()) + 1e-9), key


@pytest.mark.parametrize("name", LEAN[:1])
def test_the_lean_form_is_in_place(name: str, tmp_path: Path) -> None:
    specimen = Specimen(name, tmp_path / name)
    model = specimen.fresh_transformer()
    specimen.family.prepare(model, 0)
    assert {type(module.processor).__module__ for module in model.modules() if hasattr(module, "processor")} == {"finetune.families.lean_attention"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_attention_adds_up_its_tokens_in_full_where_products_are_mixed(dtype: torch.dtype) -> None:
    """Over a thousand tokens a sum is too large for float16 and loses its digits in bfloat16; the pipeline draws with it in float32."""
    same = torch.nn.Identity()
    attention = SimpleNamespace(to_q=same, to_k=same, to_v=same, norm_q=None, norm_k=None, heads=2, to_out=[same])
    states = torch.randn(1, 1024, 32, generator=torch.Generator().manual_seed(0)) * 30
    whole = LinearAttention()(attention, states)
    with torch.autocast("cpu", dtype):
        assert torch.equal(LinearAttention()(attention, states), whole)

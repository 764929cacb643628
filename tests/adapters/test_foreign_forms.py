"""Forms other than two matrices beside a linear layer, as other tools write them: products, magnitudes, convolutions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from finetune.adapters.adapter_file import read_adapter
from finetune.adapters.exporting import export
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.made_files import D, R, delta_of, pair, source_delta, write

QKV = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v")
PLAIN = "transformer_blocks.0.attn.to_q"


def kron_file(stem: str, w2_rank: int | None, alpha: float):
    w1, w2 = torch.randn(4, 4), torch.randn(6, 6)
    tensors = {f"{stem}.lokr_w1": w1, f"{stem}.alpha": torch.tensor(alpha)}
    if w2_rank is None:
        return tensors | {f"{stem}.lokr_w2": w2}, torch.kron(w1, w2)
    a, b = torch.randn(6, w2_rank), torch.randn(w2_rank, 6)
    return tensors | {f"{stem}.lokr_w2_a": a, f"{stem}.lokr_w2_b": b}, torch.kron(w1, a @ b) * alpha / w2_rank


@pytest.mark.parametrize(("w2_rank", "alpha", "rank"), [pytest.param(None, 7.0, 24, id="U18 full factors ignore alpha"), pytest.param(2, 1.0, 8, id="U19 decomposed factor")])
def test_a_kronecker_adapter_is_written_out_as_lora(tmp_path, w2_rank, alpha, rank):
    tensors, expected = kron_file("lycoris_transformer_blocks_0_attn_to_q", w2_rank, alpha)
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family="flux")
    assert adapter.ranks[PLAIN] == rank
    assert_close(delta_of(adapter, PLAIN), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("second", ["decomposed", "whole", "zero"])
@pytest.mark.parametrize("edge", [1, 2, 4])
def test_a_kronecker_adapter_whose_second_factor_has_rank_one_is_written_out(tmp_path, second, edge):
    """Every such file ended in a traceback: torch.kron does not take the SVD's columns as they lie."""
    stem = "lycoris_transformer_blocks_0_attn_to_q"
    w1, a, b = torch.randn(edge, edge), torch.randn(D // edge, 1), torch.randn(1, D // edge)
    w2 = {"decomposed": {f"{stem}.lokr_w2_a": a, f"{stem}.lokr_w2_b": b}, "whole": {f"{stem}.lokr_w2": a @ b}, "zero": {f"{stem}.lokr_w2": 0 * a @ b}}[second]
    adapter = read_adapter(write(tmp_path, {f"{stem}.lokr_w1": w1} | w2), KEY_MAPS, family="flux")
    assert_close(delta_of(adapter, PLAIN), torch.kron(w1, a @ b) * (second != "zero"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [pytest.param(6, id="U20 rows that three divides"), pytest.param(4, id="U21 rows that it does not")])
def test_a_kronecker_adapter_on_a_fused_layer_comes_apart(tmp_path, rows):
    stem = "lycoris_double_blocks_0_img_attn_qkv"
    w1, w2 = torch.randn(rows, 4), torch.randn(3 * D // rows, D // 4)
    adapter = read_adapter(write(tmp_path, {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}), KEY_MAPS, family="flux")
    for module, part in zip(QKV, torch.kron(w1, w2).chunk(3), strict=True):
        assert_close(delta_of(adapter, module), part, atol=1e-4, rtol=1e-4)


def test_u22_a_hadamard_adapter_is_written_out_as_lora(tmp_path):
    stem = "lycoris_transformer_blocks_0_attn_to_q"
    factors = {"hada_w1_a": torch.randn(D, R), "hada_w1_b": torch.randn(R, D), "hada_w2_a": torch.randn(D, R), "hada_w2_b": torch.randn(R, D)}
    adapter = read_adapter(write(tmp_path, {f"{stem}.{name}": value for name, value in factors.items()} | {f"{stem}.alpha": torch.tensor(2.0)}), KEY_MAPS, family="flux")
    assert adapter.ranks[PLAIN] == R * R
    expected = 0.5 * (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    assert_close(delta_of(adapter, PLAIN), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alpha", [1e9, 1001.0 * R, float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_every_kind_has_the_same_limits_of_strength(tmp_path, kind, alpha):
    """A LoHa or LoKr of alpha 1e9 at rank 4 was read, and multiplied with it."""
    stem = "lycoris_transformer_blocks_0_attn_to_q"
    loha = {"hada_w1_a": torch.randn(D, R), "hada_w1_b": torch.randn(R, D), "hada_w2_a": torch.randn(D, R), "hada_w2_b": torch.randn(R, D)}
    lokr = {"lokr_w1": torch.randn(4, 4), "lokr_w2_a": torch.randn(6, R), "lokr_w2_b": torch.randn(R, 6)}
    tensors = pair(stem, alpha=None) if kind == "LoRA" else {f"{stem}.{name}": value for name, value in (loha if kind == "LoHa" else lokr).items()}
    with pytest.raises(AdapterError, match="an alpha of"):
        read_adapter(write(tmp_path, tensors | {f"{stem}.alpha": torch.tensor(alpha)}), KEY_MAPS, family="flux")
    assert read_adapter(write(tmp_path, tensors | {f"{stem}.alpha": torch.tensor(999.0 * R)}), KEY_MAPS, family="flux").scales[PLAIN] == pytest.approx(999)


def test_u23_magnitudes_of_a_fused_layer_go_with_their_rows(tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    magnitude = torch.rand(3 * D, 1) + 0.5
    adapter = read_adapter(write(tmp_path, pair(stem, 3 * D) | {f"{stem}.dora_scale": magnitude}), KEY_MAPS, family="flux")
    for module, part in zip(QKV, magnitude.flatten().chunk(3), strict=True):
        assert_close(adapter.tensors[f"{module}.lora_magnitude_vector"], part)


@pytest.mark.parametrize(("module", "stem", "family"), [
    pytest.param("norm_out.linear", "final_layer_adaLN_modulation_1", "flux", id="the last layer's modulation"),
    pytest.param("transformer_blocks.23.norm1_context.linear", "joint_blocks_23_context_block_adaLN_modulation_1", "sd3", id="the last block's modulation"),
])
@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_magnitudes_of_swapped_halves_are_swapped_with_their_rows(tmp_path, module, stem, family, layout):
    """The rows of B changed places and the magnitudes did not, in both directions."""
    stem, magnitude = f"lora_unet_{stem}", torch.arange(2.0 * D) + 1
    tensors = pair(stem, 2 * D, alpha=R) | {f"{stem}.dora_scale": magnitude[:, None]}
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family=family)
    swapped = [source_delta(tensors, stem, 1.0), magnitude[:, None]]
    for found, expected in zip((delta_of(adapter, module), adapter.tensors[f"{module}.lora_magnitude_vector"][:, None]), swapped, strict=True):
        assert_close(found, torch.cat(expected.chunk(2)[::-1]))
    export(adapter, layout, tmp_path / "again.safetensors", KEY_MAPS[family])
    written = load_file(tmp_path / "again.safetensors")
    assert_close(next(value for key, value in written.items() if key.endswith(".dora_scale")), magnitude[:, None])


def test_the_second_text_encoder_of_flux_is_kohyas_third(tmp_path):
    """sd-scripts numbers T5 as SD3 does; such files were refused, and written with a number that it does not read."""
    layer, clip = "encoder_block_0_layer_0_SelfAttention_q", "text_model_encoder_layers_0_mlp_fc1"
    tensors = pair("lora_unet_double_blocks_0_img_attn_proj") | pair(f"lora_te3_{layer}") | pair(f"lora_te1_{clip}")
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family="flux")
    assert {name: len(part) for name, part in adapter.text_encoders.items()} == {"text_encoder": 2, "text_encoder_2": 2}
    for layout, number in (("kohya", 3), ("comfy", 3), ("onetrainer", 2)):
        export(adapter, layout, tmp_path / f"{layout}.safetensors", KEY_MAPS["flux"])
        assert any(key.startswith(f"lora_te{number}_{layer}") for key in load_file(tmp_path / f"{layout}.safetensors"))
        again = read_adapter(tmp_path / f"{layout}.safetensors", KEY_MAPS, family="flux")
        assert again.text_encoders["text_encoder_2"].keys() == adapter.text_encoders["text_encoder_2"].keys()
    sd3 = read_adapter(write(tmp_path, pair(f"lora_te3_{layer}") | pair("lora_unet_joint_blocks_0_x_block_attn_proj")), KEY_MAPS)
    assert list(sd3.text_encoders) == ["text_encoder_3"]
    with pytest.raises(AdapterError, match="two numbers"):
        read_adapter(write(tmp_path, tensors | pair(f"lora_te2_{layer}")), KEY_MAPS, family="flux")


def test_u32_a_convolution_keeps_its_axes(tmp_path):
    stem = "transformer.transformer_blocks.0.ff.conv_inverted"
    tensors = {f"{stem}.lora_A.weight": torch.randn(R, D, 1, 1), f"{stem}.lora_B.weight": torch.randn(5 * D, R, 1, 1)}
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS)
    assert delta_of(adapter, "transformer_blocks.0.ff.conv_inverted").shape == (5 * D, D, 1, 1)
    assert adapter.family == "sana"


def test_a_linear_layer_that_is_stored_as_a_convolution_is_straightened(tmp_path):
    tensors = {f"transformer.{PLAIN}.lora_A.weight": torch.randn(R, D, 1, 1), f"transformer.{PLAIN}.lora_B.weight": torch.randn(D, R, 1, 1)}
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS)
    assert delta_of(adapter, PLAIN).shape == (D, D)


def test_u33_a_depthwise_convolution_is_refused(tmp_path):
    stem = "transformer.transformer_blocks.0.ff.conv_depth"
    with pytest.raises(AdapterError, match="depthwise"):
        read_adapter(write(tmp_path, {f"{stem}.lora_A.weight": torch.randn(R, 1, 3, 3), f"{stem}.lora_B.weight": torch.randn(D, R, 1, 1)}), KEY_MAPS)


def test_a_tucker_convolution_becomes_a_pair(tmp_path):
    stem = "lora_unet_blocks_0_mlp_point_conv_conv"
    down, mid, up = torch.randn(3, D, 1, 1), torch.randn(2, 3, 1, 1), torch.randn(D, 2, 1, 1)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family="sana")
    expected = torch.einsum("mnhw,im,nj->ijhw", mid, up.flatten(1), down.flatten(1))
    assert_close(delta_of(adapter, "transformer_blocks.0.ff.conv_point"), expected)

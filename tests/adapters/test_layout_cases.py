"""The layouts found in the wild, one case each: which modules a key means, at which strength, with the same delta W."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from finetune.adapters.adapter_file import read_adapter
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.made_files import D, R, delta_of, lora_metadata, pair, source_delta, write

FLUX = "transformer_blocks.0."
SINGLE = "single_transformer_blocks.0."
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
REFINER = "context_embedder.token_refiner.refiner_blocks.0."

def under(block: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(block + name for name in names)


# (id, family, stem, canonical modules in row order, rows of each, suffix of the keys)
RENAMED = [
    ("U6 fused qkv", "flux", "lora_unet_double_blocks_0_img_attn_qkv", under(FLUX, QKV), (D, D, D), "kohya"),
    ("U7 text stream", "flux", "lora_unet_double_blocks_0_txt_attn_qkv", under(FLUX, ADDED), (D, D, D), "kohya"),
    ("U9 projection", "flux", "lora_unet_double_blocks_0_img_attn_proj", (FLUX + "attn.to_out.0",), (D,), "kohya"),
    ("U9 text projection", "flux", "lora_unet_double_blocks_0_txt_attn_proj", (FLUX + "attn.to_add_out",), (D,), "kohya"),
    ("U10 mlp 0", "flux", "lora_unet_double_blocks_0_img_mlp_0", (FLUX + "ff.net.0.proj",), (4 * D,), "kohya"),
    ("U10 mlp 2", "flux", "lora_unet_double_blocks_0_img_mlp_2", (FLUX + "ff.net.2",), (D,), "kohya"),
    ("U10 text mlp 0", "flux", "lora_unet_double_blocks_0_txt_mlp_0", (FLUX + "ff_context.net.0.proj",), (4 * D,), "kohya"),
    ("U10 text mlp 2", "flux", "lora_unet_double_blocks_0_txt_mlp_2", (FLUX + "ff_context.net.2",), (D,), "kohya"),
    ("U11 modulation", "flux", "lora_unet_double_blocks_0_img_mod_lin", (FLUX + "norm1.linear",), (6 * D,), "kohya"),
    ("U11 text modulation", "flux", "lora_unet_double_blocks_0_txt_mod_lin", (FLUX + "norm1_context.linear",), (6 * D,), "kohya"),
    ("U11 single modulation", "flux", "lora_unet_single_blocks_0_modulation_lin", (SINGLE + "norm.linear",), (3 * D,), "kohya"),
    ("U12 linear1", "flux", "lora_unet_single_blocks_0_linear1", (*under(SINGLE, QKV), SINGLE + "proj_mlp"), (D, D, D, 4 * D), "kohya"),
    ("U13 linear2", "flux", "lora_unet_single_blocks_0_linear2", (SINGLE + "proj_out",), (D,), "kohya"),
    ("U14 img_in", "flux", "lora_unet_img_in", ("x_embedder",), (D,), "kohya"),
    ("U14 txt_in", "flux", "lora_unet_txt_in", ("context_embedder",), (D,), "kohya"),
    ("U14 time_in", "flux", "lora_unet_time_in_in_layer", ("time_text_embed.timestep_embedder.linear_1",), (D,), "kohya"),
    ("U14 vector_in", "flux", "lora_unet_vector_in_out_layer", ("time_text_embed.text_embedder.linear_2",), (D,), "kohya"),
    ("U14 guidance_in", "flux", "lora_unet_guidance_in_in_layer", ("time_text_embed.guidance_embedder.linear_1",), (D,), "kohya"),
    ("U16 comfy", "flux", "diffusion_model.double_blocks.0.img_attn.qkv", under(FLUX, QKV), (D, D, D), "peft"),
    ("U17 onetrainer", "flux", "lora_transformer_transformer_blocks_0_attn_to_out_0", (FLUX + "attn.to_out.0",), (D,), "kohya"),
    ("U24 diffusers keys with down and up", "flux", "transformer.transformer_blocks.0.attn.to_q", (FLUX + "attn.to_q",), (D,), "kohya"),
    ("fal kontext: original names under peft's prefix", "flux", "base_model.model.double_blocks.0.img_attn.qkv", under(FLUX, QKV), (D, D, D), "peft"),
    ("U27 sd3", "sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv", under(FLUX, QKV), (D, D, D), "kohya"),
    ("U28 sd3.5 second attention", "sd3", "lora_unet_joint_blocks_0_x_block_attn2_qkv", under(FLUX, ("attn2.to_q", "attn2.to_k", "attn2.to_v")), (D, D, D), "kohya"),
    ("U29 sd3 context", "sd3", "lora_unet_joint_blocks_0_context_block_attn_qkv", under(FLUX, ADDED), (D, D, D), "kohya"),
    ("U29 sd3 context projection", "sd3", "lora_unet_joint_blocks_0_context_block_attn_proj", (FLUX + "attn.to_add_out",), (D,), "kohya"),
    ("U29 sd3 context mlp", "sd3", "lora_unet_joint_blocks_0_context_block_mlp_fc1", (FLUX + "ff_context.net.0.proj",), (4 * D,), "kohya"),
    ("U30 sd3 modulation", "sd3", "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1", (FLUX + "norm1.linear",), (6 * D,), "kohya"),
    ("U30 sd3 context modulation, all but the last block", "sd3", "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1", (FLUX + "norm1_context.linear",), (6 * D,), "kohya"),
    ("U31 sana", "sana", "transformer.transformer_blocks.0.attn1.to_q", (FLUX + "attn1.to_q",), (D,), "peft"),
    ("sana original kv", "sana", "lora_unet_blocks_0_cross_attn_kv_linear", under(FLUX, ("attn2.to_k", "attn2.to_v")), (D, D), "kohya"),
    ("U34 qwen", "qwen_image", "lora_unet_transformer_blocks_0_attn_to_out_0", (FLUX + "attn.to_out.0",), (D,), "kohya"),
    ("U35 qwen modulation", "qwen_image", "lora_unet_transformer_blocks_0_img_mod_1", (FLUX + "img_mod.1",), (6 * D,), "kohya"),
    ("U36 qwen norm_out is not swapped", "qwen_image", "lora_unet_norm_out_linear", ("norm_out.linear",), (2 * D,), "kohya"),
    ("U37 qwen comfy", "qwen_image", "diffusion_model.transformer_blocks.0.attn.add_q_proj", (FLUX + "attn.add_q_proj",), (D,), "peft"),
    ("U39 z-image", "z_image", "lora_unet_layers_0_attention_qkv", under("layers.0.", ("attention.to_q", "attention.to_k", "attention.to_v")), (D, D, D), "kohya"),
    ("U40 z-image dotted", "z_image", "diffusion_model.layers.0.attention.qkv", under("layers.0.", ("attention.to_q", "attention.to_k", "attention.to_v")), (D, D, D), "kohya"),
    ("U41 z-image out", "z_image", "lora_unet_layers_0_attention_out", ("layers.0.attention.to_out.0",), (D,), "kohya"),
    ("U42 names with underscores", "z_image", "lora_unet_noise_refiner_0_attention_to_q", ("noise_refiner.0.attention.to_q",), (D,), "kohya"),
    ("U42 a hyphen", "z_image", "lora_unet_all_x_embedder_2-1", ("all_x_embedder.2-1",), (D,), "kohya"),
    ("U42 capitals", "z_image", "lora_unet_layers_0_adaLN_modulation_0", ("layers.0.adaLN_modulation.0",), (4 * D,), "kohya"),
    ("U43 tencent Wqkv", "hunyuan_dit", "base_model.model.blocks.0.attn1.Wqkv", under("blocks.0.", ("attn1.to_q", "attn1.to_k", "attn1.to_v")), (D, D, D), "peft"),
    ("U44 tencent kv", "hunyuan_dit", "base_model.model.blocks.0.attn2.kv_proj", under("blocks.0.", ("attn2.to_k", "attn2.to_v")), (D, D), "peft"),
    ("U45 tencent q", "hunyuan_dit", "base_model.model.blocks.0.attn2.q_proj", ("blocks.0.attn2.to_q",), (D,), "peft"),
    ("U45 tencent out", "hunyuan_dit", "base_model.model.blocks.0.attn1.out_proj", ("blocks.0.attn1.to_out.0",), (D,), "peft"),
    ("U47 kohya Wqkv", "hunyuan_dit", "lora_unet_blocks_0_attn1_Wqkv", under("blocks.0.", ("attn1.to_q", "attn1.to_k", "attn1.to_v")), (D, D, D), "kohya"),
    ("U47 mlp", "hunyuan_dit", "lora_unet_blocks_0_mlp_fc1", ("blocks.0.ff.net.0.proj",), (4 * D,), "kohya"),
    ("U47 modulation", "hunyuan_dit", "lora_unet_blocks_0_default_modulation_1", ("blocks.0.norm1.linear",), (D,), "kohya"),
    ("U47 skip", "hunyuan_dit", "lora_unet_blocks_3_skip_linear", ("blocks.3.skip_linear",), (D,), "kohya"),
    ("hunyuan dit comfy", "hunyuan_dit", "diffusion_model.blocks.0.attn1.Wqkv", under("blocks.0.", ("attn1.to_q", "attn1.to_k", "attn1.to_v")), (D, D, D), "kohya"),
    ("U50 image 2.1", "hunyuan_image_2", "lora_unet_double_blocks_0_img_attn_qkv", under(FLUX, QKV), (D, D, D), "kohya"),
    ("U50 image 2.1 mlp", "hunyuan_image_2", "lora_unet_double_blocks_0_img_mlp_fc1", (FLUX + "ff.net.0.proj",), (4 * D,), "kohya"),
    ("U50 image 2.1 modulation", "hunyuan_image_2", "lora_unet_double_blocks_0_img_mod_linear", (FLUX + "norm1.linear",), (6 * D,), "kohya"),
    ("U51 comfy spelling of the mlp", "hunyuan_image_2", "lora_unet_double_blocks_0_img_mlp_0", (FLUX + "ff.net.0.proj",), (4 * D,), "kohya"),
    ("U51 comfy spelling of the modulation", "hunyuan_image_2", "lora_unet_double_blocks_0_img_mod_lin", (FLUX + "norm1.linear",), (6 * D,), "kohya"),
    ("U51 comfy spelling in single blocks", "hunyuan_image_2", "lora_unet_single_blocks_0_modulation_lin", (SINGLE + "norm.linear",), (3 * D,), "kohya"),
    ("U52 linear1 takes its width from the file", "hunyuan_image_2", "lora_unet_single_blocks_0_linear1", (*under(SINGLE, QKV), SINGLE + "proj_mlp"), (D, D, D, 2 * D), "kohya"),
    ("U53 video", "hunyuan_video", "diffusion_model.double_blocks.0.img_attn_qkv", under(FLUX, QKV), (D, D, D), "kohya"),
    ("U53 video under transformer", "hunyuan_video", "transformer.double_blocks.0.img_attn_qkv", under(FLUX, QKV), (D, D, D), "kohya"),
    ("U54 token refiner, A not cut", "hunyuan_video", "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv", under(REFINER, QKV), (D, D, D), "kohya"),
    ("lumina 2, grouped queries", "lumina2", "diffusion_model.layers.0.attention.qkv", under("layers.0.", QKV), (D, D // 3, D // 3), "peft"),
    ("auraflow", "auraflow", "diffusion_model.double_layers.0.attn.w1q", ("joint_transformer_blocks.0.attn.add_q_proj",), (D,), "peft"),
    ("auraflow picture embedding", "auraflow", "diffusion_model.init_x_linear", ("pos_embed.proj",), (D,), "peft"),
    ("flux 2 keeps linear1 fused", "flux2", "diffusion_model.single_blocks.0.linear1", (SINGLE + "attn.to_qkv_mlp_proj",), (9 * D,), "peft"),
]


@pytest.mark.parametrize(("family", "stem", "modules", "rows", "suffix"), [case[1:] for case in RENAMED], ids=[case[0] for case in RENAMED])
def test_a_foreign_module_becomes_ours_with_the_same_delta(tmp_path, family, stem, modules, rows, suffix):
    tensors = pair(stem, sum(rows), suffix=suffix, alpha=2.0 if suffix == "kohya" else None)
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family=family)
    assert tuple(sorted(modules)) == tuple(adapter.modules)
    expected = source_delta(tensors, stem, 0.5 if suffix == "kohya" else 1.0).split(list(rows))
    for module, part in zip(modules, expected, strict=True):
        assert_close(delta_of(adapter, module), part)
        assert adapter.ranks[module] == R


SWAPPED = [
    ("U15 flux", "flux", "lora_unet_final_layer_adaLN_modulation_1", "norm_out.linear"),
    ("U30 sd3 last context block", "sd3", "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1", "transformer_blocks.23.norm1_context.linear"),
    ("U48 hunyuan dit", "hunyuan_dit", "base_model.model.final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("U55 hunyuan video", "hunyuan_video", "diffusion_model.final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("auraflow last modulation", "auraflow", "diffusion_model.modF.1", "norm_out.linear"),
]


@pytest.mark.parametrize(("family", "stem", "module"), [case[1:] for case in SWAPPED], ids=[case[0] for case in SWAPPED])
def test_shift_and_scale_stand_the_other_way_round(tmp_path, family, stem, module):
    tensors = pair(stem, 2 * D, suffix="kohya")
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family=family)
    shift, scale = source_delta(tensors, stem, 0.5).chunk(2)
    assert_close(delta_of(adapter, module), torch.cat([scale, shift]))


PLAIN = "transformer_blocks.0.attn.to_q"


def flux_file(folder, prefix="transformer.", metadata=None, marker=""):
    tensors = {f"{prefix}{PLAIN}.lora_{letter}{marker}.weight": value for letter, value in zip("AB", pair("x", suffix="peft", alpha=None).values(), strict=True)}
    return write(folder, tensors, metadata), source_delta(pair("x", suffix="peft", alpha=None), "x", 1.0)


@pytest.mark.parametrize(("prefix", "marker", "metadata", "scale"), [
    pytest.param("transformer.", "", None, 1.0, id="U1 no metadata means alpha equals rank"),
    pytest.param("transformer.", "", lora_metadata(r=R, lora_alpha=8), 2.0, id="U2 header alpha"),
    pytest.param("", "", lora_metadata("", r=R, lora_alpha=8), 2.0, id="U3 no prefix, unprefixed header"),
    pytest.param("", ".default", None, 1.0, id="U5 adapter name in the key"),
    pytest.param("transformer.", ".default", None, 1.0, id="U38 prefix and adapter name"),
    pytest.param("transformer.", "", lora_metadata(r=R, lora_alpha=4, use_rslora=True), 2.0, id="93 rslora"),
    pytest.param("transformer.", "", lora_metadata(r=R, lora_alpha=4, alpha_pattern={PLAIN: 8}), 2.0, id="alpha pattern by name"),
    pytest.param("transformer.", "", lora_metadata(r=R, lora_alpha=4, alpha_pattern={"^transformer_blocks\\.0\\.attn\\.to_q": 8}), 2.0, id="alpha pattern, anchored and escaped"),
    pytest.param("transformer.", "", lora_metadata(r=R, lora_alpha=4, alpha_pattern={"to_q": 8}), 2.0, id="alpha pattern as a suffix"),
])
def test_the_strength_of_a_diffusers_file(tmp_path, prefix, marker, metadata, scale):
    path, expected = flux_file(tmp_path, prefix, metadata, marker)
    adapter = read_adapter(path, KEY_MAPS)
    assert_close(delta_of(adapter, PLAIN), scale * expected)


def test_a_pattern_with_an_anchor_is_a_whole_name_as_peft_takes_it(tmp_path):
    """`^proj_out` gave its alpha to the `proj_out` of every block as well."""
    from peft.utils.other import get_pattern_key

    names = ("proj_out", "single_transformer_blocks.0.proj_out")
    tensors = {key: value for name in names for key, value in pair(f"transformer.{name}", suffix="peft", alpha=None).items()}
    for pattern in ("^proj_out", "proj_out", "proj_out$"):
        adapter = read_adapter(write(tmp_path, tensors, lora_metadata(r=R, lora_alpha=R, alpha_pattern={pattern: 2 * R})), KEY_MAPS, family="flux")
        assert adapter.scales == {name: 2.0 for name in names if get_pattern_key([pattern], name) == pattern or name == pattern}


def test_patterns_of_a_folder_with_the_makers_names_speak_of_those(tmp_path):
    tensors = pair("base_model.model.blocks.0.attn1.Wqkv", 3 * D, suffix="peft", alpha=None)
    write(tmp_path, tensors, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": R, "alpha_pattern": {"Wqkv": 3 * R}}))
    adapter = read_adapter(tmp_path, KEY_MAPS)
    assert adapter.scales == {f"blocks.0.attn1.to_{letter}": 3.0 for letter in "qkv"}


def test_u4_a_peft_folder_takes_its_strength_from_its_configuration(tmp_path):
    tensors = pair(f"base_model.model.{PLAIN}", suffix="peft", alpha=None)
    write(tmp_path, tensors, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 2, "base_model_name_or_path": "somewhere/else", "auto_mapping": {"x": "y"}}))
    adapter = read_adapter(tmp_path, KEY_MAPS)
    assert adapter.layout == "peft"
    assert_close(delta_of(adapter, PLAIN), source_delta(tensors, f"base_model.model.{PLAIN}", 0.5))


def block_diagonal(stem: str, parts: int, rank: int) -> dict[str, torch.Tensor]:
    down = torch.randn(parts * rank, D)
    up = torch.block_diag(*[torch.randn(D, rank) for _ in range(parts)])
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(float(parts * rank))}


def test_u8_projections_that_were_trained_apart_come_apart_at_their_own_rank(tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = block_diagonal(stem, 3, R)
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family="flux")
    assert set(adapter.ranks.values()) == {R}
    for module, part in zip(under(FLUX, QKV), source_delta(tensors, stem, 1.0).chunk(3), strict=True):
        assert_close(delta_of(adapter, module), part)


@pytest.mark.parametrize(("as_trained", "scale"), [(False, 1.0), (True, 3.0)])
def test_kohya_split_qkv_is_read_as_everyone_reads_it_or_as_it_was_trained(tmp_path, as_trained, scale):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = block_diagonal(stem, 3, R)
    path = write(tmp_path, tensors, {"ss_network_args": '{"split_qkv": "True"}'})
    adapter = read_adapter(path, KEY_MAPS, family="flux", split_qkv_as_trained=as_trained)
    assert_close(delta_of(adapter, FLUX + "attn.to_q"), scale * source_delta(tensors, stem, 1.0).chunk(3)[0])
    assert any("split_qkv" in note for note in adapter.notes)


def test_u25_each_module_has_its_own_alpha(tmp_path):
    tensors = pair("transformer.transformer_blocks.0.attn.to_q", alpha=2.0) | pair("transformer.transformer_blocks.0.attn.to_k", alpha=None)
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS)
    assert_close(delta_of(adapter, FLUX + "attn.to_q"), source_delta(tensors, "transformer.transformer_blocks.0.attn.to_q", 0.5))
    assert_close(delta_of(adapter, FLUX + "attn.to_k"), source_delta(tensors, "transformer.transformer_blocks.0.attn.to_k", 1.0))


@pytest.mark.parametrize(("family", "stem", "module"), [
    pytest.param("flux", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text_model.encoder.layers.0.self_attn.q_proj", id="U26 CLIP"),
    pytest.param("hunyuan_dit", "lora_te1_encoder_layer_0_attention_self_query", "encoder.layer.0.attention.self.query", id="U49 BERT"),
])
def test_text_encoder_layers_are_kept_apart_and_told_of(tmp_path, family, stem, module):
    transformer = "lora_unet_blocks_0_attn1_out_proj" if family == "hunyuan_dit" else "lora_unet_double_blocks_0_img_attn_proj"
    adapter = read_adapter(write(tmp_path, pair(stem) | pair(transformer)), KEY_MAPS, family=family)
    assert adapter.part("text_encoder").modules == [module]
    assert any("text_encoder" in note for note in adapter.notes)


def test_u46_a_lora_on_the_pooler_is_dropped_when_it_does_nothing_and_refused_when_it_would(tmp_path):
    useful, pooler = pair("base_model.model.blocks.0.attn2.q_proj", suffix="peft", alpha=None), pair("base_model.model.pooler.q_proj", suffix="peft", alpha=None)
    with pytest.raises(AdapterError, match="pooler"):
        read_adapter(write(tmp_path, useful | pooler), KEY_MAPS)
    pooler["base_model.model.pooler.q_proj.lora_B.weight"].zero_()
    adapter = read_adapter(write(tmp_path, useful | pooler), KEY_MAPS)
    assert adapter.modules == ["blocks.0.attn2.to_q"]
    assert any("pooler" in note for note in adapter.notes)


@pytest.mark.parametrize(("width", "family"), [(3072, "flux"), (3584, "hunyuan_image_2")])
def test_equal_names_are_told_apart_by_the_width_of_the_published_models(tmp_path, width, family):
    tensors = pair("lora_unet_double_blocks_0_img_mod_lin", width, width, 1)
    assert read_adapter(write(tmp_path, tensors), KEY_MAPS).family == family


def test_what_a_header_says_of_its_family_only_breaks_ties(tmp_path):
    tensors = pair(f"transformer.{PLAIN}", 3072, 3072, 1, suffix="peft", alpha=None)
    assert read_adapter(write(tmp_path, tensors), KEY_MAPS).family == "flux"
    assert read_adapter(write(tmp_path, tensors, {"modelspec.architecture": "qwen-image/lora"}), KEY_MAPS).family == "qwen_image"
    wide = pair(f"transformer.{PLAIN}", 2432, 2432, 1, suffix="peft", alpha=None)
    assert read_adapter(write(tmp_path, wide, {"modelspec.architecture": "flux-1-dev/lora"}), KEY_MAPS).family == "sd3"


@pytest.mark.parametrize(("key", "module"), [
    pytest.param("transformer.transformer_blocks.0.attn.processor.to_q_lora", "transformer_blocks.0.attn.to_q", id="attention processors of old diffusers"),
    pytest.param("double_blocks.0.processor.proj_lora1", "transformer_blocks.0.attn.to_out.0", id="XLabs"),
])
def test_old_processor_names_are_read(tmp_path, key, module):
    a, b = pair("x", suffix="peft", alpha=None).values()
    adapter = read_adapter(write(tmp_path, {f"{key}.down.weight": a, f"{key}.up.weight": b}), KEY_MAPS, family="flux")
    assert_close(delta_of(adapter, module), b @ a)

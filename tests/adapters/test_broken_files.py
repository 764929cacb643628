"""Strangers' files with something wrong: each ends in one clear line, nothing is executed, no model is partly changed."""

from __future__ import annotations

import json

import pytest
import torch

from finetune.adapters.adapter_file import AdapterFile, read_adapter, to_dtype, write_adapter
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.made_files import D, R, delta_of, lora_metadata, pair, write

TO_Q = "transformer.transformer_blocks.0.attn.to_q"
A, B = TO_Q + ".lora_A.weight", TO_Q + ".lora_B.weight"
KOHYA = "lora_unet_double_blocks_0_img_attn_proj"


def good(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A fine file, with tensors replaced or added by full key."""
    return pair(TO_Q, suffix="peft", alpha=None) | changes


def without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in good().items() if name != key}


def a_value(value: float, key: str = A) -> dict[str, torch.Tensor]:
    tensors = good()
    tensors[key][0, 0] = value
    return tensors


REFUSED_TENSORS = [
    ("1 base layer weight", good(**{TO_Q + ".base_layer.weight": torch.zeros(D, D)}), "base weight"),
    ("2 base layer bias", good(**{TO_Q + ".base_layer.bias": torch.zeros(D)}), "base weight"),
    ("3 plain base weight", good(**{"proj_out.weight": torch.zeros(D, D)}), "not part of a LoRA"),
    ("4 norm weight", good(**{"transformer.transformer_blocks.0.attn.norm_q.weight": torch.zeros(D)}), "not part of a LoRA"),
    ("5 buffer", good(**{"pos_embed.proj.bias": torch.zeros(D)}), "not part of a LoRA"),
    ("6 NaN in A", a_value(float("nan")), "NaN"),
    ("7 infinity in B", a_value(float("inf"), B), "NaN or infinity"),
    ("10 alpha NaN", pair(KOHYA, alpha=float("nan")), "alpha"),
    ("11 alpha negative", pair(KOHYA, alpha=-1.0), "alpha"),
    ("12 alpha zero", pair(KOHYA, alpha=0.0), "alpha"),
    ("13 alpha infinite", pair(KOHYA, alpha=float("inf")), "alpha"),
    ("13 alpha 1e30", pair(KOHYA, alpha=1e30), "alpha"),
    ("16 alpha per rank", pair(KOHYA, alpha=None) | {KOHYA + ".alpha": torch.ones(R)}, "alpha has the shape"),
    ("18 alpha alone", {KOHYA + ".alpha": torch.tensor(1.0)}, "alpha without"),
    ("18 alpha alone beside a good pair", pair(KOHYA) | {"lora_unet_double_blocks_0_txt_attn_proj.alpha": torch.tensor(1.0)}, "alpha without"),
    ("19 B missing", without(B), "lora_B is missing"),
    ("20 A missing", without(A), "lora_A is missing"),
    ("21 ranks differ", good(**{B: torch.randn(D, R + 1)}), "do not belong together"),
    ("25 A and B swapped", {A: torch.randn(D, R), B: torch.randn(R, D + 1)}, "do not belong together"),
    ("27 no outputs of a fused layer", pair("lora_unet_double_blocks_0_img_attn_qkv", 0), "do not belong together"),
    ("27 rank zero", {A: torch.randn(0, D), B: torch.randn(D, 0)}, "do not belong together"),
    ("29 A with three axes", good(**{A: torch.randn(R, D, 1)}), "3 axes"),
    ("31 A without axes", good(**{A: torch.tensor(1.0)}), "0 axes"),
    ("32 integer A", good(**{A: torch.ones(R, D, dtype=torch.int32)}), "I32"),
    ("32 boolean A", good(**{A: torch.ones(R, D, dtype=torch.bool)}), "BOOL"),
    ("33 complex A", good(**{A: torch.ones(R, D, dtype=torch.complex64)}), "C64"),
    ("34 8-bit float A", good(**{A: torch.ones(R, D).to(torch.float8_e4m3fn)}), "F8_E4M3"),
    ("36 unknown kohya module next to good ones", pair(KOHYA) | pair("lora_unet_double_blocks_0_banana"), "banana"),
    ("41 unet prefix", pair("unet.down_blocks.0.attn.to_q", suffix="peft", alpha=None), "UNet"),
    ("45 empty file", {}, "no tensor"),
    ("46 a checkpoint", {"transformer_blocks.0.attn.to_q.weight": torch.randn(D, D)}, "not part of a LoRA"),
    ("48 magnitude on one module of two", good(**{TO_Q + ".lora_magnitude_vector": torch.ones(D)}) | pair(TO_Q[:-1] + "k", suffix="peft", alpha=None), "only 1 of 2"),
    ("48 magnitude of the wrong length", good(**{TO_Q + ".lora_magnitude_vector": torch.ones(D - 1)}), "magnitudes are not"),
    ("49 bias", good(**{TO_Q + ".lora_B.bias": torch.ones(D)}), "bias"),
    ("53 fused and split of one module", pair("lora_unet_double_blocks_0_img_attn_qkv", 3 * D) | pair("diffusion_model.transformer_blocks.0.attn.to_q", seed=1), "comes twice"),
    ("54 the same module with and without a name", good(**{TO_Q + ".lora_A.default.weight": torch.randn(R, D)}), "mean the same tensor"),
    ("55 two prefixes that overlap", pair(KOHYA) | pair("transformer.transformer_blocks.0.attn.to_out.0", seed=1), "comes twice"),
    ("56 two adapters", {f"{TO_Q}.lora_{letter}.{name}.weight": torch.randn(R, D) for letter in "AB" for name in ("one", "two")}, "adapters in one file|same tensor"),
    ("58 broken Kronecker factors", {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1_a": torch.randn(4, 2), "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": torch.randn(6, 6)}, "incomplete"),
    ("58 a Kronecker factor of NaN", {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.full((4, 4), float("nan")), "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": torch.randn(6, 6)}, "NaN"),
    *((f"58 a Kronecker factor of the shape {shape}", {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.randn(shape), "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": torch.randn(6, 6)}, "axes|no matrices")
      for shape in ((), (4,), (2, 4, 4), (4, 0), (4, 4, 1, 1))),
    ("58 Kronecker factors of rank zero", {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.randn(4, 4), "lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a": torch.randn(6, 0),
                                           "lycoris_transformer_blocks_0_attn_to_q.lokr_w2_b": torch.randn(0, 6), "lycoris_transformer_blocks_0_attn_to_q.alpha": torch.tensor(1.0)}, "no matrices"),
    *((f"58 a Hadamard factor of the shape {shape}", {f"lycoris_transformer_blocks_0_attn_to_q.hada_{n}": torch.randn(s) for n, s in (("w1_a", (D, 2)), ("w1_b", (2, D)), ("w2_a", (D, 2)), ("w2_b", shape))}, "axes|do not belong together")
      for shape in ((), (D,), (2, 2, D), (2, D, 1, 1))),
    ("58 Hadamard factors of rank zero", {f"lycoris_transformer_blocks_0_attn_to_q.hada_{n}": torch.randn(s) for n, s in (("w1_a", (D, 0)), ("w1_b", (0, D)), ("w2_a", (D, 0)), ("w2_b", (0, D)))}
     | {"lycoris_transformer_blocks_0_attn_to_q.alpha": torch.tensor(1.0)}, "do not belong together"),
    *((f"58 a Tucker core of the shape {shape}", pair(KOHYA) | {KOHYA + ".lora_mid.weight": torch.randn(shape)}, "axes|Tucker") for shape in ((R,), (R, R + 1, 3, 3), (R, R))),
    ("58 Hadamard factors that do not fit", {f"lycoris_transformer_blocks_0_attn_to_q.hada_{n}": torch.randn(*s) for n, s in (("w1_a", (D, 2)), ("w1_b", (3, D)), ("w2_a", (D, 2)), ("w2_b", (2, D)))}, "do not belong together"),
    ("59 OFT", {"lycoris_transformer_blocks_0_attn_to_q.oft_blocks": torch.randn(2, 2, 2)}, "OFT"),
    ("59 GLoRA", {f"lycoris_transformer_blocks_0_attn_to_q.{name}.weight": torch.randn(2, 2) for name in ("a1", "a2", "b1", "b2")}, "GLoRA"),
    ("59 IA3", {"lycoris_transformer_blocks_0_attn_to_q.on_input": torch.tensor(True)}, "IA|not a LoRA"),
    ("59 full difference", {"diffusion_model.transformer_blocks.0.attn.to_q.diff": torch.randn(D, D)}, "full weight difference"),
    ("59 norm difference", {"diffusion_model.transformer_blocks.0.attn.norm_q.w_norm": torch.randn(D)}, "norm difference"),
    ("60 bias difference", pair(KOHYA) | {KOHYA + ".diff_b": torch.ones(D)}, "bias"),
    ("64 dunder path", pair("__class__.x", suffix="kohya"), "an attribute"),
    ("69 a set_weight", {"diffusion_model.transformer_blocks.0.attn.to_q.set_weight": torch.randn(D, D)}, "full weight difference"),
    ("108 magnitudes per input column", pair(KOHYA) | {KOHYA + ".dora_scale": torch.ones(1, D)}, "per input column"),
    ("an embedding", {TO_Q + ".lora_embedding_A": torch.randn(R, D)}, "embedding"),
    ("kohya names of no family", pair("lora_unet_down_blocks_0_attentions_0_proj_in"), "no known family"),
]


@pytest.mark.parametrize(("tensors", "said"), [case[1:] for case in REFUSED_TENSORS], ids=[case[0] for case in REFUSED_TENSORS])
def test_tensors_that_are_no_adapter_are_refused_with_their_reason(tmp_path, tensors, said):
    with pytest.raises(AdapterError, match=said) as caught:
        read_adapter(write(tmp_path, tensors), KEY_MAPS, family="flux" if any(key.startswith("lycoris") for key in tensors) else None)
    assert caught.value.where
    assert "\n" not in caught.value.what


REFUSED_METADATA = [
    ("90 another rank and alpha", lora_metadata(r=8, lora_alpha=16), "strength is unknown"),
    ("92 alpha as text", lora_metadata(r=R, lora_alpha="8"), "lora_alpha"),
    ("92 alpha 1e30", lora_metadata(r=R, lora_alpha=1e30), "lora_alpha"),
    ("92 alpha negative", lora_metadata(r=R, lora_alpha=-4), "lora_alpha"),
    ("rank zero", lora_metadata(r=0, lora_alpha=4), "r in the adapter's settings"),
    ("96 catastrophic pattern", lora_metadata(r=R, lora_alpha=R, alpha_pattern={"(a+)+$": 8}), "expressions, which are never run"),
    ("alpha by an expression that fits", lora_metadata(r=R, lora_alpha=R, alpha_pattern={".*to_q": 8}), "expressions, which are never run"),
    ("rank by an expression that fits", lora_metadata(r=2 * R, lora_alpha=2 * R, rank_pattern={".*to_q": R}), "strength is unknown"),
    ("rank of four hundred digits", {"lora_adapter_metadata": '{"transformer.r": 1' + "0" * 400 + "}"}, "r in the adapter's settings"),
    ("pattern of another kind", lora_metadata(r=R, lora_alpha=R, alpha_pattern=[1]), "alpha_pattern"),
]


@pytest.mark.parametrize(("metadata", "said"), [case[1:] for case in REFUSED_METADATA], ids=[case[0] for case in REFUSED_METADATA])
def test_settings_that_leave_the_strength_unknown_are_refused(tmp_path, metadata, said):
    with pytest.raises(AdapterError, match=said):
        read_adapter(write(tmp_path, good(), metadata), KEY_MAPS)


NOTED_METADATA = [
    ("86 not JSON", {"lora_adapter_metadata": "{oops"}, "ignored"),
    ("87 a list", {"lora_adapter_metadata": "[1]"}, "ignored"),
    ("92 NaN", {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": NaN}'}, "ignored"),
    ("97 nested a hundred thousand deep", {"lora_adapter_metadata": "[" * 100_000}, "ignored"),
    ("94 modules_to_save", lora_metadata(r=R, lora_alpha=R, modules_to_save=["proj_out"]), "modules_to_save"),
    ("94 pissa", lora_metadata(r=R, lora_alpha=R, init_lora_weights="pissa"), "init_lora_weights"),
    ("95 megatron", lora_metadata(r=R, lora_alpha=R, megatron_config={"a": 1}, megatron_core="evil"), "megatron_config"),
]


@pytest.mark.parametrize(("metadata", "said"), [case[1:] for case in NOTED_METADATA], ids=[case[0] for case in NOTED_METADATA])
def test_settings_that_mean_nothing_here_are_ignored_aloud(tmp_path, metadata, said):
    adapter = read_adapter(write(tmp_path, good(), metadata), KEY_MAPS)
    assert any(said in note for note in adapter.notes)
    torch.testing.assert_close(delta_of(adapter, "transformer_blocks.0.attn.to_q"), good()[B] @ good()[A])


@pytest.mark.parametrize("metadata", [
    pytest.param({"lora_adapter_metadata": "{}"}, id="88 empty"),
    pytest.param(lora_metadata(r=R, lora_alpha=R, a_field_of_the_future=1), id="89 unknown field"),
    pytest.param(lora_metadata(r=8, lora_alpha=8), id="90 another rank at scale 1"),
    pytest.param(lora_metadata(r=R, lora_alpha=R, rank_pattern={".*to_k": 8}), id="an expression for ranks where the rank is the usual one"),
    pytest.param({"ss_tag_frequency": "<script>alert(1)</script>", "modelspec.title": "---\na: b"}, id="98 markup"),
])
def test_harmless_settings_change_nothing(tmp_path, metadata):
    adapter = read_adapter(write(tmp_path, good(), metadata), KEY_MAPS)
    torch.testing.assert_close(delta_of(adapter, "transformer_blocks.0.attn.to_q"), good()[B] @ good()[A])


def test_91_a_rank_pattern_without_an_alpha_pattern_keeps_the_strength_that_peft_gives_it(tmp_path):
    tensors = pair(TO_Q, rank=8, suffix="peft", alpha=None)
    settings = lora_metadata(r=4, lora_alpha=4, rank_pattern={"transformer_blocks.0.attn.to_q": 8})
    adapter = read_adapter(write(tmp_path, tensors, settings), KEY_MAPS)
    torch.testing.assert_close(delta_of(adapter, "transformer_blocks.0.attn.to_q"), 0.5 * tensors[B] @ tensors[A])


@pytest.mark.parametrize("said", ['{"trigger": "\\ud800"}', '{"\\udfff": 1}', '["\\ud800"]', "{", "[" * 5000])
def test_a_provenance_that_nobody_wrote_is_none_and_can_be_written_over(tmp_path, said):
    """Half of a character in it ended in a traceback when the adapter was merged, resized or published."""
    adapter = read_adapter(write(tmp_path, good(), {"brushwork": said}), KEY_MAPS)
    assert adapter.provenance == {}
    written = write_adapter(tmp_path / "again.safetensors", adapter.with_provenance(**adapter.provenance, operation="resize"))
    assert read_adapter(written).provenance == {"operation": "resize"}


def test_99_an_embedded_thumbnail_is_dropped(tmp_path):
    adapter = read_adapter(write(tmp_path, good(), {"modelspec.thumbnail": "javascript:alert(1)", "modelspec.title": "x"}), KEY_MAPS)
    assert "modelspec.thumbnail" not in adapter.metadata and "modelspec.title" in adapter.metadata


@pytest.mark.parametrize(("config", "said"), [
    pytest.param({"peft_type": "IA3"}, "IA3", id="101 another kind of adapter"),
    pytest.param("[1, 2]", "not a table", id="a list"),
    pytest.param("{", "not JSON", id="not JSON"),
    pytest.param(" " * (1 << 20) + "{}", "more than", id="huge"),
])
def test_a_peft_folder_with_a_bad_configuration_is_refused(tmp_path, config, said):
    write(tmp_path, pair("base_model.model.transformer_blocks.0.attn.to_q", suffix="peft", alpha=None), name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path, KEY_MAPS)


NORMALISED = [
    ("14 integer alpha", pair(KOHYA, alpha=None) | {KOHYA + ".alpha": torch.tensor(2)}),
    ("15 alpha of one element", pair(KOHYA, alpha=None) | {KOHYA + ".alpha": torch.tensor([2.0])}),
    ("15 alpha of one by one", pair(KOHYA, alpha=None) | {KOHYA + ".alpha": torch.tensor([[2.0]])}),
    ("35 64-bit floats", {key: value.double() for key, value in pair(KOHYA).items()}),
    ("60 a bias difference of zeros", pair(KOHYA) | {KOHYA + ".diff_b": torch.zeros(D)}),
]


@pytest.mark.parametrize("tensors", [case[1] for case in NORMALISED], ids=[case[0] for case in NORMALISED])
def test_odd_but_clear_files_are_read(tmp_path, tensors):
    adapter = read_adapter(write(tmp_path, tensors), KEY_MAPS, family="flux")
    expected = 0.5 * pair(KOHYA)[KOHYA + ".lora_up.weight"] @ pair(KOHYA)[KOHYA + ".lora_down.weight"]
    torch.testing.assert_close(delta_of(adapter, "transformer_blocks.0.attn.to_out.0"), expected)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["36 mixed halves", "36 mixed"])
def test_mixed_dtypes_are_read(tmp_path, dtypes):
    tensors = good()
    tensors = {A: tensors[A].to(dtypes[0]), B: tensors[B].to(dtypes[1])}
    assert read_adapter(write(tmp_path, tensors), KEY_MAPS).ranks == {"transformer_blocks.0.attn.to_q": R}


@pytest.mark.parametrize(("tensors", "said"), [
    pytest.param(good(**{B: torch.zeros(D, R)}), "no effect", id="106 B of zeros"),
    pytest.param(pair(TO_Q, rank=D + 1, suffix="peft", alpha=None), "rank is larger", id="28 rank above the layer"),
    pytest.param(pair(KOHYA) | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "text_encoder", id="61 text encoder"),
    pytest.param(pair(KOHYA) | pair("lora_te2_encoder_block_0_layer_0_SelfAttention_q"), "text_encoder_2", id="62 T5"),
])
def test_what_is_worth_knowing_is_said(tmp_path, tensors, said):
    assert any(said in note for note in read_adapter(write(tmp_path, tensors), KEY_MAPS, family="flux").notes)


def test_8_a_cast_that_overflows_is_refused():
    with pytest.raises(AdapterError, match="too large for float16"):
        to_dtype(AdapterFile({"x.lora_A.weight": torch.full((1, 2), 1e6), "x.lora_B.weight": torch.ones(2, 1)}), "float16")

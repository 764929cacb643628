"""Every family, every layout, there and back: the same modules, ranks and delta W; and what grows is said."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from finetune.adapters import exporting, factors
from finetune.adapters.adapter_file import AdapterFile, read_adapter, write_adapter
from finetune.adapters.exporting import LAYOUTS, default_name, export
from finetune.adapters.keys import REST, KeyMap, fill
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.made_files import delta_of

WIDTH = 24
LAYOUT_OF_FAMILY = [(family, layout) for family, key_map in KEY_MAPS.items() for layout in LAYOUTS if layout != "tencent" or layout in key_map.layouts]


def layer_shapes(key_map: KeyMap) -> dict[str, tuple[int, int]]:
    """Plausible sizes for every layer of block 1: fused parts are as wide as their rule says, everything else is square."""
    shapes = {fill(template, ["1"] * template.count("{}")): (WIDTH, WIDTH) for template in key_map.modules}
    for rules in key_map.namings.values():
        for rule in rules:
            numbers = ["1"] * rule.foreign.count("{}")
            for module, row in zip(rule.modules, rule.rows, strict=False):
                if row == REST:
                    shapes[fill(module, numbers)] = (round(WIDTH * rule.rest_over_input), WIDTH)
            if rule.swap_halves:
                shapes[fill(rule.modules[0], numbers)] = (2 * WIDTH, WIDTH)
    return shapes


def random_adapter(key_map: KeyMap, seed: int, share: float, shared_a: bool = False) -> AdapterFile:
    """A random subset of a family's layers at random ranks; or all layers of a fused group on one A."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    rank_of_all = chance.randint(1, 6)
    a_of_all = torch.randn(rank_of_all, WIDTH, generator=generator)
    shapes = layer_shapes(key_map)
    picked = [module for module in shapes if chance.random() < share] or [next(iter(shapes))]
    for module in picked:
        outputs, inputs = shapes[module]
        rank = rank_of_all if shared_a else chance.randint(1, 6)
        tensors[f"{module}.lora_A.weight"] = a_of_all.clone() if shared_a else torch.randn(rank, inputs, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return AdapterFile(tensors)


def there_and_back(adapter: AdapterFile, family: str, layout: str) -> AdapterFile:
    with TemporaryDirectory() as folder:
        path = Path(folder) / default_name(layout, "adapter")
        export(adapter, layout, path, KEY_MAPS[family])
        return read_adapter(path, KEY_MAPS, family=family)


@pytest.mark.parametrize(("family", "layout"), LAYOUT_OF_FAMILY)
def test_u56_every_layer_of_a_family_comes_back_bit_for_bit_from_every_layout(family, layout):
    adapter = random_adapter(KEY_MAPS[family], seed=len(family + layout), share=1.0)
    again = there_and_back(adapter, family, layout)
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(again.tensors[key].equal(value) for key, value in adapter.tensors.items())
    assert again.layout == layout


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(LAYOUT_OF_FAMILY), seed=st.integers(0, 10_000), share=st.floats(0.05, 1.0), shared_a=st.booleans())
def test_u59_random_subsets_and_ranks_come_back(case, seed, share, shared_a):
    adapter = random_adapter(KEY_MAPS[case[0]], seed, share, shared_a)
    again = there_and_back(adapter, *case)
    assert again.ranks == adapter.ranks
    assert all(again.tensors[key].equal(value) for key, value in adapter.tensors.items())


@pytest.mark.parametrize("family", KEY_MAPS)
def test_a_family_is_found_again_from_keys_alone_when_it_is_the_first_that_fits(tmp_path, family):
    path = write_adapter(tmp_path / "adapter.safetensors", random_adapter(KEY_MAPS[family], 0, 1.0))
    assert read_adapter(path, KEY_MAPS).family == family


def qkv(ranks: tuple[int, ...], shared: bool) -> AdapterFile:
    tensors: dict[str, torch.Tensor] = {}
    a = torch.randn(ranks[0], WIDTH)
    for name, rank in zip(("to_q", "to_k", "to_v"), ranks, strict=True):
        tensors[f"blocks.0.attn1.{name}.lora_A.weight"] = a.clone() if shared else torch.randn(rank, WIDTH)
        tensors[f"blocks.0.attn1.{name}.lora_B.weight"] = torch.randn(WIDTH, rank)
    return AdapterFile(tensors)


def test_u57_layers_that_share_a_keep_their_rank_when_fused(tmp_path):
    result = export(qkv((4, 4, 4), shared=True), "comfy", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"])
    assert result.rank_growth == {}
    assert read_adapter(tmp_path / "a.safetensors", KEY_MAPS).ranks == dict.fromkeys((f"blocks.0.attn1.to_{x}" for x in "kqv"), 4)


def test_u58_ranks_add_up_when_layers_were_adapted_apart_and_it_is_said(tmp_path):
    result = export(qkv((2, 3, 5), shared=False), "comfy", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"])
    assert result.rank_growth == {"blocks.0.attn1.Wqkv": (5, 10)}


def test_a_smaller_rank_is_taken_only_when_asked_for_and_its_error_is_the_true_one(tmp_path):
    adapter = qkv((4, 4, 4), shared=False)
    result = export(adapter, "comfy", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"], rank=6)
    again = read_adapter(tmp_path / "a.safetensors", KEY_MAPS)
    names = [f"blocks.0.attn1.to_{letter}" for letter in "qkv"]
    exact, cut = torch.cat([delta_of(adapter, name) for name in names]), torch.cat([delta_of(again, name) for name in names])
    assert result.errors["blocks.0.attn1.Wqkv"] == pytest.approx(float((cut - exact).norm() / exact.norm()), rel=1e-3)
    assert 0.1 < result.errors["blocks.0.attn1.Wqkv"] < 0.6


def test_fused_sizes_come_from_the_base_where_a_part_has_no_adapter(tmp_path):
    module = "single_transformer_blocks.0.attn.to_q"
    adapter = AdapterFile({f"{module}.lora_A.weight": torch.randn(2, WIDTH), f"{module}.lora_B.weight": torch.randn(WIDTH, 2)})
    export(adapter, "kohya", tmp_path / "a.safetensors", KEY_MAPS["flux"], shapes={"single_transformer_blocks.0.proj_mlp": (2 * WIDTH, WIDTH)})
    from safetensors.torch import load_file

    assert load_file(tmp_path / "a.safetensors")["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (5 * WIDTH, 2)
    assert read_adapter(tmp_path / "a.safetensors", KEY_MAPS, family="flux").modules == [module]


def test_kohya_files_say_an_alpha_that_equals_the_rank(tmp_path):
    export(qkv((4, 4, 4), shared=False), "kohya", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"])
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["lora_unet_blocks_0_attn1_Wqkv.alpha"] == tensors["lora_unet_blocks_0_attn1_Wqkv.lora_down.weight"].shape[0] == 12


def test_private_notes_of_other_trainers_do_not_travel_on(tmp_path):
    adapter = AdapterFile(qkv((4, 4, 4), shared=True).tensors, {"ss_tag_frequency": "captions", "ss_dataset_dirs": "places", "modelspec.title": "kept"})
    export(adapter, "kohya", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"])
    metadata = read_adapter(tmp_path / "a.safetensors", KEY_MAPS).metadata
    assert not {"ss_tag_frequency", "ss_dataset_dirs"} & set(metadata) and metadata["modelspec.title"] == "kept"


@pytest.mark.parametrize(("layout", "family", "said"), [
    ("tencent", "flux", "no official Tencent layout"), ("kohya", None, "name table"), ("a1111", "flux", "no layout is called"),
])
def test_layouts_that_a_family_does_not_have_are_refused(tmp_path, layout, family, said):
    with pytest.raises(AdapterError, match=said):
        export(qkv((4, 4, 4), shared=True), layout, tmp_path / "x.safetensors", KEY_MAPS.get(family or ""))


def test_magnitudes_are_fused_with_their_rows_or_refused(tmp_path):
    tensors = dict(qkv((4, 4, 4), shared=True).tensors)
    for letter in "qkv":
        tensors[f"blocks.0.attn1.to_{letter}.lora_magnitude_vector"] = torch.rand(WIDTH)
    export(AdapterFile(tensors), "kohya", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"])
    again = read_adapter(tmp_path / "a.safetensors", KEY_MAPS)
    assert all(again.tensors[key].equal(value) for key, value in tensors.items())
    for key in [key for key in tensors if "to_v" in key]:
        del tensors[key]
    with pytest.raises(AdapterError, match="some parts"):
        export(AdapterFile(tensors), "kohya", tmp_path / "b.safetensors", KEY_MAPS["hunyuan_dit"])


def dora_qkv(ranks=(4, 4, 4), shared=False):
    tensors = dict(qkv(ranks, shared).tensors)
    return AdapterFile(tensors | {f"blocks.0.attn1.to_{letter}.lora_magnitude_vector": torch.rand(WIDTH) + 0.5 for letter in "qkv"})


def test_a_dora_cut_to_a_rank_keeps_its_magnitudes_which_are_as_good_as_best(tmp_path):
    """W' = m (W + dW) / |W + dW| by row: with the direction off by an angle, m cos(angle) is nearest, which needs the base; m itself errs
    more by sqrt(2 / (1 + cos)), a few thousandths; lengths taken anew from the cut sum err far more."""
    adapter, weight = dora_qkv(), torch.randn(3 * WIDTH, WIDTH, dtype=torch.float64)
    names = [f"blocks.0.attn1.to_{letter}" for letter in "qkv"]
    export(adapter, "comfy", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"], rank=8)
    again = read_adapter(tmp_path / "a.safetensors", KEY_MAPS)
    assert all(again.tensors[name + ".lora_magnitude_vector"].equal(adapter.tensors[name + ".lora_magnitude_vector"]) for name in names)
    full, cut = (weight + 0.1 * torch.cat([delta_of(each, name) for name in names]).double() for each in (adapter, again))
    length, units = torch.cat([adapter.tensors[name + ".lora_magnitude_vector"] for name in names]).double()[:, None], cut / cut.norm(dim=1, keepdim=True)
    target = length * full / full.norm(dim=1, keepdim=True)
    cosine = (target * units).sum(1, keepdim=True) / length

    def error(lengths):
        return (target - lengths * units).norm(dim=1)

    tried = torch.stack([error(length * share) for share in torch.linspace(0.9, 1.1, 41, dtype=torch.float64)]).min(0).values
    assert (error(length * cosine) <= tried + 1e-12).all()
    assert_close(error(length), error(length * cosine) * (2 / (1 + cosine[:, 0])).sqrt())
    assert error(length).norm() < 1.01 * error(length * cosine).norm() < 0.5 * error(cut.norm(dim=1, keepdim=True)).norm()


def test_magnitudes_act_where_a_part_of_a_fused_layer_adds_nothing(tmp_path):
    """Its B is zero, so the part was left out on reading, and its magnitudes with it."""
    tensors = dict(dora_qkv().tensors)
    tensors["blocks.0.attn1.to_k.lora_B.weight"] = torch.zeros(WIDTH, 4)
    export(AdapterFile(tensors), "kohya", tmp_path / "a.safetensors", KEY_MAPS["hunyuan_dit"])
    again = read_adapter(tmp_path / "a.safetensors", KEY_MAPS)
    for letter in "qkv":
        assert again.tensors[f"blocks.0.attn1.to_{letter}.lora_magnitude_vector"].equal(tensors[f"blocks.0.attn1.to_{letter}.lora_magnitude_vector"])
    assert not delta_of(again, "blocks.0.attn1.to_k").any()


ENCODER = {"encoder.layer.0.output.dense.lora_A.weight": torch.randn(2, 16), "encoder.layer.0.output.dense.lora_B.weight": torch.randn(16, 2)}


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("wrong", ["dora_scale", "lora_te", "final_layer"])
def test_what_is_written_wrong_does_not_pass(tmp_path, monkeypatch, wrong, rank):
    """Magnitudes and text encoders were not compared, and nothing at all where a rank was asked for."""
    tensors = dict(dora_qkv().tensors if wrong == "dora_scale" else qkv((4, 4, 4), shared=False).tensors)
    if wrong == "final_layer":
        tensors |= {"norm_out.linear.lora_A.weight": torch.randn(2, WIDTH), "norm_out.linear.lora_B.weight": torch.randn(2 * WIDTH, 2)}
    adapter = AdapterFile(tensors, text_encoders={"text_encoder": ENCODER} if wrong == "lora_te" else {})
    export(adapter, "kohya", tmp_path / "right.safetensors", KEY_MAPS["hunyuan_dit"], rank=rank)
    whole = exporting.write_tensors

    def damaged(path, shapes, metadata, read):
        hit = next(key for key in shapes if wrong in key and not key.endswith("alpha"))
        whole(path, shapes, metadata, lambda key: read(key) * 1.01 if key == hit else read(key))

    monkeypatch.setattr(exporting, "write_tensors", damaged)
    with pytest.raises(AdapterError, match="magnitudes are others|written file differs"):
        export(adapter, "kohya", tmp_path / "wrong.safetensors", KEY_MAPS["hunyuan_dit"], rank=rank)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    adapter = qkv((2, 3, 5), shared=False)
    shuffled = AdapterFile(dict(reversed(list(adapter.tensors.items()))))
    first = write_adapter(tmp_path / "a.safetensors", adapter.with_provenance(b=1, a=2)).read_bytes()
    assert write_adapter(tmp_path / "b.safetensors", shuffled.with_provenance(a=2, b=1)).read_bytes() == first


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 8), outputs=st.integers(2, 20), inputs=st.integers(2, 20), scale=st.sampled_from([0.5, 0.25, 2.0, 0.3, 1 / 3, 7.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_folding_a_strength_is_exact_to_float32(rank, outputs, inputs, scale, dtype):
    b = torch.randn(outputs, rank).to(dtype)
    folded = factors.fold(b, scale)
    assert_close(folded.double(), b.double() * scale, rtol=1e-7, atol=0)


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 8), outputs=st.integers(2, 20), inputs=st.integers(2, 20))
def test_the_spectrum_from_the_factors_is_that_of_the_product(rank, outputs, inputs):
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    u, s, v = factors.spectrum(a, b)
    dense = torch.linalg.svdvals((b.double() @ a.double()))
    assert_close(s, torch.cat([dense, dense.new_zeros(rank)])[: len(s)], atol=1e-9, rtol=1e-9)
    assert_close((u * s) @ v, b.double() @ a.double(), atol=1e-9, rtol=1e-9)

"""Adapters of HunyuanImage-3.0 meet the base's own layout: heads interleaved by key head, "up" before "gate"."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from safetensors.torch import save_file

from data_tools.progress import Progress
from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.arithmetic import Weighted
from finetune.adapters.base_weights import BaseWeights
from finetune.errors import AdapterError, BadInput, BaseModelError
from finetune.families import hunyuan_image_3
from finetune.families.base_models import locate_base
from finetune.families.hunyuan_image_3 import AttentionLayout, fused, join_qkv, split_qkv

LAYOUT = AttentionLayout(kv_heads=2, group=3, head_dim=4)
WIDTH, RANK = 8, 2


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_splitting_finds_every_heads_rows_and_joining_undoes_it():
    rows = torch.arange(LAYOUT.rows, dtype=torch.float32)[:, None].repeat(1, WIDTH)
    query, key, value = split_qkv(rows, LAYOUT)
    for group in range(LAYOUT.kv_heads):
        for head in range(LAYOUT.group):
            first = (group * LAYOUT.group + head) * LAYOUT.head_dim
            assert query[first, 0] == (group * (LAYOUT.group + 2) + head) * LAYOUT.head_dim
        assert key[group * LAYOUT.head_dim, 0] == (group * (LAYOUT.group + 2) + LAYOUT.group) * LAYOUT.head_dim
        assert value[group * LAYOUT.head_dim, 0] == (group * (LAYOUT.group + 2) + LAYOUT.group + 1) * LAYOUT.head_dim
    assert torch.equal(join_qkv(query, key, value, LAYOUT), rows)


def test_a_projection_of_another_layout_is_refused():
    with pytest.raises(AdapterError, match="rows"):
        split_qkv(torch.zeros(LAYOUT.rows + 4, WIDTH), LAYOUT)


ATTENTION, SHARED, EXPERT = "model.layers.0.self_attn", "model.layers.0.mlp.shared_mlp", "model.layers.0.mlp.experts.1"
CONFIG = {"model_type": "hunyuan_image_3_moe", "architectures": ["HunyuanImage3ForCausalMM"], "hidden_size": WIDTH, "num_attention_heads": 6,
          "num_key_value_heads": 2, "attention_head_dim": 4}


def base_weights():
    return {f"{ATTENTION}.qkv_proj.weight": drawn(LAYOUT.rows, WIDTH, seed=1), f"{ATTENTION}.o_proj.weight": drawn(WIDTH, 24, seed=2),
            f"{SHARED}.gate_and_up_proj.weight": drawn(20, WIDTH, seed=3).to(torch.bfloat16), f"{EXPERT}.down_proj.weight": drawn(WIDTH, 10, seed=5),
            "model.layers.0.mlp.gate.wg.weight": drawn(2, WIDTH, seed=6), "vae.conv.weight": drawn(3, 3, 1, 1, 1, seed=7)}


@pytest.fixture
def base(tmp_path):
    """Tiny random weights in the checkpoint's layout: two shards beside an index, configuration and foreign code."""
    folder, weights = tmp_path / "HunyuanImage-3", base_weights()
    folder.mkdir()
    shards = {"model-0001-of-0002.safetensors": list(weights)[:2], "model-0002-of-0002.safetensors": list(weights)[2:]}
    for name, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "hunyuan.py").write_text("raise SystemExit('code that comes with a model is never run')")
    return folder


def pair(module, out, width, seed):
    return {f"{module}.lora_A.weight": drawn(RANK, width, seed=seed), f"{module}.lora_B.weight": drawn(out, RANK, seed=seed + 100)}


def baked(base, adapter, out, weight=1.0):
    hunyuan_image_3.bake(base, out, [Weighted(AdapterFile(adapter), weight)], Progress())
    with BaseWeights(out) as weights:
        return {key: weights.read(key) for key in weights.keys}


def test_an_adapter_of_split_projections_acts_on_each_head_as_it_does_by_itself(base, tmp_path):
    adapter = pair(f"{ATTENTION}.q_proj", 24, WIDTH, 10) | pair(f"{ATTENTION}.v_proj", 8, WIDTH, 11)
    before, after = base_weights(), baked(base, adapter, tmp_path / "out", 0.5)
    x = drawn(5, WIDTH, seed=4)
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        was, now = (x @ split_qkv(weights[f"{ATTENTION}.qkv_proj.weight"], LAYOUT)[index].T for weights in (before, after))
        a, b = adapter.get(f"{ATTENTION}.{name}.lora_A.weight"), adapter.get(f"{ATTENTION}.{name}.lora_B.weight")
        change = torch.zeros_like(was) if a is None else 0.5 * (x @ a.T) @ b.T
        assert torch.allclose(now, was + change, atol=1e-5), name
    untouched = [key for key in before if "qkv_proj" not in key]
    assert all(torch.equal(after[key], before[key]) for key in untouched)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}


def test_up_comes_before_gate_and_the_dtype_stays(base, tmp_path):
    before, after = base_weights(), baked(base, pair(f"{SHARED}.gate_proj", 10, WIDTH, 12), tmp_path / "out")
    key = f"{SHARED}.gate_and_up_proj.weight"
    assert after[key].dtype == torch.bfloat16
    assert torch.equal(after[key][:10], before[key][:10]) and not torch.equal(after[key][10:], before[key][10:])


def test_projections_that_share_their_input_side_keep_their_rank():
    a = drawn(RANK, WIDTH, seed=20)
    sides = {name: drawn(rows, RANK, seed=rows) for name, rows in (("q_proj", 24), ("k_proj", 8), ("v_proj", 8))}
    adapter = {f"{ATTENTION}.{name}.lora_A.weight": a.clone() for name in sides} | {f"{ATTENTION}.{name}.lora_B.weight": b for name, b in sides.items()}
    whole = fused(AdapterFile(adapter), LAYOUT)
    assert whole.ranks == {f"{ATTENTION}.qkv_proj": RANK}
    assert torch.equal(whole.pair(f"{ATTENTION}.qkv_proj")[1], join_qkv(*sides.values(), LAYOUT))


def test_whole_modules_and_experts_are_baked_as_they_are_and_strangers_are_refused(base, tmp_path):
    adapter = pair(f"{ATTENTION}.qkv_proj", LAYOUT.rows, WIDTH, 13) | pair(f"{EXPERT}.down_proj", WIDTH, 10, 14)
    before, after = base_weights(), baked(base, adapter, tmp_path / "out")
    for module in (f"{ATTENTION}.qkv_proj", f"{EXPERT}.down_proj"):
        expected = before[f"{module}.weight"] + adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        assert torch.allclose(after[f"{module}.weight"], expected, atol=1e-6)
    with pytest.raises(AdapterError, match="not layers of this model"):
        baked(base, pair("model.layers.9.self_attn.o_proj", WIDTH, 24, 15), tmp_path / "other")
    with pytest.raises(AdapterError, match="whole and in parts"):
        baked(base, adapter | pair(f"{ATTENTION}.q_proj", 24, WIDTH, 16), tmp_path / "other")
    with pytest.raises(AdapterError, match="rows"):
        baked(base, pair(f"{ATTENTION}.q_proj", 20, WIDTH, 17), tmp_path / "other")
    with pytest.raises(BadInput, match="dot in its name"):
        baked(base, adapter, tmp_path / "HunyuanImage-3.0")
    assert not (tmp_path / "other").exists()


def test_the_command_recognises_and_bakes_an_adapter_of_another_trainer(base, tmp_path, capfd):
    """As peft writes it, with alpha beside it; the family is told from the names alone."""
    file = tmp_path / "peft" / "adapter_model.safetensors"
    file.parent.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in pair(f"{ATTENTION}.q_proj", 24, WIDTH, 18).items()}, file)
    (file.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 4 * RANK, "target_modules": ["q_proj"]}))
    run_command(["adapter", "inspect", str(file.parent), "--json"])
    assert json.loads(capfd.readouterr().out)["family"] == "hunyuan_image_3"
    run_command(["adapter", "bake", str(file.parent), "--base", str(base), "--out", str(tmp_path / "out"), "--json"])
    assert json.loads(capfd.readouterr().out)["changed_layers"] == 1
    with BaseWeights(tmp_path / "out") as weights:
        change = weights.read(f"{ATTENTION}.qkv_proj.weight") - base_weights()[f"{ATTENTION}.qkv_proj.weight"]
    adapter = pair(f"{ATTENTION}.q_proj", 24, WIDTH, 18)
    expected = 4 * adapter[f"{ATTENTION}.q_proj.lora_B.weight"] @ adapter[f"{ATTENTION}.q_proj.lora_A.weight"]
    assert torch.allclose(split_qkv(change, LAYOUT)[0], expected, atol=1e-4)


def run_command(arguments):
    from finetune.cli import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code


@pytest.mark.parametrize("named", ["tencent/HunyuanImage-3.0", "Tencent/HunyuanImage-3.0-Instruct", "the folder"])
def test_training_it_is_refused_with_numbers_before_anything_is_downloaded(named, base, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(BaseModelError, match="80 GiB cards") as refusal:
        locate_base(str(base) if named == "the folder" else named)
    told = str(refusal.value)
    assert "150.8 GiB in bfloat16" in told and "this machine has" in told and "brushwork adapter bake" in refusal.value.fix

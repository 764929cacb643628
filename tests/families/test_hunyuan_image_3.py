"""Adapters of HunyuanImage-3.0 meet the base's own layout: heads interleaved by key head, "up" before "gate"."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import AdapterError
from finetune.families.hunyuan_image_3 import AttentionLayout, adapter_deltas, join_qkv, merge, split_qkv

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


def base_weights():
    parent = "model.layers.0"
    return {f"{parent}.self_attn.qkv_proj.weight": drawn(LAYOUT.rows, WIDTH, seed=1), f"{parent}.self_attn.o_proj.weight": drawn(WIDTH, 24, seed=2),
            f"{parent}.mlp.shared_mlp.gate_and_up_proj.weight": drawn(20, WIDTH, seed=3).to(torch.bfloat16)}


def pair(module, out, width, seed):
    return {f"{module}.lora_A.weight": drawn(RANK, width, seed=seed), f"{module}.lora_B.weight": drawn(out, RANK, seed=seed + 100)}


def test_a_merged_adapter_of_split_projections_acts_on_each_head_as_the_adapter_does():
    attention = "model.layers.0.self_attn"
    adapter = pair(f"{attention}.q_proj", 24, WIDTH, 10) | pair(f"{attention}.v_proj", 8, WIDTH, 11)
    base = base_weights()
    merged = merge(base, adapter, LAYOUT, scale=0.5)
    x = drawn(5, WIDTH, seed=4)
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        before, after = (x @ split_qkv(weights[f"{attention}.qkv_proj.weight"], LAYOUT)[index].T for weights in (base, merged))
        a, b = adapter.get(f"{attention}.{name}.lora_A.weight"), adapter.get(f"{attention}.{name}.lora_B.weight")
        change = torch.zeros_like(before) if a is None else 0.5 * (x @ a.T) @ b.T
        assert torch.allclose(after, before + change, atol=1e-5), name
    assert torch.equal(merged[f"{attention}.o_proj.weight"], base[f"{attention}.o_proj.weight"])


def test_up_comes_before_gate_and_the_dtype_stays():
    shared = "model.layers.0.mlp.shared_mlp"
    adapter = {f"base_model.model.{key}": value for key, value in pair(f"{shared}.gate_proj", 10, WIDTH, 12).items()}
    change = adapter_deltas(adapter, LAYOUT)[f"{shared}.gate_and_up_proj"]
    assert change[:10].abs().max() == 0 and change[10:].abs().max() > 0
    assert merge(base_weights(), adapter, LAYOUT)[f"{shared}.gate_and_up_proj.weight"].dtype == torch.bfloat16


def test_fused_adapters_merge_as_they_are_and_strangers_are_refused():
    module = "model.layers.0.self_attn.qkv_proj"
    adapter = pair(module, LAYOUT.rows, WIDTH, 13)
    merged = merge(base_weights(), adapter, LAYOUT)
    expected = base_weights()[f"{module}.weight"] + adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
    assert torch.allclose(merged[f"{module}.weight"], expected, atol=1e-6)
    with pytest.raises(AdapterError, match="does not have"):
        merge(base_weights(), pair("model.layers.9.self_attn.o_proj", WIDTH, 24, 14), LAYOUT)

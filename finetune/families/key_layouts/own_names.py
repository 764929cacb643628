"""Families whose original code has the same names as diffusers: Qwen-Image, HiDream-I1, CogView4."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap
from finetune.families.key_layouts.two_stream import JOINT_ATTENTION, layers

QWEN_LAYERS = ("img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
QWEN_IMAGE = KeyMap(
    family="qwen_image",
    modules=(*layers("transformer_blocks", *JOINT_ATTENTION, *QWEN_LAYERS), "time_text_embed.timestep_embedder.linear_1",
             "time_text_embed.timestep_embedder.linear_2", "img_in", "txt_in", "norm_out.linear", "proj_out"),
    widths=(3072,),
    blocks={"transformer_blocks": 60},
    loads_with="pipeline",
    hints=("qwen",),
)

SWIGLU = ("w1", "w2", "w3")
STREAM = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")
MIXTURE = (*(f"ff_i.shared_experts.{name}" for name in SWIGLU), *(f"ff_i.experts.{{}}.{name}" for name in SWIGLU))
HIDREAM = KeyMap(
    family="hidream",
    modules=(
        *layers("double_stream_blocks", *(f"block.attn1.{name}" for name in STREAM), *(f"block.{name}" for name in MIXTURE),
                *(f"block.ff_t.{name}" for name in SWIGLU), "block.adaLN_modulation.1"),
        *layers("single_stream_blocks", *(f"block.attn1.{name}" for name in STREAM[:4]), *(f"block.{name}" for name in MIXTURE), "block.adaLN_modulation.1"),
        "caption_projection.{}.linear", "x_embedder.proj", "t_embedder.timestep_embedder.linear_1", "t_embedder.timestep_embedder.linear_2",
        "p_embedder.pooled_embedder.linear_1", "p_embedder.pooled_embedder.linear_2", "final_layer.linear", "final_layer.adaLN_modulation.1",
    ),
    widths=(2560,),
    blocks={"double_stream_blocks": 16, "single_stream_blocks": 32},
    loads_with="pipeline",
    hints=("hidream",),
)

COGVIEW4 = KeyMap(
    family="cogview4",
    modules=(*layers("transformer_blocks", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm1.linear", "ff.net.0.proj", "ff.net.2"),
             "patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out",
             *(f"time_condition_embed.{name}_embedder.linear_{number}" for name in ("timestep", "condition") for number in (1, 2))),
    widths=(4096, 2560),
    blocks={"transformer_blocks": 32},
    loads_with="pipeline",
    hints=("cogview4",),
)

"""AuraFlow: numbered weights in the original code (1 for the context, 2 for the picture), plain names in diffusers."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, Rule, rename, swapped, within
from finetune.families.key_layouts.two_stream import JOINT_ATTENTION, layers

FEED_FORWARD = ("linear_1", "linear_2", "out_projection")


def _feed_forward(foreign: str, module: str) -> tuple[Rule, ...]:
    return tuple(rename(f"{foreign}.{name}", f"{module}.{layer}") for name, layer in zip(("c_fc1", "c_fc2", "c_proj"), FEED_FORWARD, strict=True))


def _attention(digit: int, modules: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(rename(f"attn.w{digit}{letter}", f"attn.{module}") for letter, module in zip("qkvo", modules, strict=True))


PICTURE, CONTEXT = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
AURAFLOW = KeyMap(
    family="auraflow",
    modules=(
        *layers("joint_transformer_blocks", *JOINT_ATTENTION, "norm1.linear", "norm1_context.linear", *(f"{ff}.{name}" for ff in ("ff", "ff_context") for name in FEED_FORWARD)),
        *layers("single_transformer_blocks", *(f"attn.{name}" for name in PICTURE), "norm1.linear", *(f"ff.{name}" for name in FEED_FORWARD)),
        "context_embedder", "pos_embed.proj", "time_step_proj.linear_1", "time_step_proj.linear_2", "norm_out.linear", "proj_out",
    ),
    namings={"original": (
        *within("double_layers.{}", "joint_transformer_blocks.{}", (
            *_attention(2, PICTURE), *_attention(1, CONTEXT), *_feed_forward("mlpX", "ff"), *_feed_forward("mlpC", "ff_context"),
            rename("modX.1", "norm1.linear"), rename("modC.1", "norm1_context.linear"),
        )),
        *within("single_layers.{}", "single_transformer_blocks.{}", (*_attention(1, PICTURE), *_feed_forward("mlp", "ff"), rename("modCX.1", "norm1.linear"))),
        rename("cond_seq_linear", "context_embedder"), rename("t_embedder.mlp.0", "time_step_proj.linear_1"), rename("t_embedder.mlp.2", "time_step_proj.linear_2"),
        rename("final_linear", "proj_out"), rename("init_x_linear", "pos_embed.proj"), swapped("modF.1", "norm_out.linear"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    widths=(3072,),
    blocks={"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
    loads_with="pipeline",
    hints=("auraflow", "aura-flow"),
)

"""Stable Diffusion 3 and 3.5: diffusers names against the original joint blocks, which kohya and ComfyUI use."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, Rule, fused, rename, swapped, within
from finetune.families.key_layouts.text_encoders import CLIP, T5
from finetune.families.key_layouts.two_stream import ADDED_QKV, DOUBLE_BLOCKS, DOUBLE_MODULATION, QKV, layers

EMBEDDINGS = tuple(f"time_text_embed.{name}.linear_{number}" for name in ("timestep_embedder", "text_embedder") for number in (1, 2))
SECOND_QKV = ("attn2.to_q", "attn2.to_k", "attn2.to_v")


def _joint_block() -> tuple[Rule, ...]:
    # The last block's context modulation has two parts, shift and scale, in the other order; all others agree.
    return within("joint_blocks.{}", "transformer_blocks.{}", (
        fused("x_block.attn.qkv", *QKV), rename("x_block.attn.proj", "attn.to_out.0"),
        fused("x_block.attn2.qkv", *SECOND_QKV), rename("x_block.attn2.proj", "attn2.to_out.0"),
        fused("context_block.attn.qkv", *ADDED_QKV), rename("context_block.attn.proj", "attn.to_add_out"),
        rename("x_block.mlp.fc1", "ff.net.0.proj"), rename("x_block.mlp.fc2", "ff.net.2"),
        rename("context_block.mlp.fc1", "ff_context.net.0.proj"), rename("context_block.mlp.fc2", "ff_context.net.2"),
        rename("x_block.adaLN_modulation.1", "norm1.linear"), swapped("context_block.adaLN_modulation.1", "norm1_context.linear"),
    ))


SD3 = KeyMap(
    family="sd3",
    modules=(*DOUBLE_BLOCKS, *DOUBLE_MODULATION, *layers("transformer_blocks", *SECOND_QKV, "attn2.to_out.0"),
             *EMBEDDINGS, "context_embedder", "pos_embed.proj", "norm_out.linear", "proj_out"),
    namings={"original": (
        *_joint_block(),
        rename("t_embedder.mlp.0", EMBEDDINGS[0]), rename("t_embedder.mlp.2", EMBEDDINGS[1]),
        rename("y_embedder.mlp.0", EMBEDDINGS[2]), rename("y_embedder.mlp.2", EMBEDDINGS[3]),
        rename("x_embedder.proj", "pos_embed.proj"),
        rename("final_layer.linear", "proj_out"), swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    text_encoders={"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5},
    widths=(1536, 2432),
    blocks={"transformer_blocks": 38},
    loads_with="pipeline",
    hints=("stable-diffusion-3", "stable-diffusion-v3", "sd3"),
)

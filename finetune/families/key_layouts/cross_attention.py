"""Sana and PixArt-Sigma: single-stream blocks with self- and cross-attention, fused in the original code."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, Rule, fused, rename, within
from finetune.families.key_layouts.two_stream import layers

ATTENTION = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
FUSED_ATTENTION = (
    fused("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"), rename("attn.proj", "attn1.to_out.0"),
    rename("cross_attn.q_linear", "attn2.to_q"), fused("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
    rename("cross_attn.proj", "attn2.to_out.0"),
)
CAPTION = (rename("y_embedder.y_proj.fc1", "caption_projection.linear_1"), rename("y_embedder.y_proj.fc2", "caption_projection.linear_2"))


def _blocks(*rules: Rule) -> tuple[Rule, ...]:
    return within("blocks.{}", "transformer_blocks.{}", (*FUSED_ATTENTION, *rules))


SANA = KeyMap(
    family="sana",
    modules=(
        *layers("transformer_blocks", *ATTENTION, "ff.conv_inverted", "ff.conv_point"), "patch_embed.proj",
        "time_embed.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_2", "time_embed.linear",
        "caption_projection.linear_1", "caption_projection.linear_2", "proj_out",
    ),
    namings={"original": (
        *_blocks(rename("mlp.inverted_conv.conv", "ff.conv_inverted"), rename("mlp.depth_conv.conv", "ff.conv_depth"), rename("mlp.point_conv.conv", "ff.conv_point")),
        *CAPTION, rename("x_embedder.proj", "patch_embed.proj"), rename("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
        rename("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"), rename("t_block.1", "time_embed.linear"),
        rename("final_layer.linear", "proj_out"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    unusable={"transformer_blocks.{}.ff.conv_depth": "a depthwise convolution takes a LoRA only at a rank that its thousands of groups divide"},
    widths=(2240, 1152),
    blocks={"transformer_blocks": 60},
    loads_with="pipeline",
    hints=("sana",),
    call={"use_resolution_binning": False},
)

ADALN = tuple(f"adaln_single.emb.{name}_embedder.linear_{number}" for name in ("timestep", "resolution", "aspect_ratio") for number in (1, 2))
PIXART_SIGMA = KeyMap(
    family="pixart_sigma",
    modules=(*layers("transformer_blocks", *ATTENTION, "ff.net.0.proj", "ff.net.2"), *ADALN, "adaln_single.linear", "pos_embed.proj",
             "caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
    namings={"original": (
        *_blocks(rename("mlp.fc1", "ff.net.0.proj"), rename("mlp.fc2", "ff.net.2")), *CAPTION,
        rename("x_embedder.proj", "pos_embed.proj"), rename("t_embedder.mlp.0", ADALN[0]), rename("t_embedder.mlp.2", ADALN[1]),
        rename("csize_embedder.mlp.0", ADALN[2]), rename("csize_embedder.mlp.2", ADALN[3]),
        rename("ar_embedder.mlp.0", ADALN[4]), rename("ar_embedder.mlp.2", ADALN[5]),
        rename("t_block.1", "adaln_single.linear"), rename("final_layer.linear", "proj_out"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    widths=(1152,),
    blocks={"transformer_blocks": 28},
    loads_with="peft",
    hints=("pixart",),
    call={"use_resolution_binning": False},
)

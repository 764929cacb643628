"""Flux.2 (dev, klein): the single blocks stay fused in diffusers, so only the double blocks' attention is split."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, rename, swapped, within
from finetune.families.key_layouts.two_stream import DOTTED_ATTENTION, JOINT_ATTENTION, layers

FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
EMBEDDINGS = tuple(f"time_guidance_embed.{name}.linear_{number}" for name in ("timestep_embedder", "guidance_embedder") for number in (1, 2))
MODULATIONS = ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")

FLUX2 = KeyMap(
    family="flux2",
    modules=(
        *layers("transformer_blocks", *JOINT_ATTENTION, *FEED_FORWARD),
        *layers("single_transformer_blocks", "attn.to_qkv_mlp_proj", "attn.to_out"),
        *EMBEDDINGS, *(f"{name}.linear" for name in MODULATIONS), "x_embedder", "context_embedder", "norm_out.linear", "proj_out",
    ),
    namings={"original": (
        *within("double_blocks.{}", "transformer_blocks.{}", (
            *DOTTED_ATTENTION, rename("img_mlp.0", "ff.linear_in"), rename("img_mlp.2", "ff.linear_out"),
            rename("txt_mlp.0", "ff_context.linear_in"), rename("txt_mlp.2", "ff_context.linear_out"),
        )),
        *within("single_blocks.{}", "single_transformer_blocks.{}", (rename("linear1", "attn.to_qkv_mlp_proj"), rename("linear2", "attn.to_out"))),
        rename("img_in", "x_embedder"), rename("txt_in", "context_embedder"),
        rename("time_in.in_layer", EMBEDDINGS[0]), rename("time_in.out_layer", EMBEDDINGS[1]),
        rename("guidance_in.in_layer", EMBEDDINGS[2]), rename("guidance_in.out_layer", EMBEDDINGS[3]),
        *(rename(f"{name}.lin", f"{name}.linear") for name in MODULATIONS),
        rename("final_layer.linear", "proj_out"), swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    widths=(6144, 3072, 4096),
    blocks={"transformer_blocks": 8, "single_transformer_blocks": 48},
    loads_with="pipeline",
    hints=("flux2", "flux-2"),
)

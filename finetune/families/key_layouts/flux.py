"""Flux.1 (dev, schnell, kontext) and Chroma: diffusers, original and ComfyUI names, and XLabs' processor names."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, fused, rename, swapped, within
from finetune.families.key_layouts.text_encoders import CLIP, T5
from finetune.families.key_layouts.two_stream import (
    ADDED_QKV,
    DOUBLE_BLOCKS,
    DOUBLE_MODULATION,
    QKV,
    SINGLE_BLOCKS,
    SINGLE_MODULATION,
    flux_blocks,
)

EMBEDDERS = ("timestep_embedder", "text_embedder", "guidance_embedder")
EMBEDDINGS = tuple(f"time_text_embed.{embedder}.linear_{number}" for embedder in EMBEDDERS for number in (1, 2))
TOP = (
    rename("img_in", "x_embedder"), rename("txt_in", "context_embedder"),
    rename("time_in.in_layer", EMBEDDINGS[0]), rename("time_in.out_layer", EMBEDDINGS[1]),
    rename("vector_in.in_layer", EMBEDDINGS[2]), rename("vector_in.out_layer", EMBEDDINGS[3]),
    rename("guidance_in.in_layer", EMBEDDINGS[4]), rename("guidance_in.out_layer", EMBEDDINGS[5]),
    rename("final_layer.linear", "proj_out"), swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
XLABS = within("double_blocks.{}.processor", "transformer_blocks.{}", (
    fused("qkv_lora1", *QKV), rename("proj_lora1", "attn.to_out.0"),
    fused("qkv_lora2", *ADDED_QKV), rename("proj_lora2", "attn.to_add_out"),
)) + (fused("single_blocks.{}.processor.qkv_lora", *(f"single_transformer_blocks.{{}}.{name}" for name in QKV)),)

FLUX = KeyMap(
    family="flux",
    modules=(*DOUBLE_BLOCKS, *DOUBLE_MODULATION, *SINGLE_BLOCKS, *SINGLE_MODULATION, *EMBEDDINGS, "x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
    namings={"original": (*flux_blocks(), *TOP), "xlabs": XLABS},
    layouts={"kohya": "original", "comfy": "original"},
    text_encoders={"text_encoder": CLIP, "text_encoder_2": T5},
    kohya_encoders={"text_encoder_2": "text_encoder_3"},
    widths=(3072,),
    blocks={"transformer_blocks": 19, "single_transformer_blocks": 38},
    loads_with="pipeline",
    hints=("flux-1", "flux_1", "flux1"),
)

CHROMA = KeyMap(
    family="chroma",
    modules=(*DOUBLE_BLOCKS, *SINGLE_BLOCKS, "x_embedder", "context_embedder", "proj_out", "distilled_guidance_layer.in_proj",
             "distilled_guidance_layer.out_proj", "distilled_guidance_layer.layers.{}.linear_1", "distilled_guidance_layer.layers.{}.linear_2"),
    namings={"original": (
        *(rule for rule in flux_blocks() if "mod" not in rule.foreign),
        rename("img_in", "x_embedder"), rename("txt_in", "context_embedder"), rename("final_layer.linear", "proj_out"),
        rename("distilled_guidance_layer.layers.{}.in_layer", "distilled_guidance_layer.layers.{}.linear_1"),
        rename("distilled_guidance_layer.layers.{}.out_layer", "distilled_guidance_layer.layers.{}.linear_2"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    widths=(3072,),
    blocks={"transformer_blocks": 19, "single_transformer_blocks": 38},
    loads_with="pipeline",
    hints=("chroma",),
)

"""HunyuanImage-2.1: diffusers names, Tencent's (which sd-scripts uses) and ComfyUI's spelling of them."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, Rule, fused, rename, swapped, within
from finetune.families.key_layouts.two_stream import (
    DOUBLE_BLOCKS,
    DOUBLE_MODULATION,
    REFINER_MODULES,
    SINGLE_BLOCKS,
    SINGLE_MODULATION,
    flux_blocks,
    hunyuan_blocks,
    refiner_rules,
)

GUIDANCE = tuple(f"time_guidance_embed.{name}.linear_{number}" for name in ("timestep_embedder", "guidance_embedder", "timestep_embedder_r") for number in (1, 2))
TEXT = tuple(f"context_embedder.time_text_embed.{name}.linear_{number}" for name in ("timestep_embedder", "text_embedder") for number in (1, 2))


def _top(inner: tuple[str, str], text: tuple[str, str]) -> tuple[Rule, ...]:
    """Layers outside the blocks; `inner` are the names of an embedder's two layers, `text` of the caption embedder's."""
    return (
        rename("img_in.proj", "x_embedder.proj"), rename("txt_in.input_embedder", "context_embedder.proj_in"),
        *(rename(f"time_in.{name}", GUIDANCE[number]) for number, name in enumerate(inner)),
        *(rename(f"guidance_in.{name}", GUIDANCE[2 + number]) for number, name in enumerate(inner)),
        *(rename(f"time_r_in.{name}", GUIDANCE[4 + number]) for number, name in enumerate(inner)),
        *(rename(f"txt_in.t_embedder.{name}", TEXT[number]) for number, name in enumerate(inner)),
        *(rename(f"txt_in.c_embedder.{name}", TEXT[2 + number]) for number, name in enumerate(text)),
        *(rename(f"byt5_in.fc{number}", f"context_embedder_2.linear_{number}") for number in (1, 2, 3)),
        rename("final_layer.linear", "proj_out"), swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    )


# The released checkpoint may also come with attention and the single block's first layer already apart.
SPLIT_CHECKPOINT = within("double_blocks.{}", "transformer_blocks.{}", tuple(
    rename(f"{stream}_attn_{letter}", f"attn.{module}")
    for stream, modules in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")))
    for letter, module in zip("qkv", modules, strict=True)
)) + within("single_blocks.{}", "single_transformer_blocks.{}", (
    rename("linear1_q", "attn.to_q"), rename("linear1_k", "attn.to_k"), rename("linear1_v", "attn.to_v"),
    rename("linear1_mlp", "proj_mlp"), rename("linear2.fc", "proj_out"), fused("linear1_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
))

HUNYUAN_IMAGE_2 = KeyMap(
    family="hunyuan_image_2",
    modules=(*DOUBLE_BLOCKS, *DOUBLE_MODULATION, *SINGLE_BLOCKS, *SINGLE_MODULATION, *REFINER_MODULES, *GUIDANCE, *TEXT,
             "x_embedder.proj", "context_embedder.proj_in", *(f"context_embedder_2.linear_{number}" for number in (1, 2, 3)),
             "norm_out.linear", "proj_out"),
    namings={
        "original": (*hunyuan_blocks(), *refiner_rules("self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2"), *_top(("mlp.0", "mlp.2"), ("linear_1", "linear_2"))),
        "comfy": (*flux_blocks(), *refiner_rules("self_attn.qkv", "self_attn.proj", "mlp.0", "mlp.2"), *_top(("in_layer", "out_layer"), ("in_layer", "out_layer"))),
        "split": SPLIT_CHECKPOINT,
    },
    layouts={"kohya": "original", "comfy": "comfy"},
    widths=(3584,),
    blocks={"transformer_blocks": 20, "single_transformer_blocks": 40},
    loads_with="transformer",
    hints=("hunyuan-image-2", "hunyuan_image_2"),
)

"""Z-Image and Lumina-Image-2.0, which share their original code's names."""

from __future__ import annotations

from finetune.adapters.keys import INPUT, REST, KeyMap, Rule, fused, rename, within
from finetune.families.key_layouts.two_stream import layers

STACKS = ("layers", "noise_refiner", "context_refiner")
Z_LAYERS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
LUMINA_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")


def _z_attention(stack: str) -> tuple[Rule, ...]:
    block = f"{stack}.{{}}"
    return within(block, block, (fused("attention.qkv", *Z_LAYERS[:3]), rename("attention.out", "attention.to_out.0")))


Z_IMAGE = KeyMap(
    family="z_image",
    modules=(
        *(name for stack in STACKS for name in layers(stack, *Z_LAYERS)), *(f"{stack}.{{}}.adaLN_modulation.0" for stack in STACKS[:2]),
        "all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1",
        "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1",
    ),
    namings={"original": (
        *(rule for stack in STACKS for rule in _z_attention(stack)),
        rename("x_embedder", "all_x_embedder.2-1"), rename("final_layer.linear", "all_final_layer.2-1.linear"),
        rename("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    widths=(3840,),
    blocks={"layers": 30, "noise_refiner": 2, "context_refiner": 2},
    loads_with="pipeline",
    hints=("z-image", "zimage", "z_image"),
)


def _lumina_block(stack: str) -> tuple[Rule, ...]:
    block = f"{stack}.{{}}"
    # Grouped-query attention: q has as many rows as the layer has inputs, k and v share the rest.
    return within(block, block, (
        fused("attention.qkv", *LUMINA_LAYERS[:3], rows=(INPUT, REST, REST), rest_over_input=1 / 3), rename("attention.out", "attn.to_out.0"),
        *(rename(f"feed_forward.w{number}", f"feed_forward.linear_{number}") for number in (1, 2, 3)),
        *((rename("adaLN_modulation.1", "norm1.linear"),) if stack != "context_refiner" else ()),
    ))


LUMINA_EMBEDDINGS = ("time_caption_embed.timestep_embedder.linear_1", "time_caption_embed.timestep_embedder.linear_2", "time_caption_embed.caption_embedder.1")
LUMINA2 = KeyMap(
    family="lumina2",
    modules=(
        *(name for stack in STACKS for name in layers(stack, *LUMINA_LAYERS)), *(f"{stack}.{{}}.norm1.linear" for stack in STACKS[:2]),
        *LUMINA_EMBEDDINGS, "x_embedder", "norm_out.linear_1", "norm_out.linear_2",
    ),
    namings={"original": (
        *(rule for stack in STACKS for rule in _lumina_block(stack)),
        rename("t_embedder.mlp.0", LUMINA_EMBEDDINGS[0]), rename("t_embedder.mlp.2", LUMINA_EMBEDDINGS[1]), rename("cap_embedder.1", LUMINA_EMBEDDINGS[2]),
        rename("final_layer.adaLN_modulation.1", "norm_out.linear_1"), rename("final_layer.linear", "norm_out.linear_2"),
    )},
    layouts={"kohya": "original", "comfy": "original"},
    widths=(2304,),
    blocks={"layers": 26, "noise_refiner": 2, "context_refiner": 2},
    loads_with="pipeline",
    hints=("lumina-2", "lumina2"),
)

"""HunyuanVideo and HunyuanVideo-1.5, trained on single frames: Tencent's names, diffusion-pipe's and ComfyUI's."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, Rule, rename, swapped
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

TEXT = tuple(f"context_embedder.time_text_embed.{name}.linear_{number}" for name in ("timestep_embedder", "text_embedder") for number in (1, 2))
TIME = tuple(f"time_text_embed.{name}.linear_{number}" for name in ("timestep_embedder", "text_embedder", "guidance_embedder") for number in (1, 2))
TIME_15 = ("time_embed.timestep_embedder.linear_1", "time_embed.timestep_embedder.linear_2")
TENCENT_REFINER = refiner_rules("self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2")
COMFY_REFINER = refiner_rules("self_attn.qkv", "self_attn.proj", "mlp.0", "mlp.2")


def _embedder(foreign: str, inner: tuple[str, str], modules: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(rename(f"{foreign}.{name}", module) for name, module in zip(inner, modules, strict=True))


def _top(inner: tuple[str, str], vector: tuple[str, str], text: tuple[str, str]) -> tuple[Rule, ...]:
    return (
        rename("txt_in.input_embedder", "context_embedder.proj_in"),
        *_embedder("txt_in.t_embedder", inner, TEXT[:2]), *_embedder("txt_in.c_embedder", text, TEXT[2:]),
        *_embedder("time_in", inner, TIME[:2]), *_embedder("vector_in", vector, TIME[2:4]), *_embedder("guidance_in", inner, TIME[4:]),
        rename("final_layer.linear", "proj_out"), swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    )


HUNYUAN_VIDEO = KeyMap(
    family="hunyuan_video",
    modules=(*DOUBLE_BLOCKS, *DOUBLE_MODULATION, *SINGLE_BLOCKS, *SINGLE_MODULATION, *REFINER_MODULES, *TEXT, *TIME,
             "context_embedder.proj_in", "norm_out.linear", "proj_out"),
    namings={
        "original": (*hunyuan_blocks(), *TENCENT_REFINER, *_top(("mlp.0", "mlp.2"), ("in_layer", "out_layer"), ("linear_1", "linear_2"))),
        "comfy": (*flux_blocks(), *COMFY_REFINER, *_top(("in_layer", "out_layer"), ("in_layer", "out_layer"), ("in_layer", "out_layer"))),
    },
    layouts={"kohya": "original", "comfy": "comfy"},
    widths=(3072,),
    blocks={"transformer_blocks": 20, "single_transformer_blocks": 40},
    loads_with="pipeline",
    hints=("hunyuan-video", "hunyuan_video", "hunyuanvideo"),
)


def _top_15(inner: tuple[str, str], text: tuple[str, str]) -> tuple[Rule, ...]:
    return (
        rename("txt_in.input_embedder", "context_embedder.proj_in"),
        *_embedder("txt_in.t_embedder", inner, TEXT[:2]), *_embedder("txt_in.c_embedder", text, TEXT[2:]), *_embedder("time_in", inner, TIME_15),
        *(rename(f"byt5_in.fc{number}", f"context_embedder_2.linear_{number}") for number in (1, 2, 3)),
        rename("vision_in.proj.1", "image_embedder.linear_1"), rename("vision_in.proj.3", "image_embedder.linear_2"),
        rename("final_layer.linear", "proj_out"), swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    )


HUNYUAN_VIDEO_15 = KeyMap(
    family="hunyuan_video_15",
    modules=(*DOUBLE_BLOCKS, *DOUBLE_MODULATION, *REFINER_MODULES, *TEXT, *TIME_15, "context_embedder.proj_in",
             *(f"context_embedder_2.linear_{number}" for number in (1, 2, 3)), "image_embedder.linear_1", "image_embedder.linear_2",
             "norm_out.linear", "proj_out"),
    namings={
        "original": (*(rule for rule in hunyuan_blocks() if rule.foreign.startswith("double")), *TENCENT_REFINER, *_top_15(("mlp.0", "mlp.2"), ("linear_1", "linear_2"))),
        "comfy": (*(rule for rule in flux_blocks() if rule.foreign.startswith("double")), *COMFY_REFINER, *_top_15(("in_layer", "out_layer"), ("in_layer", "out_layer"))),
    },
    layouts={"kohya": "original", "comfy": "comfy"},
    widths=(2048,),
    blocks={"transformer_blocks": 54},
    loads_with="transformer",
)

"""HunyuanDiT: diffusers names against Tencent's own, which its trainer, the kohya port and ComfyUI use."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap, fused, rename, swapped, within
from finetune.families.key_layouts.text_encoders import BERT
from finetune.families.key_layouts.two_stream import layers

ATTENTION = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
EMBEDDINGS = (
    *(f"time_extra_emb.{name}.linear_{number}" for name in ("timestep_embedder", "extra_embedder") for number in (1, 2)),
    "text_embedder.linear_1", "text_embedder.linear_2",
)
POOLER = ("q_proj", "k_proj", "v_proj", "c_proj")
POOLER_REASON = "the pooler hands its weights on without running the layer, so a LoRA there acts only once it is baked in"

HUNYUAN_DIT = KeyMap(
    family="hunyuan_dit",
    modules=(*layers("blocks", *ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear", "skip_linear"),
             *EMBEDDINGS, "pos_embed.proj", "norm_out.linear", "proj_out"),
    namings={"original": (
        *within("blocks.{}", "blocks.{}", (
            fused("attn1.Wqkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"), rename("attn1.out_proj", "attn1.to_out.0"),
            rename("attn2.q_proj", "attn2.to_q"), fused("attn2.kv_proj", "attn2.to_k", "attn2.to_v"),
            rename("attn2.out_proj", "attn2.to_out.0"), rename("mlp.fc1", "ff.net.0.proj"), rename("mlp.fc2", "ff.net.2"),
            rename("default_modulation.1", "norm1.linear"),
        )),
        rename("t_embedder.mlp.0", EMBEDDINGS[0]), rename("t_embedder.mlp.2", EMBEDDINGS[1]),
        rename("extra_embedder.0", EMBEDDINGS[2]), rename("extra_embedder.2", EMBEDDINGS[3]),
        rename("mlp_t5.0", EMBEDDINGS[4]), rename("mlp_t5.2", EMBEDDINGS[5]),
        *(rename(f"pooler.{name}", f"time_extra_emb.pooler.{name}") for name in POOLER),
        rename("x_embedder.proj", "pos_embed.proj"),
        rename("final_layer.linear", "proj_out"), swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    )},
    layouts={"kohya": "original", "comfy": "original", "tencent": "original"},
    unusable={f"time_extra_emb.pooler.{name}": POOLER_REASON for name in POOLER},
    text_encoders={"text_encoder": BERT},
    widths=(1408,),
    blocks={"blocks": 40},
    loads_with="peft",
    hints=("hunyuan-dit", "hunyuandit", "hydit"),
    call={"use_resolution_binning": False},
)

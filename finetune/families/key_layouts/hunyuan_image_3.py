"""HunyuanImage-3.0: adapters carry the base's own names, with its fused projections whole or split by their makers."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap
from finetune.families.key_layouts.two_stream import layers

PROJECTIONS = ("gate_and_up_proj", "up_proj", "gate_proj", "down_proj")
HUNYUAN_IMAGE_3 = KeyMap(
    family="hunyuan_image_3",
    modules=layers("model.layers", *(f"self_attn.{name}" for name in ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")), "mlp.gate.wg",
                   *(f"mlp.shared_mlp.{name}" for name in PROJECTIONS), *(f"mlp.experts.{{}}.{name}" for name in PROJECTIONS)),
    widths=(4096,),
    blocks={"model.layers": 32},
    loads_with="peft",
    hints=("hunyuanimage-3", "hunyuan-image-3", "hunyuanimage3"),
)

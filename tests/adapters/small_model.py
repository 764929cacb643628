"""The tiny HunyuanDiT with a fixed input, and adapters for it that change its output."""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.kinds import AdapterSize, inject_adapter
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters, remove
from tests.tiny_models.hunyuan_dit import build

ATTENTION = r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


@lru_cache(maxsize=1)
def _states() -> tuple[dict, dict]:
    transformer = build().transformer
    return dict(transformer.config), transformer.state_dict()


def tiny_transformer() -> HunyuanDiT2DModel:
    """A fresh model, the same every time. The class has no PeftAdapterMixin."""
    config, weights = _states()
    model = HunyuanDiT2DModel.from_config(config).eval()
    model.load_state_dict(weights)
    return model


@lru_cache(maxsize=1)
def _inputs() -> dict:
    generator = torch.Generator().manual_seed(1)
    table = get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 77, 32, generator=generator), "text_embedding_mask": torch.ones(1, 77),
        "encoder_hidden_states_t5": torch.randn(1, 256, 24, generator=generator), "text_embedding_mask_t5": torch.ones(1, 256),
        "image_rotary_emb": table, "return_dict": False,
    }


@torch.no_grad()
def run(model: HunyuanDiT2DModel) -> torch.Tensor:
    """One deterministic forward."""
    return forward(model)


def forward(model: HunyuanDiT2DModel) -> torch.Tensor:
    """The same with gradients."""
    dtype = next(parameter for parameter in model.parameters()).dtype
    inputs = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in _inputs().items()}
    return model(**inputs)[0]


def trained_adapter(rank: int = 4, alpha: float = 8.0, seed: int = 0, size: float = 0.1, targets: str = ATTENTION) -> AdapterFile:
    """An adapter as training leaves one: A as drawn, B away from zero."""
    model = tiny_transformer()
    inject_lora(model, targets, rank, alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            if name.endswith("lora_B.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    adapter = collect_lora(model)
    remove(model)
    return adapter


def trained_kind(kind: str, **changes) -> tuple[torch.nn.Module, AdapterFile, torch.Tensor, list[float]]:
    """A model after four steps towards another output: (model, adapter, its output, losses)."""
    model = tiny_transformer()
    inject_adapter(model, ATTENTION, AdapterSize(kind, **{"rank": 4, "alpha": None if kind == "oft" else 6.0, **changes}), seed=3)
    optimizer = torch.optim.AdamW([parameter for _, parameter in lora_parameters(model)], lr=0.02)
    target, losses = torch.randn(run(model).shape, generator=torch.Generator().manual_seed(9)), []
    for _ in range(4):
        loss = (forward(model) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, collect_lora(model), run(model), losses

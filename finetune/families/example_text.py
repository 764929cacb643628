"""Shapes of what a caption becomes, from a transformer's configuration alone: what the plan computes with, instead of
loading text encoders. One line a family; lengths that depend on the caption are those of a long one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from finetune.families.protocol import Conditioning

# Tokens of a caption of about 80 words, for the families that keep only the words' own tokens.
CAPTION_TOKENS = 128
GLYPH_TOKENS = 8

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def _hidream(config: Config) -> Shapes:
    t5, llama = config["caption_channels"]
    return {"t5": (128, t5), "llama": (len(config["llama_layers"]), 128, llama), "pooled": (config["text_emb_dim"],)}


def _states(key: str, tokens: int = CAPTION_TOKENS, name: str = "states") -> Callable[[Config], Shapes]:
    return lambda config: {name: (tokens, config[key])}


def _flux(tokens: int) -> Callable[[Config], Shapes]:
    return lambda config: {"t5": (tokens, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


SHAPES: dict[str, Callable[[Config], Shapes]] = {
    "hunyuan_dit": lambda config: {
        "clip": (min(CAPTION_TOKENS, config["text_len"]), config["cross_attention_dim"]), "t5": (config["text_len_t5"], config["cross_attention_dim_t5"]),
        "t5_mask": (config["text_len_t5"],)},
    "hunyuan_image_2": lambda config: {"states": (CAPTION_TOKENS, config["text_embed_dim"]), "glyphs": (GLYPH_TOKENS, config["text_embed_2_dim"])},
    "flux_dev": _flux(512),
    "flux_schnell": _flux(256),
    "flux2_dev": _states("joint_attention_dim", 512),
    "flux2_klein": _states("joint_attention_dim", 512),
    "sd3": lambda config: {"states": (333, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)},
    "sana": _states("caption_channels"),
    "pixart_sigma": _states("caption_channels"),
    "lumina2": _states("cap_feat_dim"),
    "qwen_image": _states("joint_attention_dim"),
    "z_image": _states("cap_feat_dim"),
    "chroma": _states("joint_attention_dim", name="t5"),
    "auraflow": _states("joint_attention_dim"),
    "cogview4": _states("text_embed_dim"),
    "hidream": _hidream,
    "hunyuan_video": lambda config: {"states": (CAPTION_TOKENS, config["text_embed_dim"]), "pooled": (config["pooled_projection_dim"],)},
}


def example_conditioning(family: str, config: Config, device: torch.device) -> Conditioning | None:
    """A Conditioning of the family's shapes with arbitrary values, or None for a family that is not in the table."""
    shapes = SHAPES.get(family)
    if shapes is None:
        return None
    return Conditioning({
        name: torch.ones(shape, dtype=torch.bool if name.endswith("mask") else torch.float32, device=device)
        for name, shape in shapes(config).items()
    })


def conditioning_bytes(family: str, config: Config) -> int:
    """Bytes that one caption takes on disk; 2 MiB where the family is not in the table."""
    shapes = SHAPES.get(family)
    if shapes is None:
        return 2 << 20
    return sum(torch.Size(shape).numel() * (1 if name.endswith("mask") else 4) for name, shape in shapes(config).items())

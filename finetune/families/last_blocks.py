"""The last block of models with a text and a picture stream, without what the model throws away.

After the last block only the picture goes on. The library computes the text's queries, its feed-forward and their backward
pass all the same; here the text gives keys and values and nothing else. The picture's numbers do not change.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.shared_input import project
from finetune.families.lean_attention import PICTURE, PICTURE_NORMS, QwenAttention, angles_from, attend, keys_and_values, queries, rotate


def _flux_single(self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
                 joint_attention_kwargs: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """`FluxSingleTransformerBlock.forward`; the text comes back as it was."""
    length = encoder_hidden_states.shape[1]
    normed, gate = self.norm(torch.cat([encoder_hidden_states, hidden_states], dim=1), emb=temb)
    query = queries(self.attn, normed[:, length:], PICTURE, PICTURE_NORMS)
    key, value = keys_and_values(self.attn, normed, PICTURE, PICTURE_NORMS)
    if image_rotary_emb is not None:
        angles = angles_from(image_rotary_emb)
        query, key = rotate(query, angles[length:]), rotate(key, angles)
    inner = self.act_mlp(project(normed[:, length:], self.proj_mlp)[0])
    result = hidden_states + gate.unsqueeze(1) * project(torch.cat([attend(query, key, value), inner], dim=2), self.proj_out)[0]
    return encoder_hidden_states, result.clip(-65504, 65504) if result.dtype == torch.float16 else result


def _qwen_double(self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor | None, temb: Tensor,
                 image_rotary_emb: Any = None, joint_attention_kwargs: dict[str, Any] | None = None, modulate_index: Any = None) -> tuple[Tensor, Tensor]:
    """`QwenImageTransformerBlock.forward`; the text comes back as it was."""
    picture_first, picture_second = self.img_mod(temb).chunk(2, dim=-1)
    text_first = self.txt_mod(temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb).chunk(2, dim=-1)[0]
    picture, gate = self._modulate(self.img_norm1(hidden_states), picture_first, modulate_index)
    text, _ = self._modulate(self.txt_norm1(encoder_hidden_states), text_first)
    mixed, _ = self.attn(hidden_states=picture, encoder_hidden_states=text, encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb)
    hidden_states = hidden_states + gate * mixed
    inner, gate = self._modulate(self.img_norm2(hidden_states), picture_second, modulate_index)
    result = hidden_states + gate * self.img_mlp(inner)
    return encoder_hidden_states, result.clip(-65504, 65504) if result.dtype == torch.float16 else result


def shorten_flux(model: nn.Module) -> None:
    """Put the short form on the last single block. The model's own class stays what it is."""
    if len(model.single_transformer_blocks):
        block = model.single_transformer_blocks[-1]
        block.forward = MethodType(_flux_single, block)


def shorten_qwen(model: nn.Module) -> None:
    """Put the short form on the last block."""
    block = model.transformer_blocks[-1]
    block.attn.set_processor(QwenAttention(asks_for_text=False))
    block.forward = MethodType(_qwen_double, block)

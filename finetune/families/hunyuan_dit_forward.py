"""HunyuanDiT2DModel's forward, the same function with less copying, as a method put on one loaded model.

What is saved, for any weights: queries and keys are normalised before the heads are transposed, the rotation is one
complex product, the text path is assembled once. Timesteps stay float32 in front of the sinusoid whatever the dtype.
Where all rows of `text_embedding_padding` are equal, padded slots of the cross-attention collapse into one key: n
equal keys have the same softmax as one key whose logit is raised by log(n).
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.adapters.shared_input import project
from finetune.families.lean_attention import PICTURE, PICTURE_NORMS, angles_from, attend, heads, rotate

MASKED_LOGIT = -1e4


class Rotation(NamedTuple):
    """What blocks hand to both attentions. angles: (tokens, head_dim / 2) complex64; text_bias: (B, 1, 1, text) or None."""

    angles: Tensor
    text_bias: Tensor | None


class LeanAttention:
    """`HunyuanAttnProcessor2_0` with queries, keys and values left in (B, tokens, heads, head_dim) until attention."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None, image_rotary_emb: Any = None) -> Tensor:
        is_cross = encoder_hidden_states is not None
        source = encoder_hidden_states if is_cross else hidden_states
        query, key, value = heads(attn, hidden_states, source, PICTURE, PICTURE_NORMS)
        rotation = image_rotary_emb if isinstance(image_rotary_emb, Rotation) else rotation_from(image_rotary_emb)
        query = rotate(query, rotation.angles)
        if not is_cross:
            key = rotate(key, rotation.angles)
        return project(attend(query, key, value, rotation.text_bias if is_cross else None), attn.to_out[0])[0]


def rotation_from(pair: tuple[Tensor, Tensor], text_bias: Tensor | None = None) -> Rotation:
    """From diffusers' (cos, sin), each (tokens, head_dim) with every value twice."""
    return Rotation(angles_from(pair), text_bias)


def condition(embedder: nn.Module, timestep: Tensor, states: Tensor, meta_size: Tensor | None, style: Tensor | None) -> Tensor:
    """`HunyuanCombinedTimestepTextSizeStyleEmbedding` with the sinusoids in float32 and everything after in its own dtype.

    The library casts sinusoids to the timestep's dtype: a bfloat16 timestep keeps 507 of 1000 values, a float32 one
    does not fit a bfloat16 layer. The bias names the dtype, since a 4-bit weight is uint8.
    """
    dtype = embedder.timestep_embedder.linear_1.bias.dtype
    time = embedder.timestep_embedder(embedder.time_proj(timestep.float()).to(dtype))
    extra = [embedder.pooler(states)]
    if embedder.use_style_cond_and_image_meta_size:
        sizes = embedder.size_proj(meta_size.reshape(-1).float()).to(dtype)
        extra += [sizes.view(-1, 6 * 256), embedder.style_embedder(style)]
    return time + embedder.extra_embedder(torch.cat(extra, dim=1))


def padding_rows_equal(padding: Tensor) -> bool:
    """Whether all rows of `text_embedding_padding` are the same to the last bit (true for the embedded model)."""
    return not padding.is_meta and bool((padding == padding[:1]).all())


def full_text(model: nn.Module, clip: Tensor, clip_mask: Tensor, t5: Tensor, t5_mask: Tensor) -> tuple[Tensor, None]:
    """All text slots (B, 333, D), masked ones replaced by their learned rows; attention over them has no mask."""
    states = torch.cat([clip, model.text_embedder(t5.flatten(0, 1)).view(*t5.shape[:2], -1)], dim=1)
    real = torch.cat([clip_mask, t5_mask], dim=1).bool().unsqueeze(2)
    return torch.where(real, states, model.text_embedding_padding), None


def packed_text(model: nn.Module, clip: Tensor, clip_mask: Tensor, t5: Tensor, t5_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The unmasked slots and one padding slot (B, n + 1, D), and the bias on their logits (B, 1, 1, n + 1)."""
    clip_length, t5_length = int(clip_mask.sum(1).max()), int(t5_mask.sum(1).max())
    t5 = t5[:, :t5_length]
    states = model.text_embedder(t5.flatten(0, 1)).view(len(t5), t5_length, -1)
    padding = model.text_embedding_padding[:1].expand(len(t5), 1, -1).to(states.dtype)
    real = torch.cat([clip_mask[:, :clip_length], t5_mask[:, :t5_length]], dim=1).bool()
    slots = model.config.text_len + model.config.text_len_t5
    repeats = (slots - real.sum(1, keepdim=True)).float().log()
    bias = torch.cat([torch.zeros(real.shape, device=real.device).masked_fill(~real, MASKED_LOGIT), repeats], dim=1)
    return torch.cat([clip[:, :clip_length], states, padding], dim=1), bias[:, None, None].to(states.dtype)


def right_padded(mask: Tensor) -> bool:
    """Whether every row is ones followed by zeros, as both tokenizers make it."""
    return bool((mask.long().diff(dim=1) <= 0).all())


def lean_forward(self: nn.Module, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None,
                 text_embedding_mask: Tensor | None = None, encoder_hidden_states_t5: Tensor | None = None,
                 text_embedding_mask_t5: Tensor | None = None, image_meta_size: Tensor | None = None, style: Tensor | None = None,
                 image_rotary_emb: Any = None, controlnet_block_samples: Any = None, return_dict: bool = True) -> Any:
    """`HunyuanDiT2DModel.forward`: same arguments, same result to rounding. Control nets go to the stock method."""
    if controlnet_block_samples is not None:
        return type(self).forward(self, hidden_states, timestep, encoder_hidden_states, text_embedding_mask, encoder_hidden_states_t5,
                                  text_embedding_mask_t5, image_meta_size, style, image_rotary_emb, controlnet_block_samples, return_dict)
    height, width = hidden_states.shape[-2:]
    temb = condition(self.time_extra_emb, timestep, encoder_hidden_states_t5, image_meta_size, style)
    pack = self._padding_rows_equal and right_padded(text_embedding_mask) and right_padded(text_embedding_mask_t5)
    text, bias = (packed_text if pack else full_text)(
        self, encoder_hidden_states, text_embedding_mask, encoder_hidden_states_t5, text_embedding_mask_t5)
    rotation = rotation_from(tuple(table.to(hidden_states.device) for table in image_rotary_emb), bias)
    states, skips, half = self.pos_embed(hidden_states), [], self.config.num_layers // 2
    for layer, block in enumerate(self.blocks):
        skip = {"skip": skips.pop()} if layer > half else {}
        states = block(states, temb=temb, encoder_hidden_states=text, image_rotary_emb=rotation, **skip)
        if layer < half - 1:
            skips.append(states)
    states = self.proj_out(self.norm_out(states, temb.float()))
    patch = self.pos_embed.patch_size
    grid = states.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, self.out_channels))
    output = grid.permute(0, 5, 1, 3, 2, 4).reshape(len(states), self.out_channels, height, width)
    if not return_dict:
        return (output,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=output)


def install(model: nn.Module) -> None:
    """Give this one model the lean forward; a second call only looks at the padding rows again."""
    model._padding_rows_equal = padding_rows_equal(model.text_embedding_padding)
    if getattr(model, "_has_lean_forward", False):
        return
    model.set_attn_processor(LeanAttention())
    model.forward = MethodType(lean_forward, model)
    model._has_lean_forward = True


"""Attention as training runs it, for the kinds that families share: the library's function with fewer products and copies.

Layers on one input are one product with their LoRA; queries and keys are turned by one complex product; heads are never
transposed in memory. Put on one model when it is prepared for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.shared_input import project


def angles_from(pair: tuple[Tensor, Tensor]) -> Tensor:
    """(tokens, head_dim / 2) complex64 from diffusers' (cos, sin), each (tokens, head_dim) with every value twice."""
    cos, sin = pair
    return torch.complex(cos[:, ::2].float(), sin[:, ::2].float())


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x: (B, tokens, heads, head_dim), neighbouring pairs turned by `angles` (tokens, head_dim / 2) or (B, tokens, head_dim / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles.unsqueeze(-2)).flatten(-2).to(x.dtype)


def heads(attn: nn.Module, x: Tensor, source: Tensor, layers: tuple[str, str, str], norms: tuple[str, str]) -> list[Tensor]:
    """Normalised queries of `x`, normalised keys and values of `source`: (B, tokens, heads, head_dim) each."""
    query, key, value = (getattr(attn, name) for name in layers)
    found = project(x, query, key, value) if x is source else [*project(x, query), *project(source, key, value)]
    states = [tensor.unflatten(-1, (attn.heads, -1)) for tensor in found]
    for index, norm in enumerate(getattr(attn, name, None) for name in norms):
        if norm is not None:
            states[index] = norm(states[index])
    return states


def queries(attn: nn.Module, x: Tensor, layers: tuple[str, str, str], norms: tuple[str, str]) -> Tensor:
    """As `heads`, the queries alone."""
    query, norm = project(x, getattr(attn, layers[0]))[0].unflatten(-1, (attn.heads, -1)), getattr(attn, norms[0], None)
    return query if norm is None else norm(query)


def keys_and_values(attn: nn.Module, source: Tensor, layers: tuple[str, str, str], norms: tuple[str, str]) -> list[Tensor]:
    """As `heads`, without queries."""
    key, value = (states.unflatten(-1, (attn.heads, -1)) for states in project(source, getattr(attn, layers[1]), getattr(attn, layers[2])))
    norm = getattr(attn, norms[1], None)
    return [key if norm is None else norm(key), value]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, tokens, heads, head_dim) each -> (B, tokens, heads * head_dim)."""
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2).to(query.dtype)


PICTURE, PICTURE_NORMS = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
TEXT, TEXT_NORMS = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


class FluxAttention:
    """`FluxAttnProcessor`: text before picture, one rotation over both; single blocks have both in one sequence."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
                 image_rotary_emb: Any = None) -> Any:
        query, key, value = heads(attn, hidden_states, hidden_states, PICTURE, PICTURE_NORMS)
        if encoder_hidden_states is not None:
            text = heads(attn, encoder_hidden_states, encoder_hidden_states, TEXT, TEXT_NORMS)
            query, key, value = (torch.cat(both, dim=1) for both in zip(text, (query, key, value), strict=True))
        if image_rotary_emb is not None:
            angles = angles_from(image_rotary_emb)
            query, key = rotate(query, angles), rotate(key, angles)
        mixed = attend(query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return mixed
        length = encoder_hidden_states.shape[1]
        return project(mixed[:, length:], attn.to_out[0])[0], project(mixed[:, :length], attn.to_add_out)[0]


class JointAttention:
    """`JointAttnProcessor2_0` of SD3: picture before text, no rotation; self-attention alone in its second attention."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        states = heads(attn, hidden_states, hidden_states, PICTURE, PICTURE_NORMS)
        if encoder_hidden_states is None:
            return project(attend(*states), attn.to_out[0])[0]
        if attn.context_pre_only:  # the last block's text is thrown away, and so need not be asked for
            text = [states[0][:, :0], *keys_and_values(attn, encoder_hidden_states, TEXT, TEXT_NORMS)]
        else:
            text = heads(attn, encoder_hidden_states, encoder_hidden_states, TEXT, TEXT_NORMS)
        mixed = attend(*(torch.cat(both, dim=1) for both in zip(states, text, strict=True)))
        picture, rest = project(mixed[:, : hidden_states.shape[1]], attn.to_out[0])[0], mixed[:, hidden_states.shape[1]:]
        return picture, None if attn.context_pre_only else project(rest, attn.to_add_out)[0]


class QwenAttention:
    """`QwenDoubleStreamAttnProcessor2_0`: text before picture, each turned by its own angles, padding masked.

    asks_for_text: whether the text's own result is wanted; the last block's is not.
    """

    def __init__(self, asks_for_text: bool = True):
        self.asks_for_text = asks_for_text

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor | None = None,
                 attention_mask: Tensor | None = None, image_rotary_emb: Any = None) -> tuple[Tensor, Tensor | None]:
        length, mask = encoder_hidden_states.shape[1], None
        if encoder_hidden_states_mask is not None:
            everything = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            mask = torch.cat([encoder_hidden_states_mask.bool(), everything], dim=1)[:, None, None]
        picture = heads(attn, hidden_states, hidden_states, PICTURE, PICTURE_NORMS)
        if self.asks_for_text:
            text = heads(attn, encoder_hidden_states, encoder_hidden_states, TEXT, TEXT_NORMS)
        else:
            text = [picture[0][:, :0], *keys_and_values(attn, encoder_hidden_states, TEXT, TEXT_NORMS)]
        if image_rotary_emb is not None:
            for states, angles in zip((picture, text), image_rotary_emb, strict=True):
                states[:2] = (rotate(turned, angles[: turned.shape[1]]) for turned in states[:2])
        mixed = attend(*(torch.cat(both, dim=1) for both in zip(text, picture, strict=True)), mask)
        if not self.asks_for_text:
            return project(mixed, attn.to_out[0])[0], None
        return project(mixed[:, length:], attn.to_out[0])[0], project(mixed[:, :length], attn.to_add_out)[0]


class SingleStreamAttention:
    """`ZSingleStreamAttnProcessor`: one sequence, angles for each picture, padding masked."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
                 freqs_cis: Tensor | None = None) -> Tensor:
        query, key, value = heads(attn, hidden_states, hidden_states, PICTURE, PICTURE_NORMS)
        if freqs_cis is not None:
            query, key = rotate(query, freqs_cis), rotate(key, freqs_cis)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None]
        return project(attend(query, key, value, attention_mask), attn.to_out[0])[0]


class LinearAttention:
    """`SanaLinearAttnProcessor2_0`: positive queries and keys, so that keys meet values first and no matrix of scores is made."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (project(hidden_states, attn.to_q, attn.to_k, attn.to_v) if source is hidden_states
                             else [*project(hidden_states, attn.to_q), *project(source, attn.to_k, attn.to_v)])
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key, value = (states.transpose(1, 2).unflatten(1, (attn.heads, -1)).float() for states in (query.relu(), key.relu(), value))
        with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
            # Sums over all tokens stay in float32, as the model was made and as the pipeline draws: autocast would take them in 16 bits.
            # One more row of ones among the values adds up the keys: the denominator.
            mixed = F.pad(value, (0, 0, 0, 1), value=1.0).matmul(key.transpose(2, 3)).matmul(query)
        mixed = (mixed[:, :, :-1] / (mixed[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        result = project(mixed, attn.to_out[0])[0]
        return result.clip(-65504, 65504) if result.dtype == torch.float16 else result


def install(modules: Iterable[nn.Module], library_class: str, processor: Callable[..., Any]) -> None:
    """Put `processor` in the place of every processor of the library class; others (of an IP adapter, say) stay."""
    for module in modules:
        if type(getattr(module, "processor", None)).__name__ == library_class:
            module.set_processor(processor)

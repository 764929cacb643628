"""Training without the 333 text slots: the real tokens and ONE pad stand for all of them, exactly.

HunyuanDiT shows its cross attention 77 + 256 slots and its pooler 256, nearly all of them pads. While all rows of
`text_embedding_padding` are equal, n pads weigh in an attention like one pad whose logit is raised by log n.
`unpack` writes the shared rows back, after which the stock forward gives the same numbers.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

HIDDEN = -1e4     # logit of a slot that is not there


def rotary_table(model, size: tuple[int, int]):
    """The pipeline's own rotary table for a picture of (height, width) pixels."""
    patch = model.config.patch_size
    grid = (size[0] // 8 // patch, size[1] // 8 // patch)
    region = get_resize_crop_region_for_grid(grid, 512 // 8 // patch)
    return get_2d_rotary_pos_embed(model.inner_dim // model.num_heads, region, grid, output_type="pt")


class BiasedAttention:
    """HunyuanDiT's attention with a bias on the text keys."""

    def __init__(self, shared: dict):
        self.shared = shared

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, image_rotary_emb=None):
        crossing = encoder_hidden_states is not None
        source = encoder_hidden_states if crossing else hidden_states

        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(source)))
        query = apply_rotary_emb(query, image_rotary_emb)
        if not crossing:
            key = apply_rotary_emb(key, image_rotary_emb)
        bias = self.shared["bias"] if crossing else None
        mixed = F.scaled_dot_product_attention(query, key, heads(attn.to_v(source)), attn_mask=bias)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


class PackedTransformer:
    """Calls a HunyuanDiT2DModel on packed text."""

    def __init__(self, model):
        self.model, self.shared = model, {"bias": None}
        model.set_attn_processor(BiasedAttention(self.shared))

    def __call__(self, latents, timesteps, text: dict[str, torch.Tensor], rotary):
        model = self.model
        height, width = latents.shape[-2:]
        condition = self._condition(timesteps, text)
        tokens, self.shared["bias"] = self._text_tokens(text)
        x, skips, layers = model.pos_embed(latents), [], model.config.num_layers
        for index, block in enumerate(model.blocks):
            skip = skips.pop() if index > layers // 2 else None
            x = block(x, temb=condition, encoder_hidden_states=tokens, image_rotary_emb=rotary, skip=skip)
            if index < layers // 2 - 1:
                skips.append(x)
        x = model.proj_out(model.norm_out(x, condition))
        patch = model.config.patch_size
        x = x.reshape(len(x), height // patch, width // patch, patch, patch, model.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), model.out_channels, height, width)

    def _text_tokens(self, text):
        """[n, real + 1, width] and the logit bias [n, 1, 1, real + 1]."""
        model = self.model
        real = torch.cat([text["bert_mask"], text["t5_mask"][:, :-1]], 1).bool()
        pads = model.config.text_len + model.config.text_len_t5 - real.sum(1, keepdim=True)
        pad = model.text_embedding_padding[:1].expand(len(real), 1, -1)
        tokens = torch.cat([text["bert"], model.text_embedder(text["t5"][:, :-1]), pad], 1)
        bias = torch.cat([torch.zeros(real.shape).masked_fill(~real, HIDDEN), pads.float().log()], 1)
        return tokens, bias[:, None, None, :]

    def _condition(self, timesteps, text):
        embedder = self.model.time_extra_emb
        time = embedder.timestep_embedder(embedder.time_proj(timesteps))
        return time + embedder.extra_embedder(self._pool(embedder.pooler, text))

    def _pool(self, pooler, text):
        """The pooler's attention from the mean of all slots to the mean and every slot; slots carry no position."""
        real, pad = text["t5_mask"][:, :-1].float(), text["t5"][:, -1:]
        pads = self.model.config.text_len_t5 - real.sum(1, keepdim=True)
        shown = text["t5"][:, :-1] * real[..., None]
        mean = (shown.sum(1, keepdim=True) + pads[..., None] * pad) / self.model.config.text_len_t5
        slots = torch.cat([mean + pooler.positional_embedding[:1], shown, pad], 1)
        bias = torch.cat([torch.zeros(len(real), 1), (1 - real) * HIDDEN, pads.log()], 1)[:, None, None, :]

        def heads(x):
            return x.unflatten(-1, (pooler.num_heads, -1)).transpose(1, 2)

        query, key, value = heads(pooler.q_proj(slots[:, :1])), heads(pooler.k_proj(slots)), heads(pooler.v_proj(slots))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return pooler.c_proj(mixed.transpose(1, 2).flatten(2))[:, 0]


@torch.no_grad()
def prepare(model) -> None:
    """Makes the rows equal that packing takes for equal, and holds them there."""
    model.text_embedding_padding.zero_()
    model.time_extra_emb.pooler.positional_embedding[1:].zero_()


@torch.no_grad()
def unpack(model) -> None:
    """Writes the one trained pad row to all rows and gives the model its stock attention back."""
    model.text_embedding_padding.copy_(model.text_embedding_padding[:1].clone().expand_as(model.text_embedding_padding))
    model.time_extra_emb.pooler.positional_embedding[1:].zero_()
    model.set_default_attn_processor()

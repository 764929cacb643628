"""What an adapter adds to a layer's weight, for every form: float32, in the weight's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.adapters.forms import A_SUFFIX, B_SUFFIX, LOHA, LOKR, LORA, MAGNITUDE_SUFFIX, block_size, form_of

if TYPE_CHECKING:
    from torch import Tensor


def weight_change(parts: Mapping[str, Tensor], weight: Tensor, scale: float = 1.0) -> Tensor:
    """The change of `weight` (out, in) or (out, in, kh, kw) by one module's tensors, suffix -> tensor, times `scale`.

    With DoRA magnitudes and OFT it depends on the weight itself, and is not linear in `scale`; OFT knows only 1.
    """
    form = form_of(parts)
    if form is LORA:
        update = delta(parts[A_SUFFIX], parts[B_SUFFIX], scale).reshape(weight.shape)
        return dora_delta(weight, update, parts[MAGNITUDE_SUFFIX]) if MAGNITUDE_SUFFIX in parts else update
    if form is LOHA:
        left = parts[".hada_w1_a"].float() @ parts[".hada_w1_b"].float()
        return (left * (parts[".hada_w2_a"].float() @ parts[".hada_w2_b"].float()) * scale).reshape(weight.shape)
    if form is LOKR:
        import torch

        second = parts[".lokr_w2"].float() if ".lokr_w2" in parts else parts[".lokr_w2_a"].float() @ parts[".lokr_w2_b"].float()
        return (torch.kron(parts[".lokr_w1"].float(), second) * scale).reshape(weight.shape)
    return turned(weight, parts[".oft_R.weight"]) - weight.float()


def delta(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * B @ A in float32, in the shape of the layer's weight: (out, in) or (out, in, kh, kw)."""
    product = b.float().flatten(1) @ a.float().flatten(1)
    return (product * scale).reshape(b.shape[0], *a.shape[1:])


def dora_delta(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA adds to `weight` (out, in): m * (W + dW) / |W + dW| - W, the norm taken per output row.
    Formula: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), eq. 5."""
    total = weight.float() + update
    norm = total.flatten(1).norm(dim=1).reshape(-1, *[1] * (total.ndim - 1))
    return magnitude.float().reshape(norm.shape) / norm * total - weight.float()


def rotations(blocks: Tensor) -> Tensor:
    """(n, b, b) nearly orthogonal matrices from the upper triangles (n, b (b - 1) / 2) of skew-symmetric Q.

    The first five terms of the Cayley transform (I + Q) / (I - Q) = I + 2 Q + 2 Q^2 + ..., the last one halved, as peft
    computes it (Qiu et al., "Orthogonal Finetuning Made Scalable", 2025).
    """
    import torch

    edge = block_size(blocks.shape[1])
    rows, columns = torch.triu_indices(edge, edge, 1, device=blocks.device)
    skew = blocks.new_zeros(len(blocks), edge, edge, dtype=torch.float32)
    skew[:, rows, columns] = blocks.float()
    skew = skew - skew.transpose(1, 2)
    square = skew @ skew
    return torch.eye(edge, device=blocks.device) + 2 * skew + 2 * square + 2 * square @ skew + square @ square


def turned(weight: Tensor, blocks: Tensor) -> Tensor:
    """`weight` (out, in) with its inputs turned block by block: W' = W R'."""
    turn = rotations(blocks)
    pieces = weight.float().reshape(weight.shape[0], len(turn), -1)
    return (pieces.transpose(0, 1) @ turn.transpose(1, 2)).transpose(0, 1).reshape(weight.shape)

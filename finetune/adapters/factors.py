"""The algebra of low-rank pairs (A, B) with delta W = B @ A: scaling, splitting and joining fused layers, truncation.

Shapes: A (r, in) or (r, in, kh, kw); B (out, r) or (out, r, 1, 1). Everything but truncation is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def fold(b: Tensor, scale: float) -> Tensor:
    """scale * B without a rounding beyond float32's: in B's own dtype when the scale is a power of two, else in float32."""
    if scale == 1.0:
        return b
    mantissa, _ = math.frexp(scale)
    if mantissa == 0.5:
        folded = b * scale
        if (folded / scale).equal(b):
            return folded
    return b.float() * scale


def split_rows(a: Tensor, b: Tensor, rows: Sequence[int]) -> list[tuple[Tensor, Tensor] | None]:
    """One pair a fused part; None for a part that the adapter does not touch.

    When every column of B acts on one part only (a block-diagonal joint of separate adapters), the parts get their own
    columns and the matching rows of A, so that joining and splitting again gives back the ranks. Otherwise the parts
    share A: delta W of rows i..j is B[i:j] @ A.
    """
    import torch

    blocks = list(b.split(list(rows)))
    active = torch.stack([block.flatten(1).ne(0).reshape(block.shape[0], b.shape[1], -1).any(dim=2).any(dim=0) for block in blocks])
    per_column = active.sum(dim=0)
    if len(blocks) > 1 and per_column.max() == 1 and active.any(dim=1).sum() > 1:
        owner = _owners(active)
        parts: list[tuple[Tensor, Tensor] | None] = []
        for number, block in enumerate(blocks):
            columns = (owner == number).nonzero().flatten()
            parts.append((a[columns].clone(), block[:, columns].clone()) if len(columns) else None)
        return parts
    untouched = [not bool(row.any()) for row in active] if active.any() else [False] * len(blocks)
    return [None if skip else (a.clone(), block.clone()) for skip, block in zip(untouched, blocks, strict=True)]


def _owners(active: Tensor) -> Tensor:
    """Which part each column belongs to; a column of zeros goes with the one before it (the first: with the next)."""
    owner = active.int().argmax(dim=0)
    silent = ~active.any(dim=0)
    first = int(owner[~silent][0])
    current = first
    for column in range(len(owner)):
        current = current if silent[column] else int(owner[column])
        owner[column] = current
    return owner


def join_rows(parts: Sequence[tuple[Tensor, Tensor] | None], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The pair of the fused layer. Parts that share A bit for bit keep its rank; else ranks add up, block-diagonally."""
    import torch

    present = [(number, *part) for number, part in enumerate(parts) if part is not None]
    first_a, tail = present[0][1], present[0][2].shape[2:]
    dtype = first_a.dtype
    for _, a, b in present:
        dtype = torch.promote_types(torch.promote_types(dtype, a.dtype), b.dtype)
    if len(present) > 1 and all(a.shape == first_a.shape and a.equal(first_a) for _, a, _ in present):
        blocks = [torch.zeros(count, first_a.shape[0], *tail, dtype=dtype) for count in rows]
        for number, _, b in present:
            blocks[number] = b.to(dtype)
        return first_a.to(dtype), torch.cat(blocks)
    total = sum(a.shape[0] for _, a, _ in present)
    joined = torch.zeros(sum(rows), total, *tail, dtype=dtype)
    column = 0
    for number, a, b in present:
        start = sum(rows[:number])
        joined[start:start + rows[number], column:column + a.shape[0]] = b.to(dtype)
        column += a.shape[0]
    return torch.cat([a.to(dtype) for _, a, _ in present]), joined


def swap_row_halves(b: Tensor) -> Tensor:
    """B, or magnitudes (out,), with the upper and lower half of rows exchanged (shift, scale <-> scale, shift)."""
    import torch

    upper, lower = b.chunk(2)
    return torch.cat([lower, upper])


def spectrum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), V (r, in) of delta W = B @ A, computed in float64 from the factors alone: O((in + out) r^2).

    QR of both factors and an SVD of the small core (Golub & Van Loan, Matrix Computations, 5.4).
    """
    import torch

    left, left_core = torch.linalg.qr(b.double().flatten(1))
    right, right_core = torch.linalg.qr(a.double().flatten(1).T)
    u, s, v = torch.linalg.svd(left_core @ right_core.T)
    count = min(left.shape[1], right.shape[1])
    return left @ u[:, :count], s[:count], v[:count] @ right.T


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best pair of at most `rank` (Eckart-Young), float32, and its relative Frobenius error."""
    u, s, v = spectrum(a, b)
    kept = max(1, min(rank, len(s)))
    error = float((s[kept:].square().sum() / s.square().sum().clamp_min(1e-300)).sqrt())
    root = s[:kept].sqrt()
    new_a = (root[:, None] * v[:kept]).float().reshape(kept, *a.shape[1:])
    new_b = (u[:, :kept] * root).float().reshape(b.shape[0], kept, *b.shape[2:])
    return new_a, new_b, error


def probe(a: Tensor, b: Tensor, columns: int = 4) -> Tensor:
    """delta W times a few fixed directions, (out, columns) float64: equal for equal delta W, cheap for large layers."""
    import torch

    width = a.flatten(1).shape[1]
    directions = torch.cos(torch.arange(width * columns, dtype=torch.float64).reshape(width, columns) * 1.618033988749895 + 0.5)
    return b.double().flatten(1) @ (a.double().flatten(1) @ directions)

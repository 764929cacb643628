"""LyCORIS factors as plain low-rank pairs: LoKr, LoHa and Tucker convolutions. Exact; what it costs is rank.

Formulas: LyCORIS (Yeh et al., "Navigating Text-To-Image Customization", 2024), sections on LoKr and LoHa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.foreign_scales import checked_scale
from finetune.adapters.forms import A_SUFFIX, B_SUFFIX, LOHA, LORA, OFT
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

RANK_TOLERANCE = 1e-7


def as_lora(adapter: AdapterFile) -> AdapterFile:
    """A LoHa or LoKr written out as LoRA, exactly (the rank grows, as a note says); a LoRA as it is. AdapterError for OFT."""
    if adapter.form is LORA:
        return adapter
    if adapter.form is OFT:
        raise AdapterError("an OFT adapter turns the base's weights and has no low-rank form", fix="bake it into its base with `brushwork adapter bake`")
    build, tensors = loha_pair if adapter.form is LOHA else lokr_pair, {}
    for module in adapter.modules:
        factors = {suffix[1:]: tensor for suffix, tensor in adapter.parts(module).items()}
        tensors[module + A_SUFFIX], tensors[module + B_SUFFIX], _ = build(factors, None, module, module)
    written = replace(adapter, tensors=tensors)
    note = f"{adapter.form.title} written out as LoRA, rank {max(adapter.ranks.values())} -> {max(written.ranks.values())}"
    return replace(written, notes=(*adapter.notes, note))


def in_one_form(adapters: Sequence[AdapterFile]) -> list[AdapterFile]:
    """Adapters as they can act together in one model: as they are where all have one form, else LoHas and LoKrs written out as
    LoRA. An OFT, which lies under the others, stays what it is and does not count."""
    if len({adapter.form for adapter in adapters} - {OFT}) < 2:
        return list(adapters)
    return [adapter if adapter.form is OFT else as_lora(adapter) for adapter in adapters]


def tucker_pair(down: Tensor, mid: Tensor, up: Tensor, module: str, where: str) -> tuple[Tensor, Tensor]:
    """A convolution's pair from its Tucker form. down (n, in, 1, 1), mid (m, n, kh, kw), up (out, m, 1, 1)."""
    import torch

    if mid.ndim != 4 or tuple(mid.shape[:2]) != (up.shape[1], down.shape[0]) or up[0].numel() != up.shape[1]:
        raise AdapterError(f"{module}: the Tucker factors do not belong together", where=where)
    a = torch.einsum("mnhw,nj->mjhw", mid.float(), down.float().flatten(1))
    return a, up.float().reshape(up.shape[0], up.shape[1], 1, 1)


def loha_pair(factors: Mapping[str, Tensor], alpha: float | None, module: str, where: str) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) of (w1a @ w1b) * (w2a @ w2b), elementwise: rank r1 * r2 by multiplying rows and columns pairwise."""
    import torch

    if "hada_t1" in factors or "hada_t2" in factors:
        raise AdapterError(f"{module}: a Tucker LoHa, which has no low-rank form", where=where)
    try:
        w1a, w1b, w2a, w2b = (factors[name].double() for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    except KeyError as missing:
        raise AdapterError(f"{module}: {missing.args[0]} is missing", where=where) from None
    if any(factor.ndim != 2 or not factor.numel() for factor in (w1a, w1b, w2a, w2b)) or w1a.shape[0] != w2a.shape[0] or w1b.shape[1:] != w2b.shape[1:] or w1a.shape[1] != w1b.shape[0] or w2a.shape[1] != w2b.shape[0]:
        raise AdapterError(f"{module}: the LoHa factors do not belong together", where=where)
    b = torch.einsum("oi,oj->oij", w1a, w2a).flatten(1)
    a = torch.einsum("in,jn->ijn", w1b, w2b).flatten(0, 1)
    return a.float(), b.float(), (1.0 if alpha is None else checked_scale(alpha, w1b.shape[0], module, where))


def lokr_pair(factors: Mapping[str, Tensor], alpha: float | None, module: str, where: str) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) of kron(w1, w2): the Kronecker product of two decompositions, rank(w1) * rank(w2).

    The scale is alpha / rank only where a factor is decomposed; with two full factors LyCORIS ignores alpha.
    """
    if "lokr_t2" in factors:
        raise AdapterError(f"{module}: a Tucker LoKr, which has no low-rank form", where=where)
    first, first_rank = _lokr_factor(factors, "lokr_w1", module, where)
    second, second_rank = _lokr_factor(factors, "lokr_w2", module, where)
    if second.ndim == 4:
        raise AdapterError(f"{module}: a LoKr on a convolution", where=where)
    if any(factor.ndim != 2 or not factor.numel() for factor in (first, second)) or 0 in (first_rank, second_rank):
        raise AdapterError(f"{module}: the LoKr factors are no matrices", where=where)
    rank = second_rank or first_rank
    u1, v1 = _decomposed(first)
    u2, v2 = _decomposed(second)
    b, a = _kronecker(u1, u2), _kronecker(v1, v2)
    return a.float(), b.float(), (1.0 if alpha is None or rank is None else checked_scale(alpha, rank, module, where))


def _lokr_factor(factors: Mapping[str, Tensor], name: str, module: str, where: str) -> tuple[Tensor, int | None]:
    if name in factors:
        return factors[name].double(), None
    a, b = factors.get(f"{name}_a"), factors.get(f"{name}_b")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise AdapterError(f"{module}: the LoKr factor {name} is incomplete", where=where)
    return a.double() @ b.double(), b.shape[0]


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(U, V) with U @ V = matrix and as few columns as its numerical rank."""
    import torch

    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, int((s > s.max() * RANK_TOLERANCE * math.sqrt(len(s))).sum()))
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product of two matrices; torch.kron does not take a single column of an SVD as it lies in memory."""
    import torch

    return torch.einsum("ij,kl->ikjl", left, right).reshape(left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])

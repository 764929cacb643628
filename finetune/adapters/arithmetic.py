"""Arithmetic on adapters, module by module: scale, add, merge, resize, subtract, compare. What it costs is stated.

All of it works on delta W = B @ A, of text encoders as of the transformer; what is said of an encoder's module is said under its
name in a file, `text_encoder.text_model...`. Where a result needs a smaller rank than is exact, the best one is taken and
its relative Frobenius error reported; nothing is cut in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from data_tools.progress import Progress
from finetune.adapters import factors
from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.forms import A_SUFFIX, B_SUFFIX, OFT
from finetune.adapters.lycoris import as_lora
from finetune.adapters.text_encoders import joined, parted
from finetune.adapters.weight_change import delta
from finetune.errors import AdapterError
from finetune.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("concat", "linear", "svd", "ties", "dare")
DENSE_SVD_UP_TO = 1024
# What is to be known of a DoRA whose rank was cut: only the direction of a row has an error, and it is smaller than that of what is added.
CUT_DORA = "the error is that of what DoRA adds before it norms the rows; its magnitudes stay, so every row keeps its length and only turns"


@dataclass(frozen=True)
class Weighted:
    """One adapter in a sum."""

    adapter: AdapterFile
    weight: float


@dataclass
class Result:
    """adapter: what came out.  errors: module -> relative error of its delta W against the exact result, where it is not
    exact.  notes: for the user."""

    adapter: AdapterFile
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest relative error; 0 for an exact result."""
        return max(self.errors.values(), default=0.0)


def rescale(adapter: AdapterFile, factor: float) -> AdapterFile:
    """delta W times `factor` (finite, not 0), exactly; DoRA adapters are refused, since their strength is not linear."""
    if not math.isfinite(factor) or factor == 0:
        raise AdapterError(f"a factor of {factor}", fix="the factor must be finite and not 0")
    _no_dora(adapter)
    def scaled(tensors: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
        return {key: factors.fold(value, factor) if key.endswith(suffix) else value for key, value in tensors.items()}

    encoders = {slot: scaled(part, B_SUFFIX) for slot, part in adapter.text_encoders.items()}
    return replace(adapter, tensors=scaled(adapter.tensors, adapter.form.scaled), text_encoders=encoders)


def _no_dora(*adapters: AdapterFile) -> None:
    if any(joined(adapter).uses_dora for adapter in adapters):
        raise AdapterError("DoRA magnitudes do not add up or scale", fix="bake the adapter into its base instead")
    _no_oft(*adapters)


def _no_oft(*adapters: AdapterFile) -> None:
    if any(adapter.form is OFT for adapter in adapters):
        raise AdapterError("the turns of an OFT adapter do not add up, scale or have a rank", fix="bake the adapter into its base instead")


def merge(parts: Sequence[Weighted], method: str = "concat", *, rank: int | None = None, density: float = 0.5, seed: int = 0,
          progress: Progress | None = None) -> Result:
    """Several adapters as one. A module that only some of them have, of a text encoder too, is the sum of those.

    method: "concat" the weighted sum, exact, ranks add up to at most the layer's own; "linear" the same at the largest rank that came in;
    "svd" the same at `rank`; "ties" (Yadav et al. 2023) and "dare" (Yu et al. 2024) drop entries of delta W by size or
    at random before adding.  density: the share of entries that stay, (0, 1].  rank: of the result, for all but concat.
    Raises AdapterError for adapters of different families, of different layer sizes, or with DoRA.
    """
    if method not in METHODS:
        raise AdapterError(f"no way of merging is called {method!r}", fix=f"one of {', '.join(METHODS)}")
    if len(parts) < 1 or not 0 < density <= 1 or (rank is not None and rank < 1):
        raise AdapterError("merging needs adapters, a density above 0 and at most 1, and a rank of at least 1")
    parts = [replace(part, adapter=joined(as_lora(part.adapter))) for part in parts]
    families = _families([part.adapter for part in parts])
    notes = [*_written_out(*(part.adapter for part in parts)), *_check_together(parts)]
    usual = max(max(part.adapter.ranks.values()) for part in parts)
    modules = sorted({module for part in parts for module in part.adapter.modules})
    result = Result(AdapterFile({}, family=families[0] if families else None, alternatives=tuple(families[1:])), notes=notes)
    tensors: dict[str, Tensor] = {}
    with (progress or Progress()).phase("merging", len(modules)) as advance:
        for module in modules:
            present = [(number, part) for number, part in enumerate(parts) if module + A_SUFFIX in part.adapter.tensors]
            a, b, error = _merge_module(module, present, method, rank or usual, density, seed)
            tensors |= {module + A_SUFFIX: a, module + B_SUFFIX: b}
            if error > 0:
                result.errors[module] = error
            advance(1, module)
    result.adapter = parted(replace(result.adapter, tensors=tensors))
    return result


def _check_together(parts: Sequence[Weighted]) -> list[str]:
    adapters = [part.adapter for part in parts]
    _no_dora(*adapters)
    if any(not math.isfinite(part.weight) for part in parts):
        raise AdapterError("a weight is not finite")
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        for module in adapter.modules:
            a, b = adapter.pair(module)
            shape = (b.shape[0], *a.shape[1:])
            if shapes.setdefault(module, shape) != shape:
                raise AdapterError(f"{module} has {shape} in one adapter and {shapes[module]} in another", fix="they were made for different models")
    bases = {str(adapter.provenance["base_model"]) for adapter in adapters if adapter.provenance.get("base_model")}
    return [f"the adapters were trained on different bases: {', '.join(sorted(bases))}"] if len(bases) > 1 else []


def _written_out(*adapters: AdapterFile) -> list[str]:
    return list(dict.fromkeys(note for adapter in adapters for note in adapter.notes if "written out" in note))


def _families(adapters: Sequence[AdapterFile]) -> list[str]:
    """The families that all of them fit, the likeliest first; none where nothing was recognised. Raises AdapterError where they share none."""
    fitting = [(adapter.family, *adapter.alternatives) for adapter in adapters if adapter.family]
    common = [name for name in min(fitting, key=len, default=()) if all(name in each for each in fitting)]
    if fitting and not common:
        raise AdapterError(f"the adapters belong to different models: {', '.join(sorted({each[0] for each in fitting}))}")
    return common


def _merge_module(module: str, present: Sequence[tuple[int, Weighted]], method: str, rank: int, density: float, seed: int) -> tuple[Tensor, Tensor, float]:
    import torch

    pairs = [(part.weight, *part.adapter.pair(module)) for _, part in present]
    if method in ("concat", "linear", "svd"):
        a = torch.cat([pair[1].float() for pair in pairs])
        b = torch.cat([pair[2].float() * pair[0] for pair in pairs], dim=1)
        # A layer has no more directions than this: what is beyond would only weigh.
        most = min(b.shape[0], a[0].numel()) if method == "concat" else rank
        return factors.truncate(a, b, most) if a.shape[0] > most else (a, b, 0.0)
    deltas = torch.stack([delta(a, b) for _, a, b in pairs])
    strengths = torch.tensor([weight for weight, _, _ in pairs]).reshape(-1, *[1] * (deltas.ndim - 1))
    if method == "ties":
        merged = ties(deltas, strengths, density)
    else:
        draws = torch.stack([torch.rand(deltas.shape[1:], generator=generator(seed, f"dare {module}", index=number)) for number, _ in present])
        merged = ((draws < density) * deltas / density * strengths).sum(dim=0)
    return low_rank(merged, rank, seed)


def ties(deltas: Tensor, strengths: Tensor, density: float) -> Tensor:
    """Trim, elect signs, add what agrees (Yadav et al., "TIES-Merging", 2023). deltas (n, out, in...), strengths (n, 1, 1...).

    Each delta keeps its `density` largest entries by magnitude; a position's sign is that of the weighted sum; the weighted
    entries of that sign are added. The paper averages them and leaves the scale to be tuned; a sum keeps every strength what was
    asked for, as the other methods do, whether or not another adapter has an entry at the same place.
    """
    import torch

    kept = []
    for each in deltas:
        count = max(1, round(density * each.numel()))
        threshold = each.abs().flatten().kthvalue(each.numel() - count + 1).values
        kept.append(torch.where(each.abs() >= threshold, each, torch.zeros_like(each)))
    weighted = torch.stack(kept) * strengths
    agrees = weighted.sign() == weighted.sum(dim=0).sign()
    return (weighted * agrees).sum(dim=0)


def low_rank(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """(A, B, relative error) of the best approximation of a dense delta W (out, in...) at `rank`.

    Large layers use a randomised SVD with oversampling and power iterations (Halko et al. 2011), seeded. Raises AdapterError for
    a matrix without a finite norm.
    """
    import torch

    flat = matrix.float().flatten(1)
    total = float(flat.norm())
    if not math.isfinite(total):
        raise AdapterError("the weights are too large, or not numbers", fix="an adapter with such weights blew up in training")
    kept = min(rank, *flat.shape)
    if min(flat.shape) <= DENSE_SVD_UP_TO or kept * 4 >= min(flat.shape):
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "low rank").initial_seed())
            u, s, v = torch.svd_lowrank(flat, q=kept + 16, niter=4)
    root = s[:kept].sqrt()
    a, b = root[:, None] * v[:, :kept].T, u[:, :kept] * root
    # Measured, not summed up from the spectrum: a small difference of large sums has no digits left.
    error = float((flat - b @ a).norm()) / total if total else 0.0
    return a.reshape(kept, *matrix.shape[1:]).contiguous(), b.reshape(matrix.shape[0], kept, *[1] * (matrix.ndim - 2)).contiguous(), error if error > 1e-6 else 0.0


def rank_for_energy(spectrum: Tensor, energy: float) -> int:
    """The smallest rank that keeps `energy` (0 to 1) of the squared singular values."""
    squares = spectrum.double().square()
    if float(squares.sum()) == 0:
        return 1
    reached = squares.cumsum(0) / squares.sum() >= energy - 1e-12
    return int(reached.int().argmax()) + 1


def resize(adapter: AdapterFile, *, rank: int | None = None, energy: float | None = None, progress: Progress | None = None) -> Result:
    """The adapter at a smaller rank: at most `rank`, and only as much as keeps `energy` (0 to 1] of each module's
    squared singular values. One of the two must be given. Ranks never grow.

    DoRA's magnitudes are the lengths of the finished rows and stay as they are; the result's notes say what its errors are of. Raises
    AdapterError for an OFT, which has no rank.
    """
    if rank is None and energy is None:
        raise AdapterError("resizing needs a rank or an energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise AdapterError("a rank is at least 1, an energy above 0 and at most 1")
    _no_oft(adapter)
    adapter = joined(as_lora(adapter))
    tensors, errors = dict(adapter.tensors), {}
    with (progress or Progress()).phase("resizing", len(adapter.modules)) as advance:
        for module in adapter.modules:
            a, b = adapter.pair(module)
            wanted = min(rank or a.shape[0], a.shape[0])
            if energy is not None:
                wanted = min(wanted, rank_for_energy(factors.spectrum(a, b)[1], energy))
            if wanted < a.shape[0]:
                tensors[module + A_SUFFIX], tensors[module + B_SUFFIX], errors[module] = factors.truncate(a, b, wanted)
            advance(1, module)
    return Result(parted(replace(adapter, tensors=tensors)), errors, [*_written_out(adapter), *([CUT_DORA] if errors and adapter.uses_dora else [])])


def subtract(left: AdapterFile, right: AdapterFile, weight: float = 1.0) -> Result:
    """left - weight * right, exactly; ranks add up to at most the layer's own."""
    return merge([Weighted(left, 1.0), Weighted(right, -weight)], "concat")


@dataclass(frozen=True)
class Comparison:
    """modules: name -> cosine of the two delta W as vectors, where both have it.  left_only, right_only: module names.
    cosine: of all shared modules together.  norms: the Frobenius norms of both adapters."""

    modules: dict[str, float]
    left_only: list[str]
    right_only: list[str]
    cosine: float
    norms: tuple[float, float]


def compare(left: AdapterFile, right: AdapterFile) -> Comparison:
    """How alike two adapters are, from their factors alone: <dW1, dW2> = sum((B1' B2) * (A1 A2'))."""
    left, right = joined(as_lora(left)), joined(as_lora(right))
    cosines: dict[str, float] = {}
    dots = left_squares = right_squares = 0.0
    for module in left.modules:
        if module not in right.ranks:
            continue
        first, second = left.pair(module), right.pair(module)
        if first[0].shape[1:] != second[0].shape[1:] or first[1].shape[0] != second[1].shape[0]:
            raise AdapterError(f"{module} has another size in the other adapter")
        dot, own, other = inner(first, second), inner(first, first), inner(second, second)
        cosines[module] = dot / math.sqrt(own * other) if own > 0 and other > 0 else 0.0
        dots, left_squares, right_squares = dots + dot, left_squares + own, right_squares + other
    whole = dots / math.sqrt(left_squares * right_squares) if left_squares > 0 and right_squares > 0 else 0.0
    return Comparison(cosines, sorted(set(left.ranks) - set(right.ranks)), sorted(set(right.ranks) - set(left.ranks)), whole, (norm(left), norm(right)))


def inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """<B1 A1, B2 A2>, the sum over entries, in float64."""
    left = first[1].double().flatten(1).T @ second[1].double().flatten(1)
    right = first[0].double().flatten(1) @ second[0].double().flatten(1).T
    return float((left * right).sum())


def norm(adapter: AdapterFile) -> float:
    """Frobenius norm of all delta W together."""
    adapter = joined(adapter)
    return math.sqrt(sum(max(0.0, inner(adapter.pair(module), adapter.pair(module))) for module in adapter.modules))

"""From any recognised layout to canonical tensors. Every module's delta W is compared with its source before it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.adapters import factors, lycoris
from finetune.adapters.forms import A_SUFFIX, B_SUFFIX, LORA, MAGNITUDE_SUFFIX, OFT, check_parts, form_of, rank_of
from finetune.adapters.foreign_scales import ForeignSettings, alpha_value, checked_scale
from finetune.adapters.keys import EQUAL, INPUT, KeyMap, Place, Rule, rename
from finetune.adapters.layouts import TRANSFORMER, Detection
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.adapters.tensor_files import Entry

# Relative error of delta W that a conversion may show: float32 rounding of one product.
EXACT = 2e-6
LORA_ROLES = {"A", "B", "alpha", "mid", "magnitude", "bias"}


@dataclass
class Conversion:
    """What is being built. parts: pipeline part -> canonical tensors.  notes: what the user should know.
    kohya_blocks: fused modules that were trained apart.  scales: canonical module -> alpha / rank, where it is not 1."""

    where: str
    read: Callable[[str], Tensor]
    entries: Mapping[str, Entry]
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kohya_blocks: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, module: str, suffix: str, tensor: Tensor) -> None:
        """Take one canonical tensor; AdapterError when the file has said something else of it already."""
        tensors = self.parts.setdefault(part, {})
        if module + suffix in tensors and not tensors[module + suffix].equal(tensor):
            raise AdapterError(f"{module} comes twice in the file, in two forms that disagree", where=self.where)
        tensors[module + suffix] = tensor


@dataclass(frozen=True)
class SourcePair:
    """One module of the file as a plain pair: delta W = scale * B @ A, before anything is split."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None


def to_canonical(detection: Detection, entries: Mapping[str, Entry], read: Callable[[str], Tensor], settings: Mapping[str, ForeignSettings],
                 key_map: KeyMap | None, where: str, split_qkv_as_trained: bool = False) -> Conversion:
    """Convert every module of a recognised file. read: gives a tensor by key.  settings: of each part of the pipeline.

    Raises AdapterError that names the first module which cannot be converted exactly.
    """
    work = Conversion(where, read, entries, notes=[note for said in settings.values() for note in said.notes])
    for (part, stem), roles in detection.groups.items():
        place = detection.places[part, stem] or Place(rename(stem, stem), ())
        modules = place.modules if detection.places[part, stem] else (stem,)
        source = _source_pair(work, stem, roles, settings[part], modules[0])
        if source is None:
            continue
        reason = key_map.why_unusable(modules[0]) if key_map and part == TRANSFORMER else None
        if reason and source.b.any():
            raise AdapterError(f"{stem}: {reason}", where=where)
        if reason:
            work.notes.append(f"{stem} was left out: {reason}, and its lora_B is zero")
            continue
        _place(work, part, stem, source, place.rule, modules, split_qkv_as_trained)
    return work


def own_form(detection: Detection, entries: Mapping[str, Entry], read: Callable[[str], Tensor], settings: Mapping[str, ForeignSettings],
             where: str) -> Conversion | None:
    """The tensors of a LoHa, LoKr or OFT of peft's usual build as they are, only the scale folded in; None for everything
    else, which becomes LoRA pairs. AdapterError for an OFT of another build, which has no such pairs."""
    if detection.layout != "peft" or {part for part, _ in detection.groups} != {TRANSFORMER}:
        return None
    work, said = Conversion(where, read, entries, notes=list(settings[TRANSFORMER].notes)), settings[TRANSFORMER]
    for (part, stem), roles in detection.groups.items():
        suffixes = {".oft_R.weight" if role == "oft_R" else f".{role}": key for role, key in roles.items()}
        form = form_of(suffixes)
        if form is OFT and said.variant:
            raise AdapterError(f"an OFT adapter with {said.variant} in its settings", where=where, fix="only peft's usual build is read; bake it with the tool that made it")
        place = detection.places[part, stem]
        if form is LORA or not suffixes.keys() <= set(form.suffixes) or said.variant or (place and place.modules != (stem,)):
            return None
        for key in roles.values():
            _check_entry(work, key)
        tensors = {suffix: read(key) for suffix, key in suffixes.items()}
        check_parts(form, stem, tensors, where)
        scale = said.scale(stem, rank_of(form, tensors), where) if form.scaled and not _full(tensors) else _said_scale(said, stem, where) if form.scaled else 1.0
        for suffix, tensor in tensors.items():
            work.add(part, stem, suffix, factors.fold(tensor, scale) if suffix == form.scaled else tensor)
        if scale != 1.0:
            work.scales[stem] = scale
    return work


def _full(tensors: Mapping[str, Tensor]) -> bool:
    """Whether both factors of a LoKr are whole, so that they do not tell the rank."""
    return ".lokr_w2" in tensors


def _said_scale(settings: ForeignSettings, module: str, where: str) -> float:
    """alpha / rank as the settings alone have it."""
    return settings.scale(module, settings.said_rank(module) or 1, where)


def _source_pair(work: Conversion, stem: str, roles: Mapping[str, str], settings: ForeignSettings, module: str) -> SourcePair | None:
    """One module's tensors as a plain pair; None when it holds nothing but zeros that change nothing."""
    if "bias" in roles:
        if work.read(roles["bias"]).any():
            raise AdapterError(f"{roles['bias']}: a LoRA with a bias, which most readers drop", where=work.where, fix="retrain without lora_bias")
        work.notes.append(f"{roles['bias']} is zero and was left out")
        if set(roles) == {"bias"}:
            return None
    for role, key in roles.items():
        if role != "alpha":
            _check_entry(work, key)
    alpha = alpha_value(work.entries[roles["alpha"]].shape, lambda: work.read(roles["alpha"]), stem, work.where) if "alpha" in roles else None
    if set(roles) <= {"alpha"}:
        raise AdapterError(f"{stem}: an alpha without its LoRA", where=work.where)
    if alpha is not None:
        checked_scale(alpha, max(alpha, 1.0), stem, work.where)
    magnitude = _magnitude(work, roles, stem)
    foreign = {role: key for role, key in roles.items() if role not in LORA_ROLES}
    if "oft_R" in foreign:
        raise AdapterError(f"{stem}: an OFT outside of a PEFT folder with the model's own layer names, which needs the base weights", where=work.where,
                           fix="bake it with the tool that made it")
    if foreign:
        tensors = {role: _matrix(work, key) for role, key in foreign.items()}
        build = lycoris.lokr_pair if any(role.startswith("lokr") for role in foreign) else lycoris.loha_pair
        a, b, scale = build(tensors, alpha, stem, work.where)
        if alpha is None and settings.alpha is not None:
            scale = _said_scale(settings, stem, work.where)
        work.notes.append(f"{stem}: {'LoKr' if build is lycoris.lokr_pair else 'LoHa'} written out as LoRA, rank {a.shape[0]}")
        return SourcePair(a, b, scale, magnitude)
    for role in ("A", "B"):
        if role not in roles:
            raise AdapterError(f"{stem}: lora_{role} is missing", where=work.where, fix="the file is incomplete")
    a, b = _matrix(work, roles["A"]), _matrix(work, roles["B"])
    if "mid" in roles:
        a, b = lycoris.tucker_pair(a, _matrix(work, roles["mid"]), b, stem, work.where)
    if a.ndim == b.ndim == 4 and tuple(a.shape[2:]) == tuple(b.shape[2:]) == (1, 1) and not _is_convolution(module):
        a, b = a.flatten(1), b.flatten(1)
    if a.ndim != b.ndim or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
        raise AdapterError(f"{stem}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not belong together", where=work.where,
                           fix="A is (rank, inputs), B is (outputs, rank)")
    scale = checked_scale(alpha, a.shape[0], stem, work.where) if alpha is not None else settings.scale(stem, a.shape[0], work.where)
    return SourcePair(a, b, scale, magnitude)


def _is_convolution(module: str) -> bool:
    """Layers that are 1x1 convolutions in every model say so in their names; kohya also stores linears as 1x1."""
    return "conv" in module.rpartition(".")[2] or module.endswith((".proj",)) and "embed" in module


def _check_entry(work: Conversion, key: str) -> None:
    entry = work.entries[key]
    if entry.dtype not in ("F16", "BF16", "F32", "F64"):
        raise AdapterError(f"{key} holds {entry.dtype}; an adapter holds 16- or 32-bit floats", where=work.where)


def _matrix(work: Conversion, key: str) -> Tensor:
    import torch

    tensor = work.read(key)
    if tensor.ndim not in (2, 4):
        raise AdapterError(f"{key} has {tensor.ndim} axes; a linear layer's has 2, a convolution's 4", where=work.where)
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{key} contains NaN or infinity", where=work.where, fix="the training that made it blew up")
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _magnitude(work: Conversion, roles: Mapping[str, str], stem: str) -> Tensor | None:
    """DoRA magnitudes as (out,) from (out,) or (out, 1, ...). The older (1, in) form has no counterpart."""
    if "magnitude" not in roles:
        return None
    tensor = work.read(roles["magnitude"])
    if tensor.ndim > 1 and (tensor.shape[0] == 1 or tensor.numel() != tensor.shape[0]):
        raise AdapterError(f"{stem}: DoRA magnitudes per input column {list(tensor.shape)}", where=work.where,
                           fix="bake the adapter with the tool that made it; readers of today take one magnitude an output row")
    return tensor.reshape(-1).float()


def row_counts(rule: Rule, outputs: int, inputs: int) -> list[int] | None:
    """Rows of each part of a fused layer with this many outputs and inputs, or None when they do not come out even."""
    if len(rule.modules) == 1:
        return [outputs]
    if EQUAL in rule.rows:
        return [outputs // len(rule.rows)] * len(rule.rows) if outputs % len(rule.rows) == 0 else None
    left, shares = outputs - inputs * rule.rows.count(INPUT), len(rule.rows) - rule.rows.count(INPUT)
    if left < 0 or (shares and left % shares) or (shares and left == 0):
        return None
    return [inputs if row == INPUT else left // shares for row in rule.rows]


def _place(work: Conversion, part: str, stem: str, source: SourcePair, rule: Rule, modules: tuple[str, ...], as_trained: bool) -> None:
    rows = row_counts(rule, source.b.shape[0], source.a.shape[1])
    if rows is None:
        raise AdapterError(f"{stem}: {source.b.shape[0]} outputs cannot be split into {len(modules)} parts", where=work.where,
                           fix="the adapter was made for another model")
    b, magnitude = source.b, source.magnitude
    if rule.swap_halves and b.shape[0] == 2 * source.a.shape[1]:
        b = factors.swap_row_halves(b)
        magnitude = factors.swap_row_halves(magnitude) if magnitude is not None and len(magnitude) == len(b) else magnitude
    pieces = factors.split_rows(source.a, b, rows) if len(rows) > 1 else [(source.a, b)]
    scale = source.scale
    if len(rows) > 1 and _trained_apart(pieces, source.a.shape[0]):
        work.kohya_blocks.append(stem)
        scale *= len(rows) if as_trained else 1
    start = 0
    for module, piece, count in zip(modules, pieces, rows, strict=True):
        if piece is None and magnitude is not None:
            piece = source.a, b[start:start + count].clone()  # it adds nothing, and yet the magnitudes act
        if piece is not None:
            piece_a, piece_b = piece[0], factors.fold(piece[1], scale)
            if piece_a is not source.a or piece_b is not b:
                _check_same(work, stem, (source.a, b[start:start + count], scale), (piece_a, piece_b))
            if scale != 1.0:
                work.scales[module] = scale
            work.add(part, module, A_SUFFIX, piece_a)
            work.add(part, module, B_SUFFIX, piece_b)
            if magnitude is not None:
                work.add(part, module, MAGNITUDE_SUFFIX, magnitude[start:start + count].clone())
        start += count


def _trained_apart(pieces: list[tuple[Tensor, Tensor] | None], rank: int) -> bool:
    """Whether a fused module is kohya's block-diagonal joint: as many equal ranks as parts."""
    ranks = [piece[0].shape[0] for piece in pieces if piece is not None]
    return len(ranks) == len(pieces) and len(set(ranks)) == 1 and sum(ranks) == rank


def _check_same(work: Conversion, stem: str, source: tuple[Tensor, Tensor, float], result: tuple[Tensor, Tensor]) -> None:
    a, b, scale = source
    expected, found = factors.probe(a, b) * scale, factors.probe(*result)
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-300)) if expected.any() else float(found.norm())
    if not error <= EXACT:
        raise AdapterError(f"{stem}: the converted weights differ by {error:.1e}", where=work.where)

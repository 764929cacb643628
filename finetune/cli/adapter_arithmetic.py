"""The verbs of `brushwork adapter` that make new adapters or models out of given ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.errors import BadInput
from finetune.cli.output import Json, Quiet, emit, progress_for

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.adapters.arithmetic import Weighted

Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="The .safetensors file to write; must not exist.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Rank of the result.")]
Energy = Annotated[float | None, typer.Option("--energy", min=0, max=1, help="Keep as many ranks as hold this share of the squared singular values, such as 0.95.")]
FILE = typer.Argument(metavar="FILE", help="A .safetensors file, a PEFT folder, or a run folder.")


def add_verbs(group: typer.Typer) -> None:
    """Add them to the group."""
    for name, verb in (("merge", merge), ("bake", bake), ("extract", extract), ("resize", resize), ("rescale", rescale), ("subtract", subtract), ("compare", compare)):
        group.command(name)(verb)


def merge(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapters and their strengths, such as a.safetensors:0.8.")],
    out: Out,
    method: Annotated[str, typer.Option("--method", help="concat (exact, ranks add up to at most the layer's own), linear, svd, ties or dare.")] = "concat",
    rank: Rank = None,
    density: Annotated[float, typer.Option("--density", min=0, max=1, help="ties, dare: share of entries that stay.")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="dare: which entries stay.")] = 0,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Several adapters as one."""
    from finetune.adapters import arithmetic

    parts = [_weighted(each) for each in files]
    result = arithmetic.merge(parts, method, rank=rank, density=density, seed=seed, progress=progress_for(quiet))
    merged = _with_origin(result.adapter, f"merge {method}", [part.adapter for part in parts], [part.weight for part in parts])
    _write(out, merged, result.errors, result.notes, json)


def bake(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapters and their strengths.")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="`mini`, a folder in diffusers layout, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The pipeline folder to write; must not exist.")],
    json: Json = False, quiet: Quiet = False,
) -> None:
    """A pipeline folder with adapters written into its weights; stock diffusers opens it."""
    from finetune.families.baking import bake_into

    parts = [_weighted(each) for each in files]
    changed, licence = bake_into(base, out, parts, progress_for(quiet))
    notes = ["the thinking tokens of the adapter are not in the baked model, so its pictures differ"] if any(part.adapter.provenance.get("thinking_tokens") for part in parts) else []
    emit({"path": out, "changed_layers": changed, "licence": licence.identifier, "notes": notes}, [f"{out}  ({changed} layers changed)", *(f"note: {note}" for note in notes)], json=json)


def extract(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model before: `mini`, a folder, a .safetensors file or a Hub id.")],
    tuned: Annotated[Path, typer.Option("--tuned", metavar="PATH", help="The model after: a pipeline folder, its transformer folder, or a .safetensors file.")],
    out: Out,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Largest rank.")] = 32,
    energy: Energy = None,
    targets: Annotated[str, typer.Option("--targets", help="Expression over the names of the layers to take.")] = ".*",
    json: Json = False, quiet: Quiet = False,
) -> None:
    """A LoRA of what changed between a base and a fine-tuned checkpoint."""
    from finetune.adapters.extraction import extract as extract_adapter
    from finetune.families.base_models import locate_base

    _must_be_free(out)
    before = base if base.endswith(".safetensors") else locate_base(base, None, ("transformer",)).folder
    found = extract_adapter(before, tuned, rank=rank, energy=energy, targets=targets, progress=progress_for(quiet))
    notes = [f"{len(found.carried_not)} changed tensors cannot be carried by a LoRA or were not asked for: {', '.join(sorted(found.carried_not)[:5])}"] if found.carried_not else []
    adapter = found.adapter.with_provenance(operation="extract", base_model=None if base.endswith(".safetensors") else base)
    _write(out, adapter, found.errors, notes, json, unchanged=len(found.unchanged), carried_not=found.carried_not)


def resize(file: Annotated[Path, FILE], out: Out, rank: Rank = None, energy: Energy = None, json: Json = False, quiet: Quiet = False) -> None:
    """The same adapter at a smaller rank, by a number or by the energy that must stay."""
    from finetune.adapters import arithmetic

    adapter = _read(file)
    result = arithmetic.resize(adapter, rank=rank, energy=energy, progress=progress_for(quiet))
    _write(out, _with_origin(result.adapter, "resize", [adapter]), result.errors, result.notes, json)


def rescale(file: Annotated[Path, FILE], out: Out, factor: Annotated[float, typer.Option("--factor", help="Strength times this; not 0.")], json: Json = False, quiet: Quiet = False) -> None:
    """The same adapter, stronger or weaker."""
    from finetune.adapters import arithmetic

    adapter = _read(file)
    _write(out, _with_origin(arithmetic.rescale(adapter, factor), "rescale", [adapter], [factor]), {}, [], json)


def subtract(
    left: Annotated[Path, FILE], right: Annotated[Path, typer.Argument(metavar="OTHER", help="What is taken away.")], out: Out,
    weight: Annotated[float, typer.Option("--weight", help="How much of OTHER is taken away.")] = 1.0, json: Json = False, quiet: Quiet = False,
) -> None:
    """FILE without OTHER; exact, ranks add up."""
    from finetune.adapters import arithmetic

    first, second = _read(left), _read(right)
    result = arithmetic.subtract(first, second, weight)
    _write(out, _with_origin(result.adapter, "subtract", [first, second], [1.0, -weight]), result.errors, result.notes, json)


def compare(left: Annotated[Path, FILE], right: Annotated[Path, typer.Argument(metavar="OTHER", help="Another adapter.")], json: Json = False, quiet: Quiet = False) -> None:
    """How alike two adapters are: the cosine of their weight changes, module by module."""
    from finetune.adapters import arithmetic

    found = arithmetic.compare(_read(left), _read(right))
    data = {"cosine": found.cosine, "norms": list(found.norms), "modules": found.modules, "left_only": found.left_only, "right_only": found.right_only}
    rows = sorted(found.modules.items(), key=lambda row: row[1])
    width = max((len(name) for name in found.modules), default=0)
    emit(data, [
        f"cosine of all shared modules {found.cosine:.4f}; norms {found.norms[0]:.4g} and {found.norms[1]:.4g}",
        f"{len(found.modules)} shared, {len(found.left_only)} only in {left.name}, {len(found.right_only)} only in {right.name}",
        *(f"{name:<{width}}  {cosine:+.4f}" for name, cosine in rows),
    ], json=json)


def _read(path: Path) -> AdapterFile:
    from finetune.adapters.adapter_file import read_adapter
    from finetune.families.key_layouts import KEY_MAPS

    return read_adapter(path, KEY_MAPS)


def _weighted(text: str) -> Weighted:
    """`FILE` or `FILE:WEIGHT`. A colon inside the path is no weight when the whole text is a file."""
    from finetune.adapters.arithmetic import Weighted

    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Weighted(_read(Path(text)), 1.0)
    try:
        return Weighted(_read(Path(path)), float(weight))
    except ValueError:
        raise BadInput(f"{weight!r} is not a strength", where=text, fix="write FILE or FILE:0.8") from None


def _with_origin(adapter: AdapterFile, operation: str, sources: list[AdapterFile], weights: list[float] | None = None) -> AdapterFile:
    """What a computed adapter says of itself: the operation, and the facts on which all sources agree."""
    facts: dict[str, Any] = {"operation": operation}
    for key in ("base_model", "base_revision", "family", "licence"):
        values = [source.provenance.get(key) for source in sources]
        if values[0] is not None and all(value == values[0] for value in values):
            facts[key] = values[0]
    if any(source.provenance.get("thinking_tokens") for source in sources):
        facts["without"] = "thinking tokens"
    triggers = [source.provenance["trigger"] for source in sources if source.provenance.get("trigger")]
    if triggers:
        facts["trigger"] = ", ".join(dict.fromkeys(map(str, triggers)))
    if weights:
        facts["weights"] = weights
    return adapter.with_provenance(**facts)


def _must_be_free(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise BadInput("the result is a file whose name ends in .safetensors", where=f"--out {out}")
    if out.exists():
        raise BadInput("exists already", where=f"--out {out}", fix="choose another name")


def _write(out: Path, adapter: AdapterFile, errors: dict[str, float], notes: list[str], json: bool, **more: Any) -> None:
    from finetune.adapters.adapter_file import read_adapter, write_adapter
    from finetune.adapters.text_encoders import joined
    from finetune.adapters.verify import same_tensors

    _must_be_free(out)
    write_adapter(out, adapter)
    same_tensors(read_adapter(out), adapter, str(out))
    if adapter.provenance.get("without"):
        notes = [*notes, f"the {adapter.provenance['without']} of the sources are not in the result"]
    ranks, encoders = joined(adapter).ranks.values(), {slot: len(adapter.part(slot).modules) for slot in sorted(adapter.text_encoders)}
    worst = max(errors, key=errors.__getitem__) if errors else None
    cost = f"largest relative error {errors[worst]:.4f} ({worst})" if worst else "exact"
    data = {"path": out, "modules": len(adapter.ranks), "text_encoders": encoders, "rank_largest": max(ranks), "rank_smallest": min(ranks), "errors": errors, "notes": notes, **more}
    counts = ", ".join([f"{len(adapter.ranks)} modules", *(f"{count} of {slot}" for slot, count in encoders.items())])
    emit(data, [f"{out}  ({counts}, rank {min(ranks)} to {max(ranks)})", cost, *(f"note: {note}" for note in notes)], json=json)

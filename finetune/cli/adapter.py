"""`brushwork adapter inspect|verify|convert|merge|bake|extract|resize|rescale|subtract|compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.errors import BadInput
from finetune.cli import adapter_arithmetic
from finetune.cli.output import Json, Quiet, command_group, emit, progress_for

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel

File = Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file, a PEFT folder, or a run folder.")]
Family = Annotated[str | None, typer.Option("--family", metavar="NAME", help="The model family, where keys and shapes leave a doubt.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = command_group("Adapter files: look into them, prove them, convert them, do arithmetic on them.")
    group.command("inspect")(inspect)
    group.command("verify")(verify)
    group.command("convert")(convert)
    adapter_arithmetic.add_verbs(group)
    app.add_typer(group, name="adapter")


def inspect(
    file: File, family: Family = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module, not only the conspicuous ones.")] = False,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """What a file is: family, layout, ranks, strengths, norms, dead and exploding modules, where it comes from."""
    from finetune.adapters.inspection import inspect_adapter
    from finetune.families.key_layouts import KEY_MAPS

    found = inspect_adapter(file, KEY_MAPS, family)
    emit(found, _inspection_lines(found, modules), json=json)


def _inspection_lines(found: dict[str, Any], every_module: bool) -> list[str]:
    family = found["family"] or "not recognised"
    if found["may_also_be"]:
        family += f" (or {', '.join(found['may_also_be'])}: their layers have the same names and sizes)"
    rows = found["modules"] if every_module else [row for row in found["modules"] if row["state"] != "ok"]
    lines = [
        f"file       {found['path']}  ({found['bytes'] / 2**20:.2f} MiB, {found['tensors']} tensors, {', '.join(found['dtypes'])})",
        f"family     {family}",
        f"layout     {found['layout']}, {'DoRA' if found['dora'] else found['form']}",
        f"modules    {len(found['modules'])}" + (f", rank {', '.join(f'{rank} ({count}x)' for rank, count in sorted(found['ranks'].items()))}, norm of all {found['norm']:.4g}" if found["modules"] else ""),
        f"conspicuous  {len(found['dead'])} dead, {len(found['exploding'])} exploding",
        *(f"trains too {name} ({count} modules)" for name, count in found["text_encoders"].items()),
        f"trigger    {found['trigger'] or '-'}",
        f"licence    {found['licence'] or '-'}",
        *(f"{key:<16} {value}" for key, value in found["provenance"].items() if key not in ("trigger", "licence")),
        *(f"note: {note}" for note in found["notes"]),
    ]
    if rows:
        width = max(len(row["name"]) for row in rows)
        lines += [f"{'module':<{width}}  rank  alpha      norm  state"]
        lines += [f"{row['name']:<{width}}  {row['rank']:>4}  {row['alpha']:>5g}  {row['norm']:>8.4g}  {row['state']}" for row in rows]
    return lines


def verify(
    file: File, base: Annotated[str, typer.Option("--base", metavar="MODEL", help="`mini`, a folder in diffusers layout, or a Hub id.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of the base on the Hub.")] = None,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Prove a file on its base: every key placed, the output changes, baking equals attaching, the base comes back exactly."""
    from finetune.adapters.adapter_file import read_adapter
    from finetune.cli.adapter_probe import prove
    from finetune.families.key_layouts import KEY_MAPS

    adapter = read_adapter(file, KEY_MAPS)
    result = prove(adapter, file, base, revision, progress_for(quiet))
    lines = [
        f"{result.placed}/{result.keys} tensors placed",
        f"the output changes by {result.change:.2%}",
        "baking was not tried: the base is quantised" if result.bake_error is None else f"baked equals attached (relative difference {result.bake_error:.1e})",
        "the base came back bit for bit",
    ]
    tokens = (adapter.provenance.get("thinking_tokens") or {}).get("count", 0)
    if tokens:
        lines.insert(1, f"its {tokens} thinking tokens are the ones it was trained with, and in use")
    emit({**result.as_json(), "thinking_tokens": tokens}, lines, json=json)


def convert(
    file: File,
    to: Annotated[str, typer.Option("--to", metavar="LAYOUT", help="diffusers, peft, kohya, comfy, onetrainer, lycoris or tencent.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="PATH", help="File or folder to write; left out: beside FILE.")] = None,
    family: Family = None,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="The base, where fused layers are adapted in part and sizes are not the usual ones.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Cut fused modules to this rank, or write a LoHa or LoKr out as a LoRA of it; left out: exact, and ranks may grow.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; left out: as it is.")] = None,
    kohya_split_qkv: Annotated[str, typer.Option("--kohya-split-qkv", help="as-read: the strength every reader gives such files; trained: the strength they were trained at.")] = "as-read",
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Write a file in the layout of another tool. The result is read back and compared before it counts."""
    from finetune.adapters.adapter_file import read_adapter, to_dtype
    from finetune.adapters.arithmetic import CUT_DORA
    from finetune.adapters.exporting import default_name, export
    from finetune.families.key_layouts import KEY_MAPS

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise BadInput(f"{dtype} is no dtype of an adapter", where="--dtype", fix="float32, bfloat16 or float16")
    if kohya_split_qkv not in ("as-read", "trained"):
        raise BadInput(f"{kohya_split_qkv} is not a choice", where="--kohya-split-qkv", fix="as-read or trained")
    located = _family_and_shapes(base) if base else (None, None)
    name = family or located[0]
    adapter = read_adapter(file, KEY_MAPS, family=name, split_qkv_as_trained=kohya_split_qkv == "trained")
    if to in ("kohya", "comfy", "tencent") and name is None:
        _without_doubt(file)
    adapter = to_dtype(adapter, dtype) if dtype else adapter
    path = out or file.with_name(default_name(to, file.name.removesuffix(".safetensors")))
    if path.resolve() == file.resolve():
        raise BadInput("the result would overwrite the file", where=str(path), fix="name another place with --out")
    result = export(adapter, to, path, KEY_MAPS.get(adapter.family or ""), rank=rank, shapes=located[1])
    notes = list(adapter.notes)
    if adapter.provenance.get("thinking_tokens"):
        notes.append("the adapter was trained with thinking tokens; copy thinking_tokens.safetensors beside the new file")
    if result.errors and adapter.uses_dora:
        notes.append(CUT_DORA)
    data = {
        "path": result.path, "from": adapter.layout, "to": to, "family": adapter.family, "tensors": result.keys,
        "rank_growth": {module: list(ranks) for module, ranks in result.rank_growth.items()}, "errors": result.errors, "notes": notes,
    }
    emit(data, [str(path), *_cost_lines(result.rank_growth, result.errors), *(f"note: {note}" for note in notes)], json=json)


def _cost_lines(growth: dict[str, tuple[int, int]], errors: dict[str, float]) -> list[str]:
    if errors:
        worst = max(errors, key=errors.__getitem__)
        return [f"{len(errors)} modules were cut to the rank; largest relative error {errors[worst]:.3f} ({worst})"]
    if growth:
        before, after = max(growth.values(), key=lambda ranks: ranks[1])
        return [f"exact; {len(growth)} fused modules need a larger rank (up to {before} -> {after}); --rank makes them smaller at a stated error"]
    return ["exact, at the same ranks"]


def _without_doubt(file: Path) -> None:
    """Raise BadInput when a file fits several families, whose names in the wanted layout differ."""
    from finetune.adapters.strict_reading import locate, recognise
    from finetune.adapters.tensor_files import TensorFile
    from finetune.families.key_layouts import KEY_MAPS

    path = locate(file)
    with TensorFile(path) as opened:
        found = recognise(path, opened.header, KEY_MAPS)
    if found.alternatives:
        raise BadInput(f"the file fits {', '.join((found.family or '', *found.alternatives))}", where=str(file), fix="say which with --family")


def _family_and_shapes(base: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    from finetune.adapters.base_weights import BaseWeights
    from finetune.families.base_models import locate_base
    from finetune.families.key_layouts import key_map_of

    found: BaseModel = locate_base(base, None, ("transformer",))
    key_map = key_map_of(found.family.facts.name)
    if key_map is None:
        raise BadInput(f"there is no name table for {found.family.facts.name}", where="--base")
    with BaseWeights(found.folder) as weights:
        return key_map.family, weights.layer_shapes

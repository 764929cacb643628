"""`brushwork data scan|caption|buckets|duplicates|convert|report`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli import data_captions
from finetune.cli.data_arguments import Fresh, ImageRoot, Layout, Source, Workers, limits_of, print_scan, scanned, source_folder
from finetune.cli.output import Json, Quiet, command_group, emit, progress_for

if TYPE_CHECKING:
    from data_tools.bucket_report import BucketReport
    from data_tools.duplicates import DuplicateReport

Base = Annotated[str | None, typer.Option("--base", help="Base model whose sizes and text encoders count: mini, a folder, or a Hub id.")]
Resolution = Annotated[int | None, typer.Option("--resolution", min=16, max=8192, help="Edge of the square with as many pixels as a training picture. Default: the base's own.")]
Most = Annotated[int, typer.Option("--buckets", min=1, max=256, help="Buckets at most.")]
Upscale = Annotated[bool, typer.Option("--upscale", help="Small pictures may be enlarged; without it they get a smaller bucket.")]
Fit = Annotated[str, typer.Option("--fit", help="crop: cover the bucket and cut the rest off. pad: show all, with a border.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, max=4096, help="Pictures a step: fewer buckets for few pictures, so that batches fill. None is dropped.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = command_group("Pictures: check, caption, choose training sizes, find duplicates, convert, report.")
    group.command("scan")(scan)
    group.command("caption")(data_captions.caption)
    group.command("buckets")(buckets)
    group.command("duplicates")(duplicates)
    group.command("convert")(convert)
    group.command("report")(report)
    app.add_typer(group, name="data")


def scan(
    source: Source,
    quarantine: Annotated[Path | None, typer.Option("--quarantine", help="Move what is left out to this folder, with its caption files. Never deleted; --bring-back undoes it.")] = None,
    bring_back: Annotated[Path | None, typer.Option("--bring-back", help="Move everything in this quarantine back to where it was.")] = None,
    layout: Layout = "auto", image_root: ImageRoot = None, workers: Workers = None, fresh: Fresh = False,
    max_seconds: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds that decoding one picture may take.")] = 30.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Width x height a picture may have.")] = 200_000_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes a file may have.")] = 512 * 2**20,
    min_side: Annotated[int, typer.Option(min=1, help="Pixels that the shorter side must have.")] = 8,
    json: Json = False, quiet: Quiet = False,
) -> None:
    """Open every picture and list what cannot be used, with the reason."""
    from data_tools.quarantine import move_aside
    from data_tools.quarantine import bring_back as restore
    from data_tools.records import shown_name

    restored = restore(bring_back) if bring_back else []
    limits = limits_of(seconds=max_seconds, pixels=max_pixels, file_bytes=max_bytes, min_side=min_side)
    found = scanned(source, layout, image_root, workers, fresh, progress_for(quiet), limits)
    moved = move_aside(found.left_out, source_folder(source), quarantine) if quarantine else []
    data, lines = print_scan(found, source, notes_said=not quiet)
    data |= {"moved": [{"from": str(a), "to": str(b)} for a, b in moved], "restored": [str(path) for path in restored]}
    lines += [f"moved {len(moved)} of them to {shown_name(quarantine)}"] if quarantine else []
    lines += [f"brought {len(restored)} files back"] if bring_back else []
    emit(data, lines, json=json)


def buckets(
    source: Source, base: Base = None,
    resolution: Annotated[list[int] | None, typer.Option("--resolution", min=16, max=8192, help="Edge of the square with as many pixels as a training picture; given several times, as a recipe with a list of resolutions. Default: the base's own.")] = None,
    most: Most = 8, upscale: Upscale = False, fit: Fit = "crop", batch_size: BatchSize = 1,
    multiple: Annotated[int | None, typer.Option("--multiple", min=1, max=512, help="Sides are multiples of this many pixels. Default: the base's own.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Write a chart of pictures and buckets here (.svg).")] = None,
    layout: Layout = "auto", image_root: ImageRoot = None, workers: Workers = None, fresh: Fresh = False, json: Json = False, quiet: Quiet = False,
) -> None:
    """The training sizes that lose the fewest pixels of these pictures, beside the usual fixed lists."""
    from data_tools.bucket_report import table
    from data_tools.errors import BadInput
    from data_tools.scan import require_usable
    from finetune.cli.data_base import training_sizes

    if chart and chart.suffix.lower() != ".svg":
        raise BadInput("a chart is an .svg file", where=f"--chart {chart}", fix="name it so")
    _check_fit(fit)
    training_sizes(base, None)
    progress = progress_for(quiet)
    found = scanned(source, layout, image_root, workers, fresh, progress)
    require_usable(found, source)
    results = list(_at_each_resolution(found.records, base, resolution, multiple, most, upscale, fit, batch_size))
    rows = [(row, result.resolution) for result, _ in results for row in result.rows]
    if chart:
        from data_tools.atomic_files import write_text
        from data_tools.charts import stand_alone_chart

        write_text(chart, stand_alone_chart([r.size for r in found.records], [(row.bucket.height, row.bucket.width) for row, _ in rows]))
    data = {
        "buckets": [{"width": row.bucket.width, "height": row.bucket.height, "pictures": row.pictures, "lost_pixels": row.lost_pixels, "mean_lost": row.lost, "worst_lost": row.worst_lost, "worst": row.worst.path, "padded": row.padded, "resolution": edge} for row, edge in rows],
        "resolution": results[0][0].resolution, "multiple": results[0][0].multiple, "optimal": all(result.optimal for result, _ in results), "pictures": len(found.records), "left_out": len(found.left_out), "chart": chart,
        "compared": [{"list": c.name, "buckets": c.buckets, "used": c.used, "mean_lost": c.mean, "high_lost": c.high, "padded": c.padded, "mean_size": c.size, "resolution": result.resolution} for result, _ in results for c in result.compared],
    }
    emit(data, [line for result, said in results for line in [said, *table(result), ""]][:-1] + ([f"{len(found.left_out)} pictures cannot be used; `brushwork data scan` lists them"] if found.left_out else []), json=json)


def _at_each_resolution(records, base: str | None, resolutions: list[int] | None, multiple: int | None, most: int, upscale: bool, fit: str,
                        batch_size: int) -> Iterator[tuple[BucketReport, str]]:
    """The largest first; of several, the smallest for all pictures and a larger one for those that fill it (all, with --upscale)."""
    from data_tools.resolutions import fills
    from finetune.cli.data_base import training_sizes

    for edge in sorted(set(resolutions), reverse=True) if resolutions else [None]:
        takes_all = upscale or edge is None or edge == min(resolutions)
        step = multiple or training_sizes(base, edge).multiple
        inside = [record for record in records if takes_all or fills(record.size, edge, step)]
        if inside:
            result, said = _buckets(inside, base, edge, multiple, most, upscale, fit, batch_size)
            yield result, said if len(inside) == len(records) else f"{said}; {len(inside)} of {len(records)} pictures are large enough"


def _buckets(records, base: str | None, resolution: int | None, multiple: int | None, most: int, upscale: bool, fit: str, batch_size: int) -> tuple[BucketReport, str]:
    from data_tools.bucket_report import report_buckets
    from data_tools.errors import BadInput
    from finetune.cli.data_base import training_sizes

    sizes = training_sizes(base, resolution)
    multiple = multiple or sizes.multiple
    if sizes.resolution < multiple:
        raise BadInput(f"a resolution of {sizes.resolution} is under the multiple of {multiple}", fix="choose a larger --resolution")
    return report_buckets(records, resolution=sizes.resolution, multiple=multiple, most=most, upscale=upscale, fit=fit, batch_size=batch_size, longest=sizes.longest), sizes.said


def _check_fit(fit: str) -> None:
    from data_tools.errors import BadInput

    if fit not in ("crop", "pad"):
        raise BadInput(f"--fit is {fit!r}", fix="crop or pad")


def duplicates(
    source: Source,
    against: Annotated[list[str] | None, typer.Option("--against", help="A held-out set; pictures of FOLDER that it shows too are named. Can be given several times.")] = None,
    distance: Annotated[int, typer.Option("--distance", min=0, max=16, help="Bits of 64 in which the perceptual hashes of two pictures may differ.")] = 8,
    mirrored: Annotated[bool, typer.Option("--mirrored", help="Find left-right mirrored copies too.")] = False,
    embeddings: Annotated[str | None, typer.Option("--embeddings", help="Also compare by a vision model (CLIP, SigLIP, DINOv2): a folder or Hub id.")] = None,
    likeness: Annotated[float, typer.Option("--likeness", min=0.5, max=1.0, help="Cosine from which two embeddings are duplicates.")] = 0.95,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="Write the groups as a contact sheet here (.png or .jpg).")] = None,
    move_to: Annotated[Path | None, typer.Option("--move-to", help="Move all but the best of each group to this folder; `data scan --bring-back` undoes it.")] = None,
    layout: Layout = "auto", image_root: ImageRoot = None, workers: Workers = None, fresh: Fresh = False, json: Json = False, quiet: Quiet = False,
) -> None:
    """Pictures that are the same or nearly so, and held-out ones that training has seen."""
    from dataclasses import replace

    from data_tools.contact_sheets import check_sheet_name, write_sheet
    from data_tools.duplicates import find_duplicates
    from data_tools.picture_folder_guard import require_outside
    from data_tools.quarantine import move_aside
    from data_tools.records import LeftOut

    if sheet:
        check_sheet_name(sheet)
        require_outside(sheet, Path(source), "the contact sheet")
    if embeddings:
        from data_tools.model_places import require_model

        require_model(embeddings, "give a folder or Hub identifier of a vision model", where=f"--embeddings {embeddings}")
    progress = progress_for(quiet)
    records = scanned(source, layout, image_root, workers, fresh, progress).records
    for other in against or ():
        records = records + [replace(record, split="held_out") for record in scanned(other, layout, image_root, workers, fresh, progress).records]
    pairs = None
    if embeddings:
        from data_tools.captioners.embeddings import pairs_by_embedding

        pairs = pairs_by_embedding([record.path for record in records], embeddings, likeness, progress)
    result = find_duplicates(records, distance=distance, mirrored=mirrored, pairs=pairs, workers=workers, progress=progress, use_cache=not fresh)
    if sheet:
        write_sheet(sheet, [[member.path for member in group.members] for group in result.groups], progress)
    surplus = [LeftOut(record.path, "a duplicate", "duplicate") for record in result.surplus if record.split != "held_out"]
    moved = move_aside(surplus, source_folder(source), move_to) if move_to else []
    data = {
        "compared": result.compared, "groups": [{"kind": g.kind, "distance": g.distance, "leaks": g.leaks, "keep": g.keep.path, "pictures": [m.path for m in g.members]} for g in result.groups],
        "copies": len(result.surplus), "leaks": len(result.leaks), "flat": [r.path for r in result.flat], "left_out": [{"path": i.path, "reason": i.reason} for i in result.left_out],
        "sheet": sheet, "moved": [{"from": a, "to": b} for a, b in moved],
    }
    emit(data, _duplicate_lines(result, len(moved), move_to), json=json)


def _duplicate_lines(result: DuplicateReport, moved: int, move_to: Path | None) -> list[str]:
    from data_tools.records import shown_name

    lines = []
    for group in result.groups:
        leak = "  TRAINING AND HELD-OUT" if group.leaks else ""
        lines.append(f"{group.kind}, {group.distance} of 64 bits differ{leak}")
        lines += [f"  {'keep' if i == 0 else '    '}  {shown_name(m.path)}  {m.width}x{m.height}{'  (held out)' if m.split == 'held_out' else ''}" for i, m in enumerate(group.members)]
    lines.append(f"{len(result.groups)} groups of duplicates, {len(result.surplus)} copies; {len(result.leaks)} groups join training with held-out pictures")
    lines += [f"{len(result.flat)} pictures of one flat colour were compared by their bytes only"] if result.flat else []
    lines += [f"moved {moved} copies to {shown_name(move_to)}"] if move_to else []
    return lines


def convert(
    source: Source,
    to: Annotated[str, typer.Option("--to", help="sidecars, kohya, onetrainer, metadata, tencent-csv, tencent-arrow, webdataset, parquet or zip.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder to write into.")],
    layout: Layout = "auto", image_root: ImageRoot = None, workers: Workers = None, fresh: Fresh = False, json: Json = False, quiet: Quiet = False,
) -> None:
    """Write the usable pictures with their captions in the layout that another tool reads."""
    from data_tools.convert import check_layout
    from data_tools.convert import convert as write
    from data_tools.picture_folder_guard import require_outside
    from data_tools.records import shown_name
    from data_tools.scan import require_usable

    check_layout(to)
    require_outside(out, Path(source), "the converted set")
    progress = progress_for(quiet)
    found = scanned(source, layout, image_root, workers, fresh, progress)
    require_usable(found, source)
    result = write(found.records, out, to, progress=progress)
    data = {"layout": to, "out": result.folder, "open_at": result.open_at, "pictures": result.pictures, "lost": list(result.lost), "left_out": [{"path": i.path, "reason": i.reason} for i in found.left_out]}
    lines = [f"wrote {result.pictures} pictures as {to} to {shown_name(result.folder)}", *[f"lost: {text}" for text in result.lost]]
    lines += [f"left out: {shown_name(item.path)}: {item.reason}" for item in found.left_out]
    emit(data, lines, json=json)


def report(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; its facts go beside it as .json.")] = Path("dataset-report.html"),
    base: Base = None, resolution: Resolution = None, most: Most = 8, upscale: Upscale = False, fit: Fit = "crop", batch_size: BatchSize = 1,
    trigger: Annotated[str | None, typer.Option("--trigger", help="The words that will stand for the style; captions without them are counted.")] = None,
    layout: Layout = "auto", image_root: ImageRoot = None, workers: Workers = None, fresh: Fresh = False, json: Json = False, quiet: Quiet = False,
) -> None:
    """One HTML page about the set: pictures by bucket, sizes, captions, tokens, duplicates, what is left out and why."""
    from data_tools.caption_statistics import caption_statistics
    from data_tools.duplicates import find_duplicates
    from data_tools.records import shown_name
    from data_tools.report import SetFacts, problems, require_report_place, write_report
    from data_tools.token_counts import count_tokens
    from finetune.cli.data_base import text_limits

    require_report_place(out)
    _check_fit(fit)
    limits = text_limits(base)
    progress = progress_for(quiet)
    found = scanned(source, layout, image_root, workers, fresh, progress)
    chosen = _buckets(found.records, base, resolution, None, most, upscale, fit, batch_size)[0] if found.records else None
    captions = [record.caption for record in found.records if record.caption]
    copies = find_duplicates(found.records, mirrored=True, workers=workers, progress=progress, use_cache=not fresh)
    facts = SetFacts(source_folder(source), found, chosen, caption_statistics(found.records), copies, count_tokens(captions, limits), limits, trigger)
    write_report(facts, out, workers=workers, progress=progress, use_cache=not fresh)
    noted = problems(facts)
    data = {"report": out, "facts": out.with_suffix(".json"), "found": found.found, "usable": len(found.records), "left_out": len(found.left_out), "problems": noted}
    emit(data, [f"{p['level']:<8} {p['what']}" for p in noted] + [f"wrote {shown_name(out)}"], json=json)

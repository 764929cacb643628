"""One HTML page about a set of pictures, without outside links, and the same facts as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_tools import charts
from data_tools.atomic_files import write_text
from data_tools.bucket_report import MUCH_LOST, BucketReport, lost_share
from data_tools.buckets import Placement
from data_tools.cached_tasks import cached_results
from data_tools.caption_statistics import CaptionStatistics
from data_tools.duplicates import DuplicateReport
from data_tools.errors import DataError
from data_tools.images import EXTENSIONS
from data_tools.layouts.caption_files import THINKING_SUFFIX
from data_tools.layouts.loaded_datasets import DATASET_NAMES
from data_tools.progress import Progress
from data_tools.records import ImageRecord, best_caption, shown_name
from data_tools.scan import ScanReport
from data_tools.token_counts import TextLimit, TokenSummary, read_and_cut

SCHEMA = "dataset-report/1"
MOST_SHOWN = 500  # pictures on the contact sheets
MOST_GROUPS = 60  # groups of duplicates
MOST_LISTED = 1000  # rows of the list of what is left out; the JSON has all
LONGEST_SHOWN = 700  # characters of a caption on the page
# Controls and the marks that turn the direction of text round: shown as escapes, so that no name can disguise itself.
HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
TEMPLATES = Path(__file__).with_name("templates")


@dataclass
class SetFacts:
    """All that the page tells. tokens: summaries over the captioned pictures, with the limits they were counted by."""

    folder: Path
    scan: ScanReport
    buckets: BucketReport | None
    captions: CaptionStatistics
    duplicates: DuplicateReport | None
    tokens: list[TokenSummary] = field(default_factory=list)
    limits: list[TextLimit] = field(default_factory=list)
    trigger: str | None = None


def visible(text: object, longest: int = LONGEST_SHOWN) -> str:
    """Text for people: hidden characters as escapes, very long text cut with a count. Escaping for HTML comes after."""
    shown = HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))
    return shown if len(shown) <= longest else f"{shown[:longest]}… ({len(shown) - longest:,} more characters)"


def set_hash(records: Sequence[ImageRecord]) -> str:
    """SHA-256 over pictures, captions and repeats: the same set gives the same hash wherever it lies."""
    lines = sorted(json.dumps([r.content_hash, sorted([c.text, c.language, c.kind, c.source] for c in r.captions), r.repeats, r.split]) for r in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def problems(facts: SetFacts) -> list[dict[str, Any]]:
    """What needs attention, the worst first: {"level": "error" | "warning" | "note", "what", "examples"}."""
    found: list[dict[str, Any]] = []

    def add(level: str, what: str, records: Sequence[ImageRecord | Path] = ()) -> None:
        names = [relative_name(getattr(r, "path", r), facts.folder) for r in records]
        found.append({"level": level, "what": what, "examples": names[:5], "count": len(names)})

    for code, count in facts.scan.reasons().items():
        add("error", f"{count} left out: {code.replace('_', ' ')}", [item.path for item in facts.scan.left_out if item.code == code])
    records = facts.scan.records
    without = [r for r in records if not r.caption]
    if without:
        add("error", f"{len(without)} without a caption", without)
    if facts.duplicates:
        for group in facts.duplicates.leaks:
            add("error", "training and held-out pictures are the same", group.members)
        if facts.duplicates.groups:
            add("warning", f"{len(facts.duplicates.surplus)} copies in {len(facts.duplicates.groups)} groups of duplicates", facts.duplicates.surplus)
    captioned = [r for r in records if r.caption]
    for summary in facts.tokens:
        if summary.cut:
            add("warning", f"{len(summary.cut)} captions are cut by {summary.encoder} ({summary.limit} tokens{'' if summary.exact else ', estimated'})", [captioned[i] for i in summary.cut])
    if facts.trigger:
        lacking = [r for r in captioned if facts.trigger.casefold() not in r.caption.casefold()]
        if lacking:
            add("note", f"{len(lacking)} captions do not have the trigger; training adds it", lacking)
    _add_bucket_problems(facts, add)
    for text, count in Counter(w for r in records for w in _kinds(r)).most_common(12):
        add("note", f"{count} picture{'' if count == 1 else 's'}: {text}", [r for r in records if text in _kinds(r)])
    for text in facts.scan.warnings:
        add("warning", text)
    if facts.captions.in_almost_all:
        add("note", f"in over 80 % of the captions, so each acts like a trigger: {', '.join(facts.captions.in_almost_all)}")
    if facts.captions.repeated:
        shared = ", ".join(f"“{visible(text, 60)}” ({count})" for text, count in facts.captions.repeated[:5])
        add("note", f"captions that three or more pictures share: {shared}{', ...' if len(facts.captions.repeated) > 5 else ''}")
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda problem: order[problem["level"]])


def _kinds(record: ImageRecord) -> set[str]:
    """What is odd about a picture, with counts of frames left away, so that like stands with like."""
    return {re.sub(r"^\d+ (?=frames or pages)", "several ", text) for text in record.warnings}


def _add_bucket_problems(facts: SetFacts, add) -> None:
    if not facts.buckets:
        return
    pairs = list(zip(facts.scan.records, facts.buckets.placements, strict=True))
    much = [record for record, placement in pairs if lost_share(placement, record) > MUCH_LOST]
    padded = [record for record, placement in pairs if placement.padded]
    if much:
        add("warning", f"{len(much)} lose more than {MUCH_LOST:.0%} to cropping", much)
    if padded:
        add("note", f"{len(padded)} do not fill their bucket and get a border", padded)


def relative_name(path: Path, folder: Path) -> str:
    """The path below the folder when it is there, made safe to show."""
    return shown_name(path.relative_to(folder) if path.is_relative_to(folder) else path.name)


def as_data(facts: SetFacts) -> dict[str, Any]:
    """The facts as JSON data; the same set gives the same text."""
    records, buckets = facts.scan.records, facts.buckets
    return {
        "schema": SCHEMA, "layout": facts.scan.layout, "found": facts.scan.found, "usable": len(records), "set_hash": set_hash(records),
        "left_out": [{"path": relative_name(i.path, facts.folder), "reason": i.reason, "code": i.code} for i in facts.scan.left_out],
        "seen_per_pass": sum(r.repeats for r in records), "notes": facts.scan.notes, "problems": problems(facts),
        "buckets": [{"width": r.bucket.width, "height": r.bucket.height, "pictures": r.pictures, "lost_pixels": r.lost_pixels, "mean_lost": round(r.lost, 6), "padded": r.padded} for r in buckets.rows] if buckets else [],
        "captioned": facts.captions.captioned, "caption_sources": facts.captions.sources, "caption_languages": facts.captions.languages, "words": list(facts.captions.words),
        "tokens": [{"encoder": t.encoder, "limit": t.limit, "exact": t.exact, "median": t.typical, "cut": len(t.cut)} for t in facts.tokens],
        "duplicates": [{"kind": g.kind, "distance": g.distance, "leaks": g.leaks, "pictures": [relative_name(m.path, facts.folder) for m in g.members]} for g in facts.duplicates.groups] if facts.duplicates else [],
        "other_files": [relative_name(path, facts.folder) for path in facts.scan.other_files],
    }


def require_report_place(path: Path) -> None:
    """Raise DataError for a name that is not a page's, or whose facts would be read as part of a set, or take another file's place."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise DataError("a report is an .html file", where=shown_name(path), fix="name it so")
    namesakes = [other for other in path.parent.glob("*") if other.stem == path.stem and other.suffix.lower() in EXTENSIONS]
    if namesakes:
        raise DataError(f"the facts beside the report would be taken for the caption of {shown_name(namesakes[0].name)}", where=shown_name(path.with_suffix(".json")), fix="choose another name")
    facts = path.with_suffix(".json")
    if facts.name.lower().endswith(THINKING_SUFFIX) or facts.name in DATASET_NAMES:
        raise DataError("the facts beside the report would be taken for a part of the set", where=shown_name(facts), fix="choose another name")
    if facts.exists() and not _is_own(facts):
        raise DataError("is there and holds no facts of a report, so nothing is written over it", where=shown_name(facts), fix="choose another name")


def _is_own(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("schema") == SCHEMA


def write_report(facts: SetFacts, path: Path | str, *, workers: int | None = None, progress: Progress = Progress(), use_cache: bool = True, cache: Path | None = None) -> Path:
    """Write the page to `path` and its facts beside it as .json. Returns `path`. Raises DataError as `require_report_place`."""
    path = Path(path)
    require_report_place(path)
    shown = _sample(facts.scan.records)
    groups = list(facts.duplicates.groups[:MOST_GROUPS]) if facts.duplicates else []
    needed = list(dict.fromkeys([r.path for r in shown] + [m.path for g in groups for m in g.members[:12]]))
    results, _ = cached_results([(p, None) for p in needed], "thumbnail", workers=workers, progress=progress, name="drawing thumbnails", use_cache=use_cache, cache=cache)
    thumbnails = {p: f"data:image/jpeg;base64,{r['jpeg']}" for p, r in zip(needed, results, strict=True) if "jpeg" in r}
    write_text(path, render(facts, shown, groups, thumbnails))
    write_text(path.with_suffix(".json"), json.dumps(as_data(facts), ensure_ascii=False, indent=1, sort_keys=True) + "\n")
    return path


def _sample(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """All of a small set, else an even selection; which ones depends on the set alone."""
    if len(records) <= MOST_SHOWN:
        return list(records)
    return [records[i * len(records) // MOST_SHOWN] for i in range(MOST_SHOWN)]


def render(facts: SetFacts, shown: Sequence[ImageRecord], groups: Sequence, thumbnails: dict[Path, str]) -> str:
    """The page as text. Everything from files is escaped by the template; styles and script are named by hash in its policy."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    data = as_data(facts)
    return environment.get_template("report.html").render(
        style=Markup(style), script=Markup(script), style_hash=_policy_hash(style), script_hash=_policy_hash(script), data=data, name=shown_name(facts.folder.name or facts.folder),
        problems=data["problems"], sheets=_sheets(facts, shown, thumbnails), shown=len(shown), groups=[_group(facts, group, thumbnails) for group in groups], group_count=len(data["duplicates"]),
        buckets=facts.buckets, captions=facts.captions, tokens=_tokens(facts), figures=_figures(facts), left_out=data["left_out"][:MOST_LISTED], glyph=charts.shape_glyph, meter=charts.meter,
        formats=Counter(r.path.suffix.lower().lstrip(".") or "none" for r in facts.scan.records).most_common(), splits=Counter(r.split.replace("_", " ") for r in facts.scan.records).most_common(),
        other=Counter(Path(p).suffix.lower() or "no extension" for p in data["other_files"]).most_common(12),
    )


def _policy_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _figures(facts: SetFacts) -> dict[str, Markup]:
    records = facts.scan.records
    rings = [(row.bucket.height, row.bucket.width) for row in facts.buckets.rows] if facts.buckets else []
    lengths = [float(n) for n in facts.captions.lengths]
    return {
        "sizes": charts.size_scatter([r.size for r in records], rings, label="Pictures by shape and number of pixels; rings are the buckets"),
        "pixels": charts.size_histogram([r.width * r.height for r in records], label="Pictures by number of pixels"),
        "ratios": charts.histogram([r.width / r.height for r in records], label="Pictures by width over height", unit="width / height"),
        "lengths": charts.histogram(lengths, label="Captions by length", unit="words", whole=True),
    }


def _tokens(facts: SetFacts) -> list[dict[str, Any]]:
    captions = [r for r in facts.scan.records if r.caption]
    found = []
    for summary, limit in zip(facts.tokens, facts.limits, strict=True):
        cut = [{"name": relative_name(captions[i].path, facts.folder), "kept": kept[-80:], "lost": lost} for i in summary.cut[:8] for kept, lost in [read_and_cut(captions[i].caption, limit)]]
        chart = charts.histogram([float(c) for c in summary.counts], label=f"Captions by tokens of {summary.encoder}", unit="tokens", whole=True, limits=[("limit", float(summary.limit))])
        found.append({"summary": summary, "chart": chart, "cut": cut})
    return found


def _sheets(facts: SetFacts, shown: Sequence[ImageRecord], thumbnails: dict[Path, str]) -> list[dict[str, Any]]:
    """Contact sheets: one for each bucket, or one for all without buckets."""
    placement = dict(zip((id(r) for r in facts.scan.records), facts.buckets.placements, strict=True)) if facts.buckets else {}
    sheets: dict[str, dict[str, Any]] = {}
    rows = {str(row.bucket): row for row in facts.buckets.rows} if facts.buckets else {}
    for record in shown:
        fitted = placement.get(id(record))
        key = str(fitted.bucket) if fitted else "all"
        sheet = sheets.setdefault(key, {"name": key, "row": rows.get(key), "pictures": []})
        sheet["pictures"].append(_picture(facts, record, fitted, thumbnails))
    return sorted(sheets.values(), key=lambda sheet: -len(sheet["pictures"]))


def _picture(facts: SetFacts, record: ImageRecord, fitted: Placement | None, thumbnails: dict[Path, str]) -> dict[str, Any]:
    caption = best_caption(record.captions)
    return {
        "name": relative_name(record.path, facts.folder), "width": record.width, "height": record.height, "thumbnail": thumbnails.get(record.path), "caption": caption, "more": len(record.captions) - (caption is not None),
        "lost": lost_share(fitted, record) if fitted else 0.0, "bands": lost_bands(record, fitted) if fitted else [], "warnings": record.warnings, "repeats": record.repeats, "split": record.split,
        "search": visible(f"{record.path.name} {caption.text if caption else ''} {' '.join(record.warnings)}".lower(), 4000),
    }


def lost_bands(record: ImageRecord, placement: Placement) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) in pixels of the picture that its bucket does not show."""
    scale = record.width / placement.resized[1], record.height / placement.resized[0]
    left, top = max(0, placement.crop[1]) * scale[0], max(0, placement.crop[0]) * scale[1]
    right = min(record.width, (placement.crop[1] + placement.bucket.width) * scale[0])
    bottom = min(record.height, (placement.crop[0] + placement.bucket.height) * scale[1])
    bands = [(0.0, 0.0, record.width, top), (0.0, bottom, record.width, record.height - bottom), (0.0, top, left, bottom - top), (right, top, record.width - right, bottom - top)]
    return [band for band in bands if band[2] >= 0.5 and band[3] >= 0.5]


def _group(facts: SetFacts, group, thumbnails: dict[Path, str]) -> dict[str, Any]:
    members = [{"name": relative_name(m.path, facts.folder), "width": m.width, "height": m.height, "split": m.split, "thumbnail": thumbnails.get(m.path)} for m in group.members[:12]]
    return {"kind": group.kind, "distance": group.distance, "leaks": group.leaks, "members": members, "more": len(group.members) - len(members)}

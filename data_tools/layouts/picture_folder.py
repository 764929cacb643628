"""A folder of pictures: caption files beside them, metadata.jsonl/.csv/.parquet, kohya's `10_name` folders, masks."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_tools.errors import DataError
from data_tools.images import EXTENSIONS
from data_tools.layouts.caption_files import CAPTION_SUFFIXES, THINKING_SUFFIX, FolderCaptions, merge_captions
from data_tools.layouts.caption_log import model_written_captions
from data_tools.layouts.index_files import METADATA_NAMES, Row, read_rows
from data_tools.near_names import meant_path
from data_tools.records import Caption, Entry, LeftOut, Reading, shown_name

KOHYA_FOLDER = re.compile(r"^(\d+)_(.*)$")
CONDITION_SUFFIX = "-condlabel"
MASK_STEM_SUFFIXES = ("-masklabel", CONDITION_SUFFIX, ".mask", "_mask")
NO_PICTURE_OF_THIS_NAME = "lies in a folder called {}, which is for masks and the like, and no picture beside that folder has its name; rename the folder to train it"
MASK_FOLDERS = ("masks", "mask", "conditioning", "control")
HELD_OUT_FOLDERS = ("validation", "valid", "val", "test", "held_out")
REGULARISATION_FOLDERS = ("reg", "regularisation", "regularization")
IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
# Files that other tools leave beside pictures; never pictures, never worth a word.
COMPANION_SUFFIXES = frozenset(".npz .safetensors .json .jsonl .csv .parquet .toml .yaml .yml .md .pt .bin .db .log .html .xmp .thinking".split())
TABLE_SUFFIXES = frozenset(Path(name).suffix for name in METADATA_NAMES)
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x00\x0cjP  ")


@dataclass(frozen=True)
class Folder:
    """One folder of the walk: its path, file names, and the path relative to the root in parts."""

    path: Path
    names: tuple[str, ...]
    parts: tuple[str, ...]


def walk(root: Path, reading: Reading) -> list[Folder]:
    """Every folder under `root` once, sorted, links followed but never in a circle; what cannot be listed is a warning."""
    folders, seen, waiting = [], set(), [(root, ())]
    while waiting:
        path, parts = waiting.pop()
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            reading.warnings.append(f"{shown_name(path)} cannot be listed: {error.strerror}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            reading.warnings.append(f"{shown_name(path)} links to a folder that was read already; not read twice")
            continue
        seen.add((status.st_dev, status.st_ino))
        names, below = [], []
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in IGNORED_NAMES:
                continue
            (below if _is_folder(entry) else names).append(entry.name)
        folders.append(Folder(path, tuple(names), parts))
        waiting += [(path / name, (*parts, name)) for name in reversed(below)]
    return folders


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; opening it will say so
        return False


def is_picture(path: Path) -> bool:
    """By extension; a file with another one by its first bytes."""
    if path.suffix.lower() in EXTENSIONS:
        return True
    if path.name.lower().endswith((*CAPTION_SUFFIXES, THINKING_SUFFIX)) or path.suffix.lower() in COMPANION_SUFFIXES:
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    except (OSError, ValueError):
        return False
    return head.startswith(MAGIC) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1")


def read_picture_folder(root: Path) -> Reading:
    """Every picture under `root` with what the files beside it say. Rows of metadata files outrank caption files."""
    reading = Reading("bare")
    folders = walk(root, reading)
    rows = _metadata_rows(folders, reading)
    row_masks = {row.mask for row in rows.values() if row.mask}
    kohya = any(_kohya_part(folder.parts) for folder in folders) and not rows
    plain_folders = 0
    orphans: list[Path] = []
    mask_folders = [folder for folder in folders if _is_mask_folder(folder)]
    claimed: set[Path] = set()
    set_apart: dict[Path, str] = {}
    for folder in folders:
        captions = FolderCaptions(folder.path, folder.names, model_written_captions(folder.path))
        pictures = [name for name in folder.names if is_picture(folder.path / name)]
        masks = _masks(folder, pictures, [masks for masks in mask_folders if _owner(masks) == folder.parts])
        claimed |= masks.claimed
        if kohya and pictures and not _kohya_part(folder.parts) and not _is_mask_folder(folder):
            plain_folders += 1
        for name in pictures:
            path = folder.path / name
            if path in row_masks or name in masks.no_pictures and path not in rows:
                continue
            if _is_mask_folder(folder) and path not in rows:
                set_apart[path] = _mask_part(folder)
                continue
            entry = _entry(path, folder, captions, masks.of.get(name), rows.pop(path, None), kohya)
            reading.entries.append(replace(entry, warnings=(*entry.warnings, masks.warnings[name])) if name in masks.warnings else entry)
        for name in folder.names:
            if name not in pictures and not name.lower().endswith((*CAPTION_SUFFIXES, *COMPANION_SUFFIXES)):
                reading.other_files.append(folder.path / name)
        orphans += [folder.path / name for name in captions.orphans()]
    reading.left_out += [LeftOut(path, NO_PICTURE_OF_THIS_NAME.format(name), "mask_without_picture") for path, name in set_apart.items() if path not in claimed]
    for path, row in rows.items():
        reading.left_out.append(LeftOut(path, f"named in {row.where} but there is no such file", "missing"))
    reading.layout = _layout_name(reading, bool(rows or any(e.layout == "metadata" for e in reading.entries)), kohya)
    _notes(reading, orphans, plain_folders)
    _warn_of_tables(reading, folders)
    return reading


def _entry(path: Path, folder: Folder, captions: FolderCaptions, mask: Path | None, row: Row | None, kohya: bool) -> Entry:
    beside = captions.of(path.name)
    layout = "sidecars" if beside.captions else "bare"
    own = beside.captions
    warnings = list(beside.warnings)
    repeats, licence = beside.repeats, beside.licence
    if row is not None:
        layout, licence, repeats = "metadata", row.licence or licence, max(row.repeats, repeats)
        mask = row.mask or mask
        own = list(row.captions)
        plain = {c.text for c in own if c.kind == "plain"}
        if plain and any(c.kind == "plain" and c.text not in plain for c in beside.captions):
            warnings.append(f"{row.where} and the caption file differ; the row is used")
            merge_captions(own, [c for c in beside.captions if c.kind != "plain"])
        else:
            merge_captions(own, beside.captions)
    named = _kohya_part(folder.parts) if kohya else None
    if named:
        layout, repeats = "kohya", int(named[0])
        if named[1] and not any(c.kind == "plain" for c in own):
            own.append(Caption.written(named[1], "folder_name"))
    split = row.split if row is not None and row.split else split_of(folder.parts)
    return Entry(path, tuple(own), mask, licence, layout, repeats, split, tuple(warnings))


def split_of(parts: tuple[str, ...]) -> str:
    """The split that the folder's own name says: the first part under the root is what counts."""
    first = parts[0].lower() if parts else ""
    if first in HELD_OUT_FOLDERS:
        return "held_out"
    return "regularisation" if first in REGULARISATION_FOLDERS else "train"


def _kohya_part(parts: tuple[str, ...]) -> tuple[str, str] | None:
    match = KOHYA_FOLDER.match(parts[-1]) if parts else None
    if not match or len(parts) > 2 or not 1 <= int(match[1]) <= 100_000 or not match[2].strip():
        return None
    return match[1], match[2].replace("_", " ").strip()


def _mask_part(folder: Folder) -> str | None:
    """The part of its path that makes it a folder of masks or condition pictures; None where it is none."""
    return next((part for part in folder.parts if part.lower() in MASK_FOLDERS), None)


def _is_mask_folder(folder: Folder) -> bool:
    return _mask_part(folder) is not None


def _owner(masks: Folder) -> tuple[str, ...]:
    """Parts of the folder whose pictures they belong to: cats/masks and masks/cats are both for cats."""
    at = masks.parts.index(_mask_part(masks))
    return masks.parts[:at] + masks.parts[at + 1:]


@dataclass
class _Masks:
    """of: mask by picture name.  no_pictures: names in this folder that are masks or condition pictures.  claimed: files in mask folders
    that belong to a picture here.  warnings: by picture name."""

    of: dict[str, Path] = field(default_factory=dict)
    no_pictures: set[str] = field(default_factory=set)
    claimed: set[Path] = field(default_factory=set)
    warnings: dict[str, str] = field(default_factory=dict)

    def take(self, owners: Iterable[str], mask: Path) -> None:
        """A later mask of the same picture wins, which is said."""
        for name in owners:
            if name in self.of:
                self.warnings[name] = f"several masks; {shown_name(mask.name)} in {shown_name(mask.parent.name)} is used"
            self.of[name] = mask


def _masks(folder: Folder, pictures: list[str], apart: Iterable[Folder]) -> _Masks:
    """Masks of a folder's pictures (`a-masklabel.png`, `a_mask.png`, `a.mask.png` beside a.jpg, or masks/a.png): each is for every
    picture of its stem. apart: the mask folders that belong to this one."""
    by_stem: dict[str, list[str]] = {}
    for name in pictures:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    found = _Masks()
    for masks in apart:
        for name in masks.names:
            owners, path = by_stem.get(os.path.splitext(name)[0]), masks.path / name
            if owners and is_picture(path):
                found.claimed.add(path)
                if _mask_part(masks).lower() in MASK_FOLDERS[:2]:
                    found.take(owners, path)
    for stem, names in by_stem.items():
        suffix = next((suffix for suffix in MASK_STEM_SUFFIXES if stem.endswith(suffix)), None)
        if suffix is None:
            continue
        owners = by_stem.get(stem.removesuffix(suffix))
        for name in names:
            if owners is None:
                found.warnings[name] = "named like a mask, but there is no picture that it belongs to; it is trained as a picture"
                continue
            found.no_pictures.add(name)
            if suffix != CONDITION_SUFFIX:
                found.take(owners, folder.path / name)
    return found


def _metadata_rows(folders: list[Folder], reading: Reading) -> dict[Path, Row]:
    rows: dict[Path, Row] = {}
    for folder in folders:
        present = [name for name in METADATA_NAMES if name in folder.names]
        if len(present) > 1:
            reading.notes.append(f"{shown_name(folder.path)}: {' and '.join(present)} are both present; {present[0]} is used")
        for name in present[:1]:
            found = read_rows(folder.path / name, reading)
            for row in found:
                if row.path in rows:
                    reading.warnings.append(f"{row.where}: a second row for {shown_name(row.path.name)}; the first is used")
                rows.setdefault(row.path, row)
    return rows


def _layout_name(reading: Reading, metadata: bool, kohya: bool) -> str:
    if metadata:
        return "metadata"
    if kohya:
        return "kohya"
    return "sidecars" if any(entry.layout == "sidecars" for entry in reading.entries) else "bare"


def _warn_of_tables(reading: Reading, folders: list[Folder]) -> None:
    """Captions that somebody keeps in a table are not found under every name."""
    tables = [folder.path / name for folder in folders for name in folder.names if Path(name).suffix.lower() in TABLE_SUFFIXES and name not in METADATA_NAMES]
    if tables and any(not entry.captions for entry in reading.entries):
        shown = ", ".join(shown_name(path.name) for path in tables[:5])
        reading.warnings.append(f"{shown}{', ...' if len(tables) > 5 else ''} beside pictures without captions is not read: a table of captions is called "
                                f"{' or '.join(METADATA_NAMES)}, or is converted by itself (brushwork data convert TABLE --to sidecars --out FOLDER)")


def _notes(reading: Reading, orphans: list[Path], plain_folders: int) -> None:
    meaning = {"metadata": "a metadata file names the pictures", "kohya": "folders named <repeats>_<name>", "sidecars": "caption files beside the pictures", "bare": "pictures without captions"}
    reading.notes.insert(0, f"layout: {reading.layout} ({meaning[reading.layout]})")
    beside = sum(entry.layout == "metadata" and any(c.source == "person" for c in entry.captions) for entry in reading.entries)
    without_row = sum(entry.layout != "metadata" for entry in reading.entries) if reading.layout == "metadata" else 0
    if reading.layout == "metadata" and beside:
        reading.notes.append("precedence: metadata row, then .txt, .caption, full-name .txt, .json, then the folder's name")
    if without_row:
        reading.warnings.append(f"{without_row} pictures have no row in the metadata file; they are used with what stands beside them")
    if plain_folders:
        reading.warnings.append(f"{plain_folders} folders with pictures are not named <repeats>_<name>; their pictures are seen once (kohya would ignore them)")
    if orphans:
        shown = ", ".join(shown_name(path.name) for path in orphans[:5])
        reading.warnings.append(f"{len(orphans)} caption files have no picture: {shown}{', ...' if len(orphans) > 5 else ''}")
    stems: dict[Path, int] = {}
    for entry in reading.entries:
        stems[entry.path.with_suffix("")] = stems.get(entry.path.with_suffix(""), 0) + 1
    shared = {stem for stem, count in stems.items() if count > 1}
    if shared:
        reading.entries = [replace(e, warnings=(*e.warnings, "shares its caption file with a picture of the same name")) if e.path.with_suffix("") in shared else e for e in reading.entries]


def require_folder(root: Path) -> None:
    """Raise DataError when `root` is no folder that can be listed."""
    if not root.exists():
        raise DataError("there is no such folder", where=shown_name(root), fix=meant_path(root, "give a folder of pictures"))
    if not root.is_dir():
        raise DataError("not a folder", where=shown_name(root))
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError("the folder may not be read", where=shown_name(root), fix="check its permissions")

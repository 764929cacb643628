"""Reference and training pictures, opened by the data tools' one opener and brought to a size that can be compared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.near_names import meant_path
from data_tools.progress import Progress
from finetune.errors import BadInput
from finetune.evaluation.evidence import NamedPicture

MOST_REFERENCES = 500
TRAINING_EDGE = 128  # pixels; near-copies are looked for in thumbnails


@dataclass(frozen=True)
class PictureSet:
    """pictures: opened.  left_out: (file, reason).  digest: changes with any picture."""

    pictures: tuple[NamedPicture, ...]
    left_out: tuple[tuple[Path, str], ...]
    digest: str


def spread_evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spaced: never only the first files of a folder."""
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]


def require_pictures_at(folder: Path) -> None:
    """Raises BadInput where there is no such folder."""
    if not folder.exists():
        raise BadInput("there is no such folder of pictures", where=str(folder), fix=meant_path(folder, "`brushwork data scan FOLDER` says what can be used"))


def load_pictures(folder: Path | str, *, area: int, most: int | None, progress: Progress, purpose: str) -> PictureSet:
    """Every usable picture of a folder, scaled to about `area` pixels (never enlarged), in the order of names.

    Scale matters: the distribution of edges depends on it, so references are brought to the size that was drawn.
    Raises BadInput when none is usable.
    """
    from data_tools.images import open_image
    from data_tools.scan import scan_folder

    folder = Path(folder)
    require_pictures_at(folder)
    report = scan_folder(folder, progress=progress)
    records = sorted(report.records, key=lambda record: str(record.path))
    chosen = [records[index] for index in spread_evenly(len(records), most or len(records))]
    if not chosen:
        raise BadInput(f"holds no usable {purpose} pictures", where=str(folder), fix="`brushwork data scan` says why")
    pictures, digest = [], hashlib.sha256()
    with progress.phase(f"opening {purpose} pictures", len(chosen)) as advance:
        for record in chosen:
            pictures.append(NamedPicture(record.path, _scaled(open_image(record.path), area)))
            digest.update(record.content_hash.encode())
            advance()
    digest.update(str(area).encode())
    return PictureSet(tuple(pictures), tuple((left.path, left.reason) for left in report.left_out), digest.hexdigest()[:16])


def _scaled(image, area: int) -> np.ndarray:
    from PIL import Image

    factor = min(1.0, (area / (image.width * image.height)) ** 0.5)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray((image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)).convert("RGB"))

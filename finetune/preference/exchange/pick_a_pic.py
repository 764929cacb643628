"""Pick-a-Pic v1/v2 (Kirstain et al. 2023, arXiv 2305.01569): Parquet rows with both pictures inside.

caption, jpg_0, jpg_1 (bytes), label_0, label_1 (1, 0, or 0.5 for a tie), has_label, are_different, image_0_uid,
image_1_uid, num_example_per_prompt, user_id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.atomic_files import whole_file
from data_tools.errors import DataError

from data_tools.near_names import meant_path
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import Judgement
from finetune.preference.exchange.imported import ForeignEntry, entry_place

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
READ = (*NEEDED, "has_label", "image_0_uid", "image_1_uid", "user_id")
# Rows hold two whole pictures each; this many at a time bounds the memory.
ROWS_AT_A_TIME = 64


def read_pick_a_pic(path: Path) -> Iterator[ForeignEntry]:
    """One entry a labelled row; rows without a label (`has_label` false) hold no judgement and are passed over."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise DataError("no such file", where=str(path), fix=meant_path(path, "give the file with the judgements"))
    try:
        table = parquet.ParquetFile(path)
        missing = [name for name in NEEDED if name not in table.schema_arrow.names]
        if missing:
            raise DataError(f"the columns {', '.join(missing)} are missing", where=str(path), fix="choose the form that the file has with --form")
        columns = [name for name in READ if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(ROWS_AT_A_TIME, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if row.get("has_label", True):
                    yield _entry(row, entry_place(path, number), f"{path.name}|{number}")
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file ({str(error)[:120]})", where=str(path), fix="choose the form that the file has with --form") from None


def _entry(row: dict[str, Any], where: str, identity: str) -> ForeignEntry:
    labels = (row["label_0"], row["label_1"])
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise DataError(f"the labels {labels} are not (1, 0), (0, 1) or (0.5, 0.5)", where=where)
    if not isinstance(row["caption"], str) or not all(isinstance(row[key], bytes) for key in ("jpg_0", "jpg_1")):
        raise DataError("`caption` must be text, `jpg_0` and `jpg_1` bytes", where=where)
    tie = labels[0] == 0.5
    rater = str(row.get("user_id") or "pick-a-pic")
    return ForeignEntry(where, row["caption"], (row["jpg_0"], row["jpg_1"]), rater, identity, choice=None if tie else labels.index(1), tie=tie)


def write_pick_a_pic(path: Path, folder: CandidateFolder, judgements: Sequence[Judgement]) -> tuple[int, list[tuple[str, str]]]:
    """(rows written, left out): only pairs fit. The pictures' own files go in, whatever their format."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    pairs = [judgement for judgement in judgements if judgement.mode == "pair"]
    left_out = [(judgement.id, f"a {judgement.mode} does not fit the form of Pick-a-Pic") for judgement in judgements if judgement.mode != "pair"]
    per_prompt = Counter(judgement.prompt for judgement in pairs)
    schema = arrow.schema([
        ("caption", arrow.string()), ("jpg_0", arrow.binary()), ("jpg_1", arrow.binary()), ("label_0", arrow.float64()), ("label_1", arrow.float64()),
        ("are_different", arrow.bool_()), ("has_label", arrow.bool_()), ("num_example_per_prompt", arrow.int64()),
        ("image_0_uid", arrow.string()), ("image_1_uid", arrow.string()), ("user_id", arrow.string()),
    ])
    with whole_file(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(pairs), ROWS_AT_A_TIME):
            rows = [_row(folder, judgement, per_prompt[judgement.prompt]) for judgement in pairs[start:start + ROWS_AT_A_TIME]]
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
    return len(pairs), left_out


def _row(folder: CandidateFolder, judgement: Judgement, of_prompt: int) -> dict[str, Any]:
    first, second = judgement.items
    label = 0.5 if judgement.tie else float(judgement.choice == first)
    return {
        "caption": judgement.prompt, "jpg_0": folder.picture(first).read_bytes(), "jpg_1": folder.picture(second).read_bytes(),
        "label_0": label, "label_1": 1 - label, "are_different": not judgement.tie, "has_label": True, "num_example_per_prompt": of_prompt,
        "image_0_uid": first, "image_1_uid": second, "user_id": judgement.rater,
    }

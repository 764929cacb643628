"""Results that this program did not measure, with everything that decides whether they can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_text
from data_tools.near_names import meant_path
from finetune.errors import BadInput

LARGEST = 1e300  # what JSON may hold and still is a number for everybody


@dataclass(frozen=True)
class ImportedResult:
    """One number of one model on one benchmark.

    value: in the benchmark's own units; None, shown as "not given", where only its existence is known.  low, high: interval, where single results were given.  scale: upper end where
    a benchmark has no standard one.  grader, version, prompts (which set), n (pictures), seed, source: None, shown as
    "not stated", where whoever published the number did not say.
    """

    model: str
    benchmark: str
    value: float | None
    low: float | None = None
    high: float | None = None
    scale: float | None = None
    grader: str | None = None
    version: str | None = None
    prompts: str | None = None
    n: int | None = None
    seed: str | None = None
    source: str | None = None
    detail: dict[str, float] | None = None


ARTICLE = "announcement article of this project's mission; grader, prompts and seeds are not stated there"
# The headline row as it was handed to the project. It was not measured here, and no test aims at it. The three models
# beside it were handed on neither by name nor by number, and no public copy of the row was found: the table says so.
HEADLINE = (*(
    ImportedResult("HunyuanImage-3.0, as announced", benchmark, value, scale=scale, source=ARTICLE)
    for benchmark, value, scale in (("GenEval", 94.7, 100), ("HPSv2.1", 34.7, None), ("DPG-Bench", 72.1, 100), ("Alignment", 9.37, 10))),
    ImportedResult("its three rivals in the same table", "all four", None, source=ARTICLE),
)


def stated(result: ImportedResult, *, grader: str | None, version: str | None, prompts: str | None, n: int | None, seed: str | None, model: str | None) -> ImportedResult:
    """The result with what the user knows of it; what the file itself told is kept where nothing else is given."""
    told = {"grader": grader, "version": version, "prompts": prompts, "n": n, "seed": seed, "model": model}
    return replace(result, **{key: value for key, value in told.items() if value is not None})


def read_table(path: Path | str) -> list[ImportedResult]:
    """Results from JSON: a list of objects with the fields of `ImportedResult`; model, benchmark, value and source are demanded.

    Raises BadInput naming the entry that is wrong.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise BadInput((error.strerror or "cannot be read").lower(), where=str(path), fix=meant_path(path, "give the file that the grader wrote")) from None
    except (ValueError, RecursionError):
        raise BadInput("is not JSON in UTF-8", where=str(path)) from None
    if not isinstance(data, list):
        raise BadInput("is not a list of results", where=str(path))
    return [_from_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(data, 1)]


def _from_entry(entry: Any, where: str) -> ImportedResult:
    known = set(ImportedResult.__dataclass_fields__)
    if not isinstance(entry, dict) or set(entry) - known:
        odd = sorted(set(entry) - known)[0] if isinstance(entry, dict) else "not an object"
        raise BadInput(f"is no result: {odd}", where=where, fix=f"its keys are of {', '.join(sorted(known))}")
    for key in ("value", "low", "high", "scale"):
        if not _is_number(entry.get(key)) and (key == "value" or entry.get(key) is not None):
            raise BadInput(f"its {key} is not a number", where=where)
    for key in ("model", "benchmark", "source"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise BadInput(f"does not state its {key}", where=where, fix="an imported number without its origin is not shown")
    return ImportedResult(**entry)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def add_to_evaluation(folder: Path | str, results: Sequence[ImportedResult]) -> dict[str, Any]:
    """Put imported results into a comparison's `evaluation.json`; the same model and benchmark replaces what was there."""
    path = Path(folder) / "evaluation.json"
    try:
        evaluation = json.loads(path.read_text("utf-8"))
        kept = {(row["model"], row["benchmark"]): row for row in evaluation["imported"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput("holds no evaluation", where=str(folder), fix="run `brushwork evaluate compare` first, or write the results with --out") from None
    kept.update({(result.model, result.benchmark): asdict(result) for result in results})
    evaluation["imported"] = list(kept.values())
    write_text(path, json.dumps(evaluation, ensure_ascii=False, indent=1) + "\n")
    return evaluation

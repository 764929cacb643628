"""One HTML page of a comparison: numbers, intervals as pictures, sheets, best and worst prompts, near-copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_text
from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.report_charts import interval_chart, picture_uri
from finetune.evaluation.report_template import PAGE

MOST_SHEET_ROWS, MOST_PAIRS = 24, 60


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"


def _by_measure(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        grouped.setdefault(row["measure"], []).append(row)
    return grouped


def write_report(path: Path | str, result: Mapping[str, Any], pictures: Mapping[str, Sequence[Pixels]], evidence: Evidence) -> None:
    """Write the page for a result of `compare`.

    pictures: subject -> pictures in the order of `evidence.prompts` and `.seeds`; the base is the first subject.
    """
    from jinja2 import Environment

    places = {(prompt.prompt_id, seed): index for index, (prompt, seed) in enumerate(zip(evidence.prompts, evidence.seeds, strict=True))}
    by_measure = _by_measure(result)
    subjects = list(pictures)
    first_of = [index for index, seed in enumerate(evidence.seeds) if seed == evidence.seeds[0]]
    uris: dict[tuple[str, int], str] = {}

    def uri(subject: str, index: int) -> str:
        if (subject, index) not in uris:
            uris[subject, index] = picture_uri(pictures[subject][index])
        return uris[subject, index]

    sheet = [{"pictures": [uri(subject, index) for subject in subjects], "prompt": evidence.prompts[index].prompt, "seed": evidence.seeds[index],
              "split": evidence.prompts[index].split} for index in first_of[:MOST_SHEET_ROWS]]
    trained = {picture.path.name: picture.pixels for picture in evidence.training}
    copies = [dict(copy) | {"drawn": uri(copy["adapter"], places[copy["prompt_id"], copy["seed"]]), "trained": picture_uri(trained[copy["training"]])}
              for copy in result["near_copies"][:MOST_PAIRS]]
    template = Environment(autoescape=True, trim_blocks=False).from_string(PAGE)
    text = template.render(
        result=result, by_measure=by_measure, charts={name: chart for name, rows in by_measure.items() if (chart := interval_chart(rows))},
        subjects=subjects, sheet=sheet, hidden=max(0, len(first_of) - MOST_SHEET_ROWS), copies=copies, number=_number, signed=_signed,
        pictures_looked_at=sum(map(len, pictures.values())), is_small=max(pictures[subjects[0]][0].shape[:2]) < 128,
        pair_of=lambda adapter, prompt_id: [uri(subject, places[prompt_id, evidence.seeds[0]]) for subject in (subjects[0], adapter)],
    )
    write_text(path, _visible(text))


def _visible(text: str) -> str:
    """Without characters that no HTML file may hold (control characters of hostile prompts)."""
    return "".join(character if character >= " " or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text).encode("utf-8", "replace").decode()

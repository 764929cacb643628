"""The result of a comparison as data: a row for each adapter and measure, with an interval beside every difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.evaluation.drawing import DrawingSettings
from finetune.evaluation.evidence import Evidence
from finetune.evaluation.intervals import Interval, bootstrap_mean, bootstrap_set, holm, per_prompt, win_rate
from finetune.evaluation.measure import Measure
from finetune.evaluation.measures.near_copies import of_evidence
from finetune.evaluation.subjects import BASE
from finetune.resampling import COVERAGE

if TYPE_CHECKING:
    from finetune.evaluation.compare import Comparison
    from finetune.families.base_models import BaseModel

RESULT_VERSION = 1
SHOWN_PROMPTS = 5
ROUNDING = 1e-12
# Prompts are ranked by the first of these that was taken.
RANKED_BY = ("style_gain", "palette", "alignment", "structure_kept")
Values = Mapping[tuple[str, str], np.ndarray]


def _number(value: float | None) -> float | None:
    """A finite number with six digits, or None, as JSON takes it. What is left of a difference by rounding is 0."""
    return None if value is None or not np.isfinite(value) else 0.0 if abs(value) < ROUNDING else float(f"{value:.6g}")


def _picture_row(measure: Measure, own: np.ndarray, base: np.ndarray | None, ids: Sequence[str]) -> dict[str, Any]:
    # The base's own values may be alike by definition, as its distance to itself: no interval can be read into that.
    span = measure.high - measure.low
    bounded = base is not None and np.isfinite(span)
    value = bootstrap_mean(own, ids, bounds=(measure.low, measure.high) if bounded else None)
    row = _row(measure, value, None)
    if base is not None:
        difference = own - base
        row = _row(measure, value, bootstrap_mean(difference, ids, bounds=(-span, span) if bounded else None))
        means = per_prompt(difference, ids)[1]
        if measure.better != "none" and len(means):
            row["win_rate"], row["win_low"], row["win_high"] = map(_number, win_rate(means, measure.better))
    return row


def _set_row(measure: Measure, own: Evidence, base: Evidence | None, ids: Sequence[str]) -> dict[str, Any]:
    statistic, applies = measure.of_set(own), measure.applies(own)
    value = bootstrap_set(statistic, applies, ids)
    if base is None:
        return _row(measure, value, None)
    of_base = measure.of_set(base)
    return _row(measure, value, bootstrap_set(lambda chosen: statistic(chosen) - of_base(chosen), applies, ids))


def _row(measure: Measure, value: Interval, delta: Interval | None) -> dict[str, Any]:
    """low, high: of the difference to the base; for the base itself of the value.  no_interval: why there is none, else None."""
    shown = delta or value
    return {
        "measure": measure.name, "value": _number(value.value), "delta": _number(delta.value) if delta else None, "low": _number(shown.low),
        "high": _number(shown.high), "value_low": _number(value.low), "value_high": _number(value.high), "no_interval": shown.absent, "prompts": value.prompts,
        "p": _number(delta.p) if delta else None, "better": measure.better, "metric_id": measure.identifier, "imported_from": None,
    }


def rows_of(comparison: Comparison, measures: Sequence[Measure], evidence: Mapping[str, Evidence], values: Values) -> list[dict[str, Any]]:
    """One row for each subject and measure, the base's first."""
    rows = []
    for subject in comparison.subjects:
        own, base = evidence[subject.name], evidence[BASE]
        ids = [prompt.prompt_id for prompt in own.prompts]
        for measure in measures:
            is_base = subject.name == BASE
            if measure.values is None:
                row = _set_row(measure, own, None if is_base else base, ids)
            else:
                row = _picture_row(measure, values[subject.name, measure.name], None if is_base else values[BASE, measure.name], ids)
            rows.append({"adapter": subject.name} | row | {"seeds": len(comparison.seeds)})
    for row, adjusted in zip(rows, holm([row["p"] if row["better"] != "none" else None for row in rows]), strict=True):
        row["p_holm"] = _number(adjusted)
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """"better", "worse" or "unclear": whether the interval of the difference leaves out zero, and on which side."""
    if row["delta"] is None or row["low"] is None or row["low"] <= 0 <= row["high"] or row["better"] == "none":
        return "unclear"
    return "better" if (row["delta"] > 0) == (row["better"] == "higher") else "worse"


def near_copies_of(comparison: Comparison, evidence: Mapping[str, Evidence]) -> list[dict[str, Any]]:
    """Every flagged picture with the training picture that it is almost."""
    found = []
    for subject in comparison.subjects:
        own = evidence[subject.name]
        if not own.training:
            continue
        nearest = of_evidence(own)
        for index in np.flatnonzero(nearest.flagged):
            found.append({
                "adapter": subject.name, "prompt_id": own.prompts[index].prompt_id, "prompt": own.prompts[index].prompt, "seed": own.seeds[index],
                "picture": f"pictures/{subject.folder}/{own.prompts[index].prompt_id}-{own.seeds[index]}.png",
                "training": own.training[nearest.index[index]].path.name, "similarity": _number(nearest.similarity[index]),
                "hash_bits": int(nearest.bits[index])})
    return found


def ranked_prompts(comparison: Comparison, measures: Sequence[Measure], evidence: Mapping[str, Evidence], values: Values) -> list[dict[str, Any]]:
    """For each adapter its best and worst prompts by the first measure of `RANKED_BY` that was taken."""
    measure = next((measure for name in RANKED_BY for measure in measures if measure.name == name and measure.values is not None), None)
    if measure is None:
        return []
    ranked = []
    for subject in comparison.subjects[1:]:
        own = evidence[subject.name]
        ids = [prompt.prompt_id for prompt in own.prompts]
        texts = dict(zip(ids, (prompt.prompt for prompt in own.prompts), strict=True))
        names, means = per_prompt(values[subject.name, measure.name] - values[BASE, measure.name], ids)
        order = np.argsort(-means if measure.better == "higher" else means, kind="stable")
        told = [{"prompt_id": names[index], "prompt": texts[names[index]], "delta": _number(means[index])} for index in order]
        shown = min(SHOWN_PROMPTS, (len(told) + 1) // 2)
        ranked.append({"adapter": subject.name, "measure": measure.name, "best": told[:shown], "worst": told[::-1][: min(shown, len(told) - shown)]})
    return ranked


def result_of(base: BaseModel, comparison: Comparison, settings: DrawingSettings, measures: Sequence[Measure], left_out: Mapping[str, str],
              evidence: Mapping[str, Evidence], values: Values) -> dict[str, Any]:
    """The content of `evaluation.json`; no paths of the machine are in it."""
    rows = rows_of(comparison, measures, evidence, values)
    return {
        "v": RESULT_VERSION, "base": base.identifier if not base.identifier.startswith(("/", ".", "~")) else base.folder.name, "base_revision": base.revision,
        "family": base.family.facts.name,
        "adapters": [{"name": subject.name, "file": subject.path.name, "sha256": subject.sha256, "weight": subject.weight} for subject in comparison.subjects[1:]],
        "settings": asdict(settings) | {"base": None, "hash": settings.hash},
        "prompts": [{"prompt_id": prompt.prompt_id, "prompt": prompt.prompt, "split": prompt.split, "tags": list(prompt.tags)} for prompt in comparison.prompts],
        "seeds": list(comparison.seeds), "rows": [row | {"verdict": verdict(row)} for row in rows],
        "measures": {measure.name: {"meaning": measure.meaning, "source": measure.source, "better": measure.better, "low": _number(measure.low), "high": _number(measure.high),
                                    "splits": list(measure.splits), "metric_id": measure.identifier} for measure in measures},
        "left_out": dict(left_out), "near_copies": near_copies_of(comparison, evidence), "ranked": ranked_prompts(comparison, measures, evidence, values),
        "interval": f"{COVERAGE:.0%}, percentile bootstrap over prompts, widened for their number, paired by prompt and seed",
        "caution": "; ".join(_cautions(comparison, measures, rows)),
    }


def _cautions(comparison: Comparison, measures: Sequence[Measure], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to keep in mind about the rows."""
    found, tests = [], sum(row["p"] is not None and row["better"] != "none" for row in rows)
    if tests > 1:
        found.append(f"{tests} intervals are shown side by side, each at {COVERAGE:.0%}; p_holm is adjusted for all of them")
    to_style = [measure.name for measure in measures if "references" in measure.needs]
    if to_style and comparison.references and comparison.training and comparison.references.resolve() == comparison.training.resolve():
        found.append(f"{', '.join(to_style)} compare with the training pictures themselves, so a copy of one scores best: read near_copies beside them, or give pictures that were not trained on (--references)")
    return found

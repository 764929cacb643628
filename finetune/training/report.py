"""report.html of a run: before and after, curves, what was left out and why. One file that needs nothing beside it.

Everything comes from the run folder, so the page can be made again. Text from files is escaped, nothing outside is
linked, and a Content-Security-Policy forbids the page to load or run anything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.atomic_files import write_text
from finetune.training.report_curves import CURVE_HEIGHT, CURVE_WIDTH, curves_of
from finetune.training.run_folder import RunFolder

WIDEST_PICTURE = 1600  # pixels; a wider one is reduced, so that the page stays one that can be mailed

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
td { overflow-wrap: anywhere; } .trace { white-space: pre-line; }
svg { width: 100%; max-width: 44rem; height: auto; } .line { fill: none; stroke: #c2410c; stroke-width: 1.5; }
.raw { fill: none; stroke: #9ca3af; stroke-width: .6; } .axis { stroke: #9ca3af; stroke-width: .5; } .mark { stroke: #2563eb; stroke-dasharray: 3 3; } text { font-size: 11px; fill: #6b7280; }
pre { overflow-x: auto; background: #8881; padding: .75rem; border-radius: 4px; } .note { color: #6b7280; }
""".strip()

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }} — Brushwork report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{{ style_hash }}'">
<meta name="viewport" content="width=device-width"><style>{{ style }}</style></head><body>
<h1>{{ name }}</h1>
{% if sheet %}<h2>Before and after</h2>
<img src="{{ sheet }}" alt="The same prompts and seeds before and after training">
<p class="note">The same prompts and seeds. What is called after was drawn by the adapter file as it was loaded back into a fresh base.</p>{% endif %}
{% if facts %}<h2>Proof and cost</h2><table>{% for key, value in facts %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}</table>{% endif %}
<h2>Curves</h2>
{% for curve in curves %}<h3>{{ curve.title }}</h3>
<svg viewBox="0 0 {{ width + 70 }} {{ height + 24 }}" role="img" aria-label="{{ curve.title }}">
<line class="axis" x1="60" y1="{{ height }}" x2="{{ width + 60 }}" y2="{{ height }}"/><line class="axis" x1="60" y1="4" x2="60" y2="{{ height }}"/>
<text x="55" y="12" text-anchor="end">{{ curve.high }}</text><text x="55" y="{{ height }}" text-anchor="end">{{ curve.low }}</text>
<text x="60" y="{{ height + 14 }}">{{ curve.first }}</text><text x="{{ width + 60 }}" y="{{ height + 14 }}" text-anchor="end">{{ curve.last }}</text>
{% if curve.mark is not none %}<line class="mark" x1="{{ curve.mark }}" y1="4" x2="{{ curve.mark }}" y2="{{ height }}"/>
<text x="{{ curve.mark + (-5 if curve.mark > width / 2 else 5) }}" y="14" text-anchor="{{ 'end' if curve.mark > width / 2 else 'start' }}">{{ curve.marked }}</text>{% endif %}
<polyline class="raw" points="{{ curve.raw }}"/><polyline class="line" points="{{ curve.smooth }}"/></svg>
{% else %}<p>No step has been logged.</p>{% endfor %}
{% if watched %}<h2>Copies and drift on the way</h2><table><tr><th>Step</th><th>Near-copies among the samples</th><th>Nearest training picture</th><th>Drift of unrelated pictures</th><th></th></tr>
{% for row in watched %}<tr><td>{{ row.step }}</td><td>{{ row.copies }}</td><td>{{ row.nearest }}</td><td>{{ row.drift }}</td><td>{{ row.pairs }}{{ row.stop }}</td></tr>{% endfor %}</table>
<p class="note">Likeness is 1 for the same picture; drift is the mean colour difference (OKLab) to what the base draws.</p>{% endif %}
<h2>Data</h2><p>{{ data.get("pictures", 0) }} pictures were trained{% if data.get("masks") %}, {{ data.masks }} of them where their masks say{% endif %}.{% if held_out %} {{ held_out | length }} were held out and never trained: {{ held_out | join(", ") }}.{% endif %} {{ left_out | length }} were left out{{ ":" if left_out else "." }}</p>
{% if left_out %}<table>{% for item in left_out %}<tr><td>{{ item.path }}</td><td>{{ item.reason }}</td></tr>{% endfor %}</table>{% endif %}
{% if data.get("warnings") %}<details><summary>{{ data.warnings | length }} warnings about the pictures</summary><table>{% for text in data.warnings %}<tr><td>{{ text }}</td></tr>{% endfor %}</table></details>{% endif %}
{% if data.get("folders", []) | length > 1 %}<table><tr><th>folder</th><th>kind</th><th>pictures</th><th>seen in an epoch</th><th>loss</th></tr>
{% for row in data.folders %}<tr><td>{{ row.folder }}</td><td>{{ "regularisation" if row.regularisation else "own" }}</td><td>{{ row.pictures }}</td>
<td>{{ "as often as the own ones together" if row.regularisation else row.seen }}</td><td>x {{ row.weight }}</td></tr>{% endfor %}</table>{% endif %}
{% if data.get("sizes") %}<table><tr><th>size</th><th>own pictures</th>{% if data.regularisation %}<th>regularisation pictures</th>{% endif %}</tr>
{% for row in data.sizes %}<tr><td>{{ row.size }}</td><td>{{ row.own }}</td>{% if data.regularisation %}<td>{{ row.regularisation }}</td>{% endif %}</tr>{% endfor %}</table>{% endif %}
{% if data.get("regularisation") %}<details><summary>{{ data.regularisation | length }} regularisation pictures</summary><ul>{% for path in data.regularisation %}<li>{{ path }}</li>{% endfor %}</ul></details>{% endif %}
{% if thoughts %}<h2>What was thought</h2><table><tr><th>Picture and caption</th><th>Trace</th><th>Trained as</th></tr>
{% for row in thoughts %}<tr><td>{{ row.picture }}<br><bdi>{{ row.prompt }}</bdi></td><td class="trace"><bdi>{{ row.trace }}</bdi></td><td><bdi>{{ row.enhanced if row.ok else "as it is: " ~ row.reason }}</bdi></td></tr>{% endfor %}</table>{% endif %}
{% if reasons %}<h2>Automatic choices</h2><table>{% for key, value in reasons.items() %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}</table>{% endif %}
{% if samples %}<h2>On the way</h2>{% for sample in samples %}<h3>{{ sample.name }}</h3>{% for picture in sample.pictures %}<img src="{{ picture }}" alt=""> {% endfor %}{% endfor %}{% endif %}
<h2>Recipe</h2><pre>{{ recipe }}</pre>
</body></html>
"""


def write_report(run: RunFolder) -> Path:
    """Write report.html from what lies in the run folder; works for unfinished runs too. Returns its path."""
    from jinja2 import Environment

    data, result = _read(run.data_summary), _read(run.result)
    rows = run.read_log()
    curves = curves_of(rows, run.read_validation(), _read(run.learning_rate))
    page = Environment(autoescape=True).from_string(PAGE).render(
        name=run.path.resolve().name, style=STYLE, style_hash=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
        sheet=_embedded(run.sheet), facts=_facts(result, rows), curves=curves, watched=_watched(run), width=CURVE_WIDTH, height=CURVE_HEIGHT,
        data=data, left_out=data.get("left_out", []), held_out=[Path(path).name for path in data.get("held_out", [])], thoughts=data.get("thoughts", []), reasons=result.get("reasons", {}), samples=_samples_on_the_way(run),
        recipe="".join(path.read_text(encoding="utf-8") for path in (run.recipe, run.path / "preference.toml") if path.exists()),
    )
    write_text(run.report, page)
    return run.report


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _facts(result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    if not result:
        return []
    proof = result["verified"]
    facts = [
        ("Tensors placed", f"{proof['placed']} of {proof['keys']}"),
        ("Output changed", f"by {proof['change']:.1%}" if proof.get("changed") else "no"),
        ("Base restored exactly after detaching", "yes" if proof.get("restored") else "no"),
        ("Baked equals attached", {True: "yes", False: "no", None: "not tested, the base is quantised"}[proof.get("baked_equals_attached")]),
        ("Steps", str(result["steps"]) + (f", resumed after step {result['resumed_from']}" if result.get("resumed_from") else "")),
        ("Time since then" if result.get("resumed_from") else "Whole time", f"{result['seconds']:.0f} s"),
        ("Peak memory", f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    if result.get("ended"):
        facts.append(("Ended early", result["ended"]))
    scales = [row["noise_scale"] for row in rows if row.get("noise_scale")]
    if scales:
        facts.append(("Gradient noise scale", f"about {scales[-1]:.3g} pictures a step: far below that, larger batches pay; far above, they do not"))
    seconds = sorted(row["seconds"] for row in rows)
    if seconds:
        facts.append(("Median step", f"{seconds[len(seconds) // 2]:.3f} s"))
    return facts


def _watched(run: RunFolder) -> list[dict[str, Any]]:
    """What was seen of memorisation and drift, by step; a resumed run looked at some steps twice, and the later look counts."""
    by_step = {row["step"]: row for row in run.read_validation() if "near_copies" in row}
    return [{
        "step": step, "copies": f"{row['near_copies']:.0%}", "nearest": f"{row['nearest']:.2f}", "drift": "" if row["drift"] is None else f"{row['drift']:.3f}",
        "pairs": "; ".join(f"{pair['picture']} is like {pair['training']}" for pair in row["pairs"]), "stop": f" Stopped here: {row['stop']}" if row["stop"] else "",
    } for step, row in sorted(by_step.items())]


def _samples_on_the_way(run: RunFolder) -> list[dict[str, Any]]:
    """Sample pictures between the first and the last, by step."""
    by_step: dict[str, list[Path]] = {}
    for path in sorted(run.samples.glob("step-*.png")):
        by_step.setdefault(path.stem.rpartition("-")[0], []).append(path)
    between = list(by_step.items())[1:-1]
    return [{"name": f"step {int(name.removeprefix('step-'))}", "pictures": [_embedded(path) for path in paths]} for name, paths in between]


def _embedded(path: Path) -> str | None:
    """A picture as a data URI, reduced to the widest that the page shows; None when there is none."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    if shown.width <= WIDEST_PICTURE:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    shown.thumbnail((WIDEST_PICTURE, WIDEST_PICTURE * 4))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

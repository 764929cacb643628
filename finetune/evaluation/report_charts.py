"""Intervals as pictures (SVG) and small pictures as data URIs, for a page that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from finetune.evaluation.evidence import Pixels

CHART_WIDTH, ROW_HEIGHT, MARGIN = 520, 34, 12
COLOURS = {"better": "#1d7a4f", "worse": "#b23a2b", "unclear": "#6b6b66"}
SMALLEST_EDGE, LARGEST_EDGE = 96, 256  # pixels shown in the page


def picture_uri(pixels: Pixels) -> str:
    """A picture for the page: small ones enlarged by whole factors, large ones reduced; PNG or JPEG as a data URI."""
    image = Image.fromarray(pixels)
    longest = max(image.size)
    if longest < SMALLEST_EDGE:
        factor = -(-SMALLEST_EDGE // longest)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif longest > LARGEST_EDGE:
        image.thumbnail((LARGEST_EDGE, LARGEST_EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "PNG" if longest <= 128 else "JPEG"
    image.save(buffer, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def interval_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """One measure: for each adapter a dot at the difference to the base and a line over its interval, zero marked.

    Returns SVG whose numbers are our own; names are put beside it by the page, never into it.
    """
    shown = [row for row in rows if row["delta"] is not None]
    if not shown:
        return ""
    ends = [0.0, *(value for row in shown for value in (row["delta"], row["low"], row["high"]) if value is not None)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    height = ROW_HEIGHT * len(shown)

    def x(value: float) -> float:
        return round(MARGIN + (value - low) / span * (CHART_WIDTH - 2 * MARGIN), 1)

    parts = [f'<svg viewBox="0 0 {CHART_WIDTH} {height}" width="{CHART_WIDTH}" height="{height}" role="img" aria-label="differences to the base with intervals">',
             f'<line x1="{x(0)}" y1="0" x2="{x(0)}" y2="{height}" stroke="#b9b4a8" stroke-dasharray="3 3"/>']
    for index, row in enumerate(shown):
        y, colour = index * ROW_HEIGHT + ROW_HEIGHT // 2, COLOURS[row["verdict"]]
        if row["low"] is not None:
            parts.append(f'<line x1="{x(row["low"])}" y1="{y}" x2="{x(row["high"])}" y2="{y}" stroke="{colour}" stroke-width="4" stroke-linecap="round"/>')
        parts.append(f'<circle cx="{x(row["delta"])}" cy="{y}" r="6" fill="{colour}" stroke="#fff" stroke-width="2"/>')
    return "".join([*parts, "</svg>"])

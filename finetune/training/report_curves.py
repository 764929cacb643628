"""Curves of the report as SVG points: numbers over steps, and the loss over learning rates of a range test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CURVE_WIDTH, CURVE_HEIGHT = 640, 160
MOST_POINTS = 640
# The last five are logged by preference runs.
CURVES = (("Loss", "loss"), ("Gradient norm", "grad_norm"), ("Learning rate", "lr"), ("Gradient noise scale, pictures a step", "noise_scale"),
          ("Reward on held-out prompts", "reward"), ("Witness reward", "held_out_reward"),
          ("Divergence from the base, nats a picture", "kl"), ("Variety within a prompt", "diversity"), ("Loss on the base's own pictures", "drift"))
HELD_OUT = "Loss on held-out pictures, at fixed noise"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A curve as SVG points: as measured, and smoothed. first, last: what stands at the ends of the axis.  mark: where the
    chosen point is, in pixels from the left, or None; `marked` says what it is."""

    title: str
    raw: str
    smooth: str
    low: str
    high: str
    first: str
    last: str
    mark: float | None = None
    marked: str = ""


def curves_of(log: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], search: Mapping[str, Any]) -> list[Curve]:
    """Every curve that a run has numbers for. log: a row a step.  measured: rows of validation.jsonl.  search: of learning_rate.json."""
    found = [_over_steps(title, finite_points(log, key)) for title, key in CURVES]
    return [curve for curve in (found[0], held_out_curve(measured), *found[1:], search_curve(search)) if curve]


def finite_points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite number under `key`."""
    return [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]


def _over_steps(title: str, points: Points) -> Curve | None:
    """The points, thinned to what a screen shows, and their average over a twentieth of the run; None for fewer than two."""
    if len(points) < 2:
        return None
    smooth, average, weight = [], 0.0, 0.0
    keep = 1 - min(1.0, 20 / len(points))
    for step, value in points:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((step, average / weight))
    return _curve(title, points, smooth, f"step {points[0][0]:.0f}", f"{points[-1][0]:.0f}")


def held_out_curve(measured: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The held-out loss from the bare base on, with its lowest point after the first step marked."""
    points = finite_points(measured, "held_out_loss")
    if len(points) < 2:
        return None
    best = min((point for point in points if point[0] > 0), key=lambda point: point[1])
    return _curve(HELD_OUT, points, points, f"step {points[0][0]:.0f}", f"{points[-1][0]:.0f}", best[0], f"lowest after step {best[0]:.0f}: {best[1]:.4g}")


def search_curve(search: Mapping[str, Any]) -> Curve | None:
    """Loss over the learning rate, which rises by powers of ten, with the chosen rate marked."""
    rates, losses, smooth = (search.get(key, []) for key in ("rates", "losses", "smoothed"))
    points = [(math.log10(rate), loss) for rate, loss in zip(rates, losses, strict=True)]
    if len(points) < 2:
        return None
    smoothed = [(point[0], loss) for point, loss in zip(points, smooth, strict=True)]
    return _curve("Search for a learning rate: loss while it rises", points, smoothed, f"{rates[0]:.0e}", f"{rates[-1]:.1e}", math.log10(search["chosen"]), f"taken: {search['chosen']:.2g}")


def _curve(title: str, raw: Points, smooth: Points, first: str, last: str, mark: float | None = None, marked: str = "") -> Curve:
    low, high = min(value for _, value in raw), max(value for _, value in raw)
    span = (raw[0][0], raw[-1][0])
    return Curve(title, _polyline(raw, span, low, high), _polyline(smooth, span, low, high), f"{low:.3g}", f"{high:.3g}", first, last,
                 None if mark is None else round(_place(mark, span), 1), marked)


def _place(x: float, span: tuple[float, float]) -> float:
    return 60 + CURVE_WIDTH * (x - span[0]) / ((span[1] - span[0]) or 1)


def _polyline(points: Points, span: tuple[float, float], low: float, high: float) -> str:
    thinned = points[:: max(1, len(points) // MOST_POINTS)]
    return " ".join(f"{_place(x, span):.1f},{CURVE_HEIGHT - (CURVE_HEIGHT - 6) * ((value - low) / (high - low or 1)):.1f}" for x, value in thinned)

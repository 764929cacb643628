"""Small charts as inline SVG: no script, no outside file, colours from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 220  # units of the drawing, which scales with the page
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30
MOST_POINTS = 4000


def _svg(inside: list[Markup], label: str, height: int = HEIGHT) -> Markup:
    body = Markup("").join(inside)
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, label, body)


def _text(x: float, y: float, text: object, anchor: str = "middle", kind: str = "tick") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, kind, escape(text))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, kind)


def _round_up(value: float) -> float:
    """The next of ... 0.1, 0.2, 0.5, 1, 2, 5, 10 ..."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def histogram(values: Sequence[float], *, label: str, unit: str, bins: int = 32, whole: bool = False, limits: Sequence[tuple[str, float]] = ()) -> Markup:
    """Bars of how many values fall where. whole: values are whole numbers.
    limits: (name, value) drawn as lines across, such as a text encoder's length."""
    if not values:
        return Markup('<p class="quiet">nothing to show</p>')
    low = min(0.0, min(values))
    high = max(max(values), *(value for _, value in limits)) if limits else max(values)
    high = high if high > low else low + 1
    step = max(_round_up((high - low) / bins), 1.0 if whole else 0.0)
    bins = max(1, math.ceil((high - low + 1e-9) / step))
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / step))] += 1
    parts = _bars(counts, [f"{low + i * step:g}" for i in range(bins + 1)], unit)
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    for name, value in limits:
        x = LEFT + wide * (value - low) / (bins * step)
        parts += [_line(x, TOP, x, TOP + tall, "limit"), _text(x - 5, TOP + 10, f"{name} {value:g}", "end", "limit-name")]
    return _svg(parts, label)


def size_histogram(pixels: Sequence[int], *, label: str) -> Markup:
    """Bars of how many pictures have how many pixels, each bar twice as many pixels as the one before."""
    if not pixels:
        return Markup('<p class="quiet">nothing to show</p>')
    powers = [math.floor(math.log2(count / 1e6)) for count in pixels]
    low, high = min(powers), max(powers)
    if high - low < 5:
        low, high = low - (5 - high + low) // 2, high + (6 - high + low) // 2
    counts = [0] * (high - low + 1)
    for power in powers:
        counts[power - low] += 1
    return _svg(_bars(counts, [_pixels(2.0**power) for power in range(low, high + 2)], "pixels"), label)


def _bars(counts: Sequence[int], edges: Sequence[str], unit: str) -> list[Markup]:
    """A bar each count; edges: what stands at the left of each bar and at the right of the last."""
    top = _round_up(max(counts))
    wide, tall, bins = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, len(counts)
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = TOP + tall * (1 - share)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(LEFT - 6, y + 4, f"{top * share:g}", "end")]
    for i, count in enumerate(counts):
        height = tall * count / top
        x = LEFT + wide * i / bins
        title = Markup("<title>{} to {} {}: {}</title>").format(edges[i], edges[i + 1], unit, count)
        if count:
            parts.append(Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5" class="bar">{}</rect>').format(x + 0.75, TOP + tall - height, max(1.0, wide / bins - 1.5), height, title))
    for i in range(0, bins + 1, max(1, bins // 8)):
        parts.append(_text(min(LEFT + wide * i / bins, WIDTH - 2 * RIGHT + 2), HEIGHT - 10, edges[i]))
    return parts


def _pixels(millions: float) -> str:
    """A number of pixels in a word."""
    return f"{millions:g} MP" if millions >= 1 else f"{millions * 1000:.0f}k" if millions >= 0.001 else f"{millions * 1e6:.0f}"


def size_scatter(sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]], *, label: str) -> Markup:
    """Pictures (dots) and buckets (rings) by shape, wide to the right, and by number of pixels, both logarithmic."""
    if not sizes:
        return Markup('<p class="quiet">nothing to show</p>')
    height = 300
    points = [(math.log2(w / h), math.log2(w * h / 1e6)) for h, w in [*sizes, *buckets]]
    reach = max(1.0, max(abs(x) for x, _ in points)) * 1.08
    low, high = min(y for _, y in points) - 0.4, max(y for _, y in points) + 0.4
    wide, tall = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * (x + reach) / (2 * reach), TOP + tall * (1 - (y - low) / (high - low))

    parts = []
    for name, ratio in (("1:4", 0.25), ("1:2", 0.5), ("2:3", 2 / 3), ("1:1", 1.0), ("3:2", 1.5), ("2:1", 2.0), ("4:1", 4.0)):
        if abs(math.log2(ratio)) < reach:
            x, _ = place(math.log2(ratio), low)
            parts += [_line(x, TOP, x, TOP + tall, "grid"), _text(x, height - 10, name)]
    for power in range(math.ceil(low / 2) * 2, math.floor(high) + 1, 2):
        _, y = place(0, power)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(LEFT - 6, y + 4, _pixels(2.0**power), "end")]
    step = max(1, len(sizes) // MOST_POINTS)
    for x, y in (place(*point) for point in points[: len(sizes) : step]):
        parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" class="dot"/>').format(x, y))
    for (x, y), (h, w) in zip((place(*point) for point in points[len(sizes) :]), buckets, strict=True):
        parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="7" class="ring"><title>{}x{}</title></circle>').format(x, y, w, h))
    return _svg(parts, label, height)


def shape_glyph(height: int, width: int, *, side: int = 34) -> Markup:
    """A small rectangle in the bucket's shape."""
    scale = (side - 4) / max(height, width)
    w, h = width * scale, height * scale
    return Markup('<svg class="glyph" viewBox="0 0 {0} {0}" width="{0}" height="{0}" aria-hidden="true"><rect x="{1:.1f}" y="{2:.1f}" width="{3:.1f}" height="{4:.1f}" rx="2"/></svg>').format(side, (side - w) / 2, (side - h) / 2, w, h)


def meter(share: float, *, most: float = 1.0) -> Markup:
    """A bar of fixed length, filled by share / most."""
    filled = 100 * max(0.0, min(1.0, share / most if most else 0.0))
    return Markup('<svg class="meter" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true"><rect width="100" height="6" class="track"/><rect width="{:.2f}" height="6" class="fill"/></svg>').format(filled)


STAND_ALONE_STYLE = (
    "text{font:11px sans-serif;fill:#6f675f}.grid{stroke:#e2dcd2}.dot{fill:#2f5d62;fill-opacity:.38}.ring{fill:none;stroke:#b4472c;stroke-width:2}"
)


def stand_alone_chart(sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]]) -> str:
    """`size_scatter` as the text of an SVG file of its own."""
    drawing = str(size_scatter(sizes, buckets, label="Pictures by shape and number of pixels; rings are the buckets"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" '
    opened, closed, rest = drawing.removeprefix("<svg ").partition(">")
    return f'{head}{opened}{closed}<style>{STAND_ALONE_STYLE}</style><rect width="100%" height="100%" fill="#fffefb"/>{rest}\n'

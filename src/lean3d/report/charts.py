"""Curves as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 36


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    x_label: str,
    *,
    bottom: float | None = None,
    top: float | None = None,
    mark: float | None = None,
) -> str:
    """A figure with up to three lines and a legend that gives each line's last value.

    Args:
        title: What the y axis is.
        lines: From a line's name to its points (x, y); lines without points are left out.
        x_label: What the x axis is.
        bottom: Least y that is shown at any rate.
        top: Greatest y that is shown at any rate.
        mark: A y at which a dashed line crosses the picture.

    Returns:
        A ``<figure>``, or "" where there is no point.
    """
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    x_ticks = nice_ticks(min(0.0, *(x for x, _ in every), 0.0), max(x for x, _ in every), whole=True)
    lows, highs = [y for _, y in every], [y for _, y in every]
    y_ticks = nice_ticks(
        min(lows) if bottom is None else min(bottom, *lows), max(highs) if top is None else max(top, *highs)
    )
    x_low, x_high, y_low, y_high = 0.0, max(x_ticks[-1], max(x for x, _ in every)), y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for tick in y_ticks:
        _, down = place(x_low, tick).split(",")
        parts.append(f'<path class="grid" d="M{LEFT},{down}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(down) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        across, _ = place(tick, y_low).split(",")
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if mark is not None:
        _, down = place(x_low, mark).split(",")
        parts.append(f'<path d="M{LEFT},{down}H{WIDTH - RIGHT}" stroke="var(--fg)" stroke-dasharray="2 4"/>')
    legend = []
    for number, (name, points) in enumerate(lines.items()):
        course = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline class="line c{number % 3}" points="{course}"/>')
        swatch = f'<svg viewBox="0 0 28 8" aria-hidden="true"><path class="line c{number % 3}" d="M0,4H28"/></svg>'
        legend.append(f"<li>{swatch}{escape(name)}: {points[-1][1]:.3g}</li>")
    words = "; ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in lines.items())
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title} over {x_label}: {words}")}">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers that begin at or below `low` and end at or above `high`.

    >>> nice_ticks(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-9)
    raw = span / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]

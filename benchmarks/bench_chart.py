"""A plain SVG of the results: how many times faster than the best dense attention, by length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

PANEL_WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 78
COLOURS = ("#1b6ca8", "#c1440e", "#2e7d32", "#7b3fa0", "#8d6e00", "#00838f")

Line = tuple[str, list[tuple[float, float]], str]
"""Name, points (length, ratio) and colour."""


def chart(records: Sequence[dict[str, Any]], title: str) -> str:
    """Two panels, prefill and decode; both axes are logarithmic. Dashed: the floor of this machine."""
    panels = []
    for place, (operation, dense) in enumerate((("layer", "dense"), ("decode", "decode dense"))):
        lines, dashed = _lines(records, operation, dense)
        panels.append(
            f'<g transform="translate({place * PANEL_WIDTH} 0)">{_panel(operation, lines, dashed)}</g>'
        )
    width = 2 * PANEL_WIDTH
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>'
        f'<text x="{LEFT}" y="14" font-size="12">{escape(title)}</text>{"".join(panels)}</svg>\n'
    )


def _lines(
    records: Sequence[dict[str, Any]], operation: str, dense: str
) -> tuple[list[Line], list[Line]]:
    """Measured ratios of our first implementation, and what the floors of both would give."""
    measured: dict[str, list[tuple[float, float]]] = {}
    floors: dict[str, list[tuple[float, float]]] = {}
    dense_floor = {
        (r["heads"], r["groups"], r["length"], r["batch"]): r["floor_ms"]
        for r in records
        if r["operation"] == dense and "floor_ms" in r
    }
    for r in records:
        if r["operation"] != operation or "dense_ratio" not in r or not r["ours"]:
            continue
        layout = f"{r['heads']}/{r['groups']}"
        words = (layout, r["implementation"], r["data"] if operation == "layer" else "")
        measured.setdefault(" ".join(w for w in words if w), []).append(
            (r["length"], r["dense_ratio"])
        )
        key = (r["heads"], r["groups"], r["length"], r["batch"])
        if r["implementation"] == "triton" and "floor_ms" in r and key in dense_floor:
            point = (r["length"], dense_floor[key] / r["floor_ms"])
            if point not in floors.setdefault(layout, []):
                floors[layout].append(point)
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(floors)}
    solid = [(n, sorted(p), colour.get(n.split()[0], "#444")) for n, p in measured.items()]
    return solid, [(n, sorted(p), colour[n]) for n, p in floors.items()]


def _panel(title: str, lines: list[Line], dashed: list[Line]) -> str:
    points = [point for _, line, _ in [*lines, *dashed] for point in line]
    head = (
        f'<text x="{LEFT}" y="{TOP - 6}">{escape(title)}: times faster than the best dense</text>'
    )
    if not points:
        return head + f'<text x="{LEFT}" y="{TOP + 30}" fill="#777">nothing was timed</text>'
    x_low, x_high = (math.log2(f(x for x, _ in points)) for f in (min, max))
    y_low = math.floor(math.log2(min(0.5, *(y for _, y in points))))
    y_high = math.ceil(math.log2(max(2.0, *(y for _, y in points))))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (math.log2(x) - x_low) / max(x_high - x_low, 1e-9)
        up = (math.log2(y) - y_low) / (y_high - y_low)
        return (
            LEFT + right * (PANEL_WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [head]
    for power in range(y_low, y_high + 1):
        _, y = place(2**x_low, 2**power)
        stroke = "#999" if power == 0 else "#e4e4e4"
        parts.append(
            f'<line x1="{LEFT}" x2="{PANEL_WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{stroke}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{2.0**power:g}x</text>'
        )
    for length in sorted({x for x, _ in points}):
        x, _ = place(length, 1)
        shown = f"{length / 1024:g}K" if length < 1 << 20 else f"{length / (1 << 20):g}M"
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{shown}</text>'
        )
    for collection, dash in ((dashed, ' stroke-dasharray="4 4"'), (lines, "")):
        for name, line, colour in collection:
            path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
            parts.append(f'<polyline fill="none" stroke="{colour}"{dash} points="{path}"/>')
            for x, y in line if not dash else ():
                cx, cy = place(x, y)
                tip = f"{name}: {y:.2f}x at {x:g}"
                parts.append(
                    f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{colour}">'
                    f"<title>{escape(tip)}</title></circle>"
                )
    for number, (name, _, colour) in enumerate(lines):
        x, y = LEFT + (number % 3) * 135, HEIGHT - BOTTOM + 34 + (number // 3) * 13
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return "".join(parts)

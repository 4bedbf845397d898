"""Small SVG charts with no script and no network; colours are the page's CSS variables (--c0 ...)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 14, 46
_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order of x; `colour` is an index into the page's palette.

    `band` gives (low, high) at each point, drawn as a tinted area.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    band: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Bar:
    """One row of an interval chart."""

    name: str
    estimate: float
    low: float
    high: float
    colour: int = 0


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    y_range: tuple[float, float] | None = None,
    doubling: bool = False,
    zero: bool = False,
) -> str:
    """Lines over x, with a legend.

    Args:
        marks: vertical lines with a word, such as a stage's begin.
        doubling: x on a logarithmic scale, with ticks at the points.
        zero: a line at y = 0, which is then inside.
    """
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points if math.isfinite(y)]
    ys += [end for one in series for ends in one.band for end in ends] + [0.0] * zero
    if not xs or not ys:
        return ""
    low, high = y_range or padded(min(ys), max(ys))
    frame = _Frame(min(xs), max(xs), low, high, doubling)
    parts = [_axes(frame, x_label, y_label, sorted(set(xs)) if doubling else None)]
    if zero:
        y = frame.y(0.0)
        parts.append(
            f'<line class="zero" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    for x, word in ((x, word) for x, word in marks if min(xs) <= x <= max(xs)):
        parts.append(
            f'<line class="mark" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{_TOP}" '
            f'y2="{HEIGHT - _BOTTOM}"/><text class="note" x="{frame.x(x) + 4:.1f}" y="{_TOP + 10}">'
            f"{escape(word)}</text>"
        )
    for one in series:
        kept = [(x, y) for x, y in one.points if math.isfinite(y)]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in kept)
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        colour = f"var(--c{one.colour % _COLOURS})"
        if one.band:
            edge = [(x, high) for (x, _), (_, high) in zip(one.points, one.band, strict=True)]
            edge += [
                (x, low)
                for (x, _), (low, _) in reversed(list(zip(one.points, one.band, strict=True)))
            ]
            outline = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in edge)
            parts.append(f'<polygon class="band" fill="{colour}" points="{outline}"/>')
        parts.append(f'<polyline fill="none" stroke="{colour}"{dash} points="{path}"/>')
        if len(kept) <= 40:
            parts += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{colour}">'
                f"<title>{escape(one.name)}: {number(y)} at {number(x)}</title></circle>"
                for x, y in kept
            ]
    legend = "".join(
        f'<span><i style="background:var(--c{one.colour % _COLOURS})"></i>{escape(one.name)}</span>'
        for one in series
    )
    return f'{_svg(HEIGHT, parts, y_label)}<div class="legend">{legend}</div>'


def interval_chart(bars: Sequence[Bar], *, x_label: str, mark: float | None = None) -> str:
    """Estimates with their intervals, one row each, a line at zero and a dashed one at `mark`."""
    if not bars:
        return ""
    ends = [0.0, *(bar.low for bar in bars), *(bar.high for bar in bars)]
    ends += [] if mark is None else [mark]
    low, high = padded(min(ends), max(ends))
    left, row = min(300, 16 + 9 * max(len(bar.name) for bar in bars)), 26
    room = (left - 16) // 7
    height = row * len(bars) + 44
    span = WIDTH - left - _RIGHT

    def place(value: float) -> float:
        return left + span * (value - low) / (high - low)

    bottom = height - 36
    parts = [
        f'<line class="grid" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="6" y2="{bottom}"/>'
        f'<text class="tick" text-anchor="middle" x="{place(tick):.1f}" y="{bottom + 15}">'
        f"{number(tick)}</text>"
        for tick in ticks(low, high)
    ]
    parts.append(
        f'<line class="zero" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="6" y2="{bottom}"/>'
    )
    if mark is not None:
        x = f"{place(mark):.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="6" y2="{bottom}"/>')
    for step, bar in enumerate(bars):
        y = 20 + row * step
        colour = f"var(--c{bar.colour % _COLOURS})"
        name = escape(_cut(bar.name, room))
        tip = f"{bar.name}: {number(bar.estimate)} ({number(bar.low)} to {number(bar.high)})"
        parts.append(
            f'<text class="row" text-anchor="end" x="{left - 10}" y="{y + 4}">{name}</text>'
            f'<line stroke="{colour}" stroke-width="3" stroke-linecap="round" '
            f'x1="{place(bar.low):.1f}" x2="{place(bar.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{place(bar.estimate):.1f}" cy="{y}" r="5" fill="{colour}">'
            f"<title>{escape(tip)}</title></circle>"
        )
    parts.append(
        f'<text class="label" text-anchor="middle" x="{left + span / 2:.0f}" y="{height - 4}">'
        f"{escape(x_label)}</text>"
    )
    return _svg(height, parts, x_label)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: float) -> str:
    """A short number for axes and tips."""
    if value == 0:
        return "0"
    size, name = abs(value), ""
    if size >= 1e4:
        size, name = (size / 1e6, "M") if size >= 1e6 else (size / 1e3, "k")
    sign = "\N{MINUS SIGN}" if value < 0 else ""
    return f"{sign}{size:.3g}{name}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values between two ends."""
    step = (high - low) / wanted
    scale = 10 ** math.floor(math.log10(step))
    step = min((scale * nice for nice in (1, 2, 5, 10)), key=lambda nice: abs(nice - step))
    first = math.ceil(low / step)
    return [round(place * step, 12) for place in range(first, math.floor(high / step) + 1)]


def padded(low: float, high: float) -> tuple[float, float]:
    """A scale's ends with some room around the values."""
    room = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-3)
    return low - room, high + room


@dataclass(frozen=True)
class _Frame:
    """From data to picture coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    doubling: bool = False

    def x(self, value: float) -> float:
        low, high = self.x_low, self.x_high
        if self.doubling:
            low, high, value = (math.log2(one) for one in (low, high, value))
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - low) / max(high - low, 1e-12)

    def y(self, value: float) -> float:
        inside = min(max(value, self.y_low), self.y_high)
        share = (inside - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share


def _axes(frame: _Frame, x_label: str, y_label: str, places: Sequence[float] | None) -> str:
    """Ticks, grid and labels; `places` are the x ticks where they are not round numbers."""
    parts = []
    for tick in ticks(frame.y_low, frame.y_high):
        y = frame.y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{number(tick)}</text>'
        )
    if frame.x_high > frame.x_low:
        for tick in places or ticks(frame.x_low, frame.x_high, 6):
            shown = f"{tick / 1024:g}K" if places and tick % 1024 == 0 else number(tick)
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{frame.x(tick):.1f}" '
                f'y="{HEIGHT - _BOTTOM + 18}">{shown}</text>'
            )
    middle = _TOP + (HEIGHT - _TOP - _BOTTOM) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" x="{WIDTH / 2:.0f}" y="{HEIGHT - 6}">'
        f"{escape(x_label)}</text>"
        f'<text class="label" text-anchor="middle" transform="translate(12 {middle:.0f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _svg(height: int, parts: Sequence[str], label: str) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )

"""Where the marks of report.html's charts stand: plain numbers in the units of an SVG viewBox; the
template draws them.

Every chart is laid out for a given width, so that the report can hold one drawing for a desktop and
one for a phone: text in an SVG that is merely scaled down can't be read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.exports.units import format_nbytes

HEIGHT = 240
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 34  # margins: room for labels of ticks


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in viewBox units."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A bar (x, y, width, height) or a point (x, y) of a series, with the text that hovering
    shows."""

    series: str
    x: float
    y: float
    tip: str
    width: float = 0.0
    height: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing: its size, ticks, marks, and lines as (series, points attribute of an SVG
    polyline)."""

    width: int
    height: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    lines: list[tuple[str, str]]
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def _r(value: float) -> float:
    """Rounded for the page: a tenth of a pixel is enough, and the text is the same on every
    machine."""
    return round(value, 1)


def nice_step(top: float, count: int = 4) -> float:
    """A step of 1, 2 or 5 times a power of ten with which about `count` ticks reach `top` > 0."""
    raw = top / count
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(f for f in (1, 2, 5, 10) if f * power >= raw * 0.999)


def linear_ticks(top: float) -> list[float]:
    """Values from 0 up to the first nice one that is at least `top`."""
    if top <= 0:
        return [0.0, 1.0]
    step = nice_step(top)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 0.002 → "0.002", 2e-06 → "2e-6"."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def tokens_label(tokens: float) -> str:
    """1024 → "1k", 2^20 → "1M", 300 → "300"."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def layer_bars(
    width: int, series: Mapping[str, Sequence[float]], tips: Sequence[str], stacked: bool
) -> Chart:
    """Bars over layers, the series side by side or on top of each other.

    Args:
        series: name → one value ≥ 0 a layer.
        tips: what hovering over a layer shows.
    """
    names = list(series)
    count = len(tips)
    tops = [
        sum(series[n][i] for n in names) if stacked else max(series[n][i] for n in names)
        for i in range(count)
    ]
    ticks = linear_ticks(max(tops))
    plot_w, plot_h = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    slot = plot_w / count
    bar = slot * 0.76 / (1 if stacked else len(names))
    marks = []
    for i, tip in enumerate(tips):
        base = float(HEIGHT - BOTTOM)
        for k, name in enumerate(names):
            height = plot_h * series[name][i] / ticks[-1]
            x = LEFT + slot * (i + 0.12) + (0 if stacked else bar * k)
            marks.append(Mark(name, _r(x), _r(base - height), tip, max(_r(bar), 0.5), _r(height)))
            if stacked:
                base -= height
    every = max(1, math.ceil(count / max(1, plot_w // 34)))
    x_ticks = [Tick(_r(LEFT + slot * (i + 0.5)), str(i)) for i in range(0, count, every)]
    y_ticks = [Tick(_r(HEIGHT - BOTTOM - plot_h * t / ticks[-1]), short(t)) for t in ticks]
    return Chart(width, HEIGHT, x_ticks, y_ticks, marks, [])


def memory_lines(
    width: int, lines: Mapping[str, Sequence[tuple[int, int]]], point: tuple[int, int]
) -> Chart:
    """Bytes against tokens, both axes logarithmic.

    Args:
        lines: series → (tokens, bytes), rising.
        point: the budget's (tokens, bytes), marked.
    """
    tokens = [t for points in lines.values() for t, _ in points]
    nbytes = [b for points in lines.values() for _, b in points]
    lo_x, hi_x = math.log2(min(tokens)), math.log2(max(tokens))
    lo_y, hi_y = math.floor(math.log2(min(nbytes))), math.ceil(math.log2(max(nbytes)))
    plot_w, plot_h = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(t: float, b: float) -> tuple[float, float]:
        x = LEFT + plot_w * (math.log2(t) - lo_x) / max(hi_x - lo_x, 1e-9)
        return _r(x), _r(HEIGHT - BOTTOM - plot_h * (math.log2(b) - lo_y) / max(hi_y - lo_y, 1e-9))

    drawn = [
        (name, " ".join(f"{x},{y}" for x, y in (place(*p) for p in points)))
        for name, points in lines.items()
    ]
    marks = [
        Mark(name, *place(t, b), f"{name}: {format_nbytes(b)} at {t} tokens")
        for name, points in lines.items()
        for t, b in points
    ]
    marks.append(
        Mark("budget", *place(*point), f"budgeted: {format_nbytes(point[1])} at {point[0]} tokens")
    )
    step_x = max(1, math.ceil((hi_x - lo_x) / max(1, plot_w // 52)))
    step_y = max(1, math.ceil((hi_y - lo_y) / 6))
    x_ticks = [
        Tick(place(2.0**e, 2.0**lo_y)[0], tokens_label(2.0**e))
        for e in range(math.ceil(lo_x), math.floor(hi_x) + 1, step_x)
    ]
    y_ticks = [
        Tick(place(2.0**lo_x, 2.0**e)[1], format_nbytes(2**e).replace(".00", ""))
        for e in range(lo_y, hi_y + 1, step_y)
    ]
    return Chart(width, HEIGHT, x_ticks, y_ticks, marks, drawn)


def loss_points(width: int, points: Sequence[tuple[str, float, float, str, str]]) -> Chart:
    """KL on a logarithmic axis against bits.

    Args:
        points: (series, bits, KL in nats, label, tip); a KL of 0 stands on the lowest line.
    """
    kls = [kl for _, _, kl, _, _ in points if kl > 0] or [1e-6]
    lo_y, hi_y = math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)) + 1e-9)
    hi_y = max(hi_y, lo_y + 1)
    ticks = linear_ticks(max(bits for _, bits, _, _, _ in points))
    plot_w, plot_h = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(bits: float, kl: float) -> tuple[float, float]:
        height = (math.log10(max(kl, 10.0**lo_y)) - lo_y) / (hi_y - lo_y)
        return _r(LEFT + plot_w * bits / ticks[-1]), _r(HEIGHT - BOTTOM - plot_h * height)

    marks = [
        Mark(series, *place(bits, kl), tip, label=label) for series, bits, kl, label, tip in points
    ]
    x_ticks = [Tick(place(t, 1.0)[0], short(t)) for t in ticks]
    y_ticks = [Tick(place(0, 10.0**e)[1], short(10.0**e)) for e in range(lo_y, hi_y + 1)]
    return Chart(width, HEIGHT, x_ticks, y_ticks, marks, [])

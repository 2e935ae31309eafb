"""Small line plots as SVG: panels side by side, a line for each series, its 95 % interval behind it."""

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 420, 320  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 48, 44
COLOURS = ("#1f5fbf", "#d9541e", "#2b8a4b", "#7a3fa0")
INK, FAINT = "#222", "#ddd"


class Series(NamedTuple):
    """points: (x, y) or (x, y, low, high) each, x rising."""

    name: str
    points: tuple


class Panel(NamedTuple):
    """title, names of the axes, Series; `log` are the axes with logarithmic scale, "", "x", "y" or "xy"."""

    title: str
    x: str
    y: str
    series: tuple
    log: str = ""


def svg(panels):
    """The text of an SVG file of Panels."""
    width = WIDTH * len(panels)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}"><rect width="100%" height="100%" fill="white"/>'
    )
    parts = [f'<g transform="translate({i * WIDTH} 0)">{"".join(_panel(p))}</g>' for i, p in enumerate(panels)]
    return "\n".join([head, *parts, "</svg>", ""])


def ticks(low, high, log=False):
    """Round numbers in [low, high], four to eight of them; 1, 2 and 5 times powers of ten if `log`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [k * 10.0**n for n in powers for k in (1, 2, 5)]
    else:
        step = 10.0 ** math.floor(math.log10((high - low) / 4))
        step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 7)
        found = [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _scale(values, log, begin, end):
    """(value -> pixel, ticks) for an axis that holds the values."""
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
        low_at, span = math.log10(low), math.log10(high / low)
        return lambda v: begin + (math.log10(v) - low_at) / span * (end - begin), ticks(low, high, True)
    room = 0.06 * (high - low) or 0.5
    low, high = low - room, high + room
    return lambda v: begin + (v - low) / (high - low) * (end - begin), ticks(low, high)


def _panel(panel):
    points = [p for series in panel.series for p in series.points]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x_at, x_ticks = _scale([p[0] for p in points], "x" in panel.log, LEFT, right)
    y_at, y_ticks = _scale([value for p in points for value in p[1:]], "y" in panel.log, bottom, TOP)
    yield _text(LEFT, 18, panel.title, "start", "bold")
    yield _text((LEFT + right) / 2, HEIGHT - 8, panel.x)
    yield f'<g transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)">{_text(0, 0, panel.y)}</g>'
    for value in y_ticks:
        yield f'<path d="M{LEFT} {y_at(value):.1f}H{right}" stroke="{FAINT}"/>'
        yield _text(LEFT - 6, y_at(value) + 4, f"{value:g}", "end")
    for value in x_ticks:
        yield f'<path d="M{x_at(value):.1f} {bottom}v5" stroke="{INK}"/>'
        yield _text(x_at(value), bottom + 18, f"{value:g}")
    yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" stroke="{INK}" fill="none"/>'
    for number, series in enumerate(panel.series):
        colour = COLOURS[number % len(COLOURS)]
        at = [tuple([x_at(p[0]), *map(y_at, p[1:])]) for p in series.points]
        if len(at[0]) == 4:
            edge = [(p[0], p[3]) for p in at] + [(p[0], p[2]) for p in reversed(at)]
            yield f'<path d="{_path(edge)}Z" fill="{colour}" opacity="0.15"/>'
        yield f'<path d="{_path(at)}" stroke="{colour}" stroke-width="2" fill="none"/>'
        yield "".join(f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="3" fill="{colour}"/>' for p in at)
        if len(panel.series) > 1:
            begin = LEFT + 4 + number * (right - LEFT) / len(panel.series)
            yield f'<circle cx="{begin:.1f}" cy="34" r="4" fill="{colour}"/>'
            yield _text(begin + 10, 38, series.name, "start")


def _path(points):
    return "M" + "L".join(f"{p[0]:.1f} {p[1]:.1f}" for p in points)


def _text(x, y, text, anchor="middle", weight="normal"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'

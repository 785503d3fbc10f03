"""The plots of a plan's page, as SVG inside it: as wide as the page, with text of one size whatever the width.

Horizontal places are percentages of the width, vertical ones pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.plan.markup import Markup, tag
from posttrain.train.chips import GIB

BAR = 26
"""Height of a bar, in pixels."""


@dataclass(frozen=True)
class Part:
    """A piece of a bar: its colour is the `number`-th of the style's."""

    name: str
    amount: float
    number: int


def stacked(
    rows: Sequence[tuple[str, Sequence[Part]]], *, show: Callable[[float], str], limit: tuple[str, float] | None
) -> Markup:
    """Bars of parts, each under its name; `limit` is a line across all. `show` writes an amount."""
    ends = [sum(part.amount for part in parts) for _, parts in rows]
    most: float = max([*ends, *([limit[1]] if limit else [])]) or 1.0
    share = 92.0 / most
    pieces, top = [], 20 if limit else 0
    for (name, parts), end in zip(rows, ends, strict=True):
        pieces.append(tag("text", f"{name}: {show(end)}", x=0, y=top + 14, class_="on"))
        at = 0.0
        for part in parts:
            pieces.append(_bar(f"{part.name}: {show(part.amount)}", at * share, part.amount * share, top, part.number))
            at += part.amount
        top += 20 + BAR + 14
    if limit:
        x = f"{limit[1] * share:.3f}%"
        pieces.append(tag("line", x1=x, x2=x, y1=16, y2=top - 8, class_="limit"))
        pieces.append(tag("text", f"{limit[0]} {show(limit[1])}", x=x, y=12, text_anchor="end"))
    told = "; ".join(f"{name} {show(end)}" for (name, _), end in zip(rows, ends, strict=True))
    return tag("svg", *pieces, width="100%", height=top, role="img", aria_label=told)


def _bar(title: str, start: float, width: float, top: int, number: int) -> Markup:
    """Percentages of the width; `top` is where its name begins."""
    place = {"x": f"{start:.3f}%", "y": top + 20, "width": f"{width:.3f}%", "height": BAR}
    return tag("rect", tag("title", title), **place, class_=f"part c{number}")


def legend(parts: Sequence[Part], *, show: Callable[[float], str]) -> Markup:
    """Names, colours and amounts of parts."""
    items = []
    for part in parts:
        square = tag("rect", width=12, height=12, class_=f"c{part.number}")
        key = tag("svg", square, width=12, height=12, aria_hidden="true")
        items.append(tag("li", key, tag("span", part.name), tag("strong", show(part.amount))))
    return tag("ul", *items, class_="legend")


def side_by_side(bars: Sequence[tuple[str, float]], band: Sequence[float]) -> Markup:
    """Times of one step, ms, one bar each, and the range of the step's own time as a band behind them."""
    most = max(*(seconds for _, seconds in bars), *band)
    share = 92.0 / most
    height = 18 + len(bars) * (20 + BAR + 8)
    low, high = (end * share for end in band)
    anchor = "end" if high > 60 else "start"
    pieces = [
        tag("rect", x=f"{low:.3f}%", y=16, width=f"{max(high - low, 0.3):.3f}%", height=height - 16, class_="band"),
        tag("text", "predicted step", x=f"{high if high > 60 else low:.3f}%", y=12, text_anchor=anchor),
    ]
    for number, (name, seconds) in enumerate(bars):
        label, top = f"{name}: {milliseconds(seconds)}", 18 + number * (20 + BAR + 8)
        pieces.append(tag("text", label, x=0, y=top + 14, class_="on"))
        pieces.append(_bar(label, 0.0, max(seconds * share, 0.2 if seconds else 0.0), top, number + 1))
    told = "; ".join(f"{name} {milliseconds(seconds)}" for name, seconds in bars)
    return tag("svg", *pieces, width="100%", height=height, role="img", aria_label=f"Times of a step: {told}")


def scatter(compiled: Sequence[dict[str, Any]], room: float) -> Markup:
    """Every compiled candidate: memory across, time up with its range; what fits is filled, the first one named."""
    height, left, bottom = 330, 11.0, 44
    most = 1.06 * max(room, *(one["memory_bytes"] for one in compiled))
    ends = [one["seconds_per_token"] for one in compiled]
    longest, shortest = 1.04 * max(high for _, _, high in ends), 0.92 * min(low for low, _, _ in ends)

    def x(memory: float) -> str:
        return f"{left + (96 - left) * memory / most:.3f}%"

    def y(seconds: float) -> float:
        return round((height - bottom) * (longest - seconds) / (longest - shortest) + 18, 2)

    pieces: list[Markup] = []
    for tick in _ticks(1e6 * shortest, 1e6 * longest):
        level = y(tick / 1e6)
        pieces.append(tag("line", x1=f"{left}%", x2="96%", y1=level, y2=level, class_="grid"))
        pieces.append(tag("text", f"{tick:g}", x=f"{left - 1}%", y=level + 4, text_anchor="end"))
    for tick in _ticks(0.0, most / GIB):
        pieces.append(tag("text", f"{tick:g}", x=x(tick * GIB), y=height - 8, text_anchor="middle"))
    pieces.append(tag("text", "µs a token", x=0, y=10))
    pieces.append(tag("text", "GiB a device", x="96%", y=height + 8, text_anchor="end"))
    pieces.append(tag("line", x1=x(room), x2=x(room), y1=14, y2=height - bottom + 18, class_="limit"))
    pieces.append(tag("text", f"{room / GIB:.4g} GiB", x=x(room), y=10, text_anchor="end"))
    for one in sorted(compiled, key=lambda one: one["rank"] != 1, reverse=True):
        pieces.append(_point(one, x, y))
    fits = sum(one["rank"] is not None for one in compiled)
    told = (
        f"{len(compiled)} compiled candidates by memory and time, of which {fits} fit; the table below has all numbers"
    )
    return tag("svg", *pieces, width="100%", height=height + 12, role="img", aria_label=told)


def _point(one: dict[str, Any], x: Any, y: Any) -> Markup:
    low, middle, high = one["seconds_per_token"]
    at = x(float(one["memory_bytes"]))
    kind = "first" if one["rank"] == 1 else "fits" if one["rank"] else "misfit"
    title = f"{one['text']}: {one['memory_bytes'] / GIB:.2f} GiB, {1e6 * low:.4g} to {1e6 * high:.4g} µs a token"
    pieces = [
        tag("title", title),
        tag("line", x1=at, x2=at, y1=y(low), y2=y(high), class_="ends"),
        tag("circle", cx=at, cy=y(middle), r=7 if one["rank"] == 1 else 5),
    ]
    if one["as_configured"]:
        pieces.append(tag("circle", cx=at, cy=y(middle), r=11, class_="ring"))
    if one["rank"] == 1:
        pieces.append(tag("text", "first", x=at, y=y(high) - 6, class_="on", text_anchor="middle"))
    return tag("g", *pieces, class_=f"point {kind}")


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers between, four to ten of them."""
    step = 10.0 ** math.floor(math.log10((most - least) / 4))
    step *= next(factor for factor in (5, 2, 1) if (most - least) / (factor * step) >= 4)
    return [round(number * step, 10) for number in range(math.ceil(least / step), int(most / step) + 1)]


def size(number: float) -> str:
    """Bytes, in GiB or MiB."""
    return f"{number / GIB:,.2f} GiB" if number >= 0.01 * GIB else f"{number / 2**20:,.3g} MiB"


def milliseconds(seconds: float) -> str:
    """Four digits of them."""
    return f"{1000 * seconds:,.4g} ms" if seconds < 10 else f"{1000 * seconds:,.0f} ms"

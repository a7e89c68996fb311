"""What a comparison of numbers found, as a person reads it: a table, and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import NonFiniteError, shown
from ...pipeline import Pipeline
from ...request import Request
from ...result import finish
from ...system.finite import watching
from ..layers import by_part
from ..taps import watched
from . import svg

MOST = 8  # rows of a list of the largest


def as_text(facts: Mapping[str, Any], parts: Sequence[str]) -> str:
    """parts: names of the blocks that have a row each."""
    lines = [f"{facts['a']} and {shown(facts['b'], 200)}: relative errors, each the largest over all that was run"]
    first, accumulated = facts["first"], facts["first_accumulated"]
    bound = "that differs at all" if not facts["bound"] else f"whose own error is past {facts['bound']:g}"
    lines.append(f"  first layer {bound}: {'none' if first is None else said(first, 'entering')}")
    if facts["bound"]:
        where = "none" if accumulated is None else said(accumulated, "accumulated")
        lines.append(f"  first past {facts['bound']:g} by what accumulated: {where}")
    rows = by_part(facts, in_order_of_running(facts, parts))
    wide = max([len("block"), *(len(row["name"]) for row in rows)])
    lines.append(f"  {'block'.ljust(wide)}{'enters':>10}{'accum.':>10}{'largest':>10}  where most enters")
    for row in rows:
        inside = row["in"].removeprefix(row["name"]).strip(".") or "itself"
        numbers = f"{row['entering']:>10.2g}{row['accumulated']:>10.2g}{row['largest']:>10.4g}"
        lines.append(f"  {row['name'].ljust(wide)}{numbers}  {inside}")
    lines.append("  largest numbers, and how many times they fit below float16's 65,504:")
    for layer in sorted(facts["layers"], key=lambda layer: -layer["largest"])[:MOST]:
        lines.append(f"    {layer['largest']:>10.4g}{layer['margin'] or math.inf:>10.3g} x  {layer['name']}")
    total = max(sum(facts["ulps"].values()), 1)
    lines.append(f"  units in the last place of {facts['rounding']} that the innermost layers' numbers are off, up to:")
    shares = [f"{name}: {100 * count / total:.3g} %" for name, count in facts["ulps"].items() if count]
    lines += [f"    {', '.join(shares[i : i + 8])}" for i in range(0, len(shares), 8)]
    return "\n".join(lines)


def said(layer: Mapping[str, Any], which: str) -> str:
    return f"{layer['name']} ({layer['kind']}), {layer[which]:.2g}"


def in_order_of_running(facts: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Those parts that were compared, themselves or by the layers within."""
    names = [layer["name"] for layer in facts["layers"]]
    places = {part: next((i for i, name in enumerate(names) if f"{name}.".startswith(f"{part}.")), None) for part in parts}
    return sorted((part for part in parts if places[part] is not None), key=lambda part: places[part] or 0)


LEFT, TOP, WIDTH, HEIGHT = 70, 60, 980, 380  # of the field of a plot
ENTERS, ACCUMULATED = "#2f5d8a", "#b5651d"


@dataclass(frozen=True)
class Scale:
    """Layers from left to right, errors from 10^low to 10^high upward."""

    low: int
    high: int
    count: int

    def place(self, i: int, value: float) -> tuple[float, float]:
        level = math.log10(value) if 0 < value < math.inf else self.low if value <= 0 else self.high
        share = (self.high - min(max(level, self.low), self.high)) / (self.high - self.low)
        return LEFT + WIDTH * (i + 0.5) / self.count, TOP + HEIGHT * share


def plot(facts: Mapping[str, Any]) -> str:
    """An SVG: every layer in the order in which they end, what enters in it and what has accumulated, on a logarithmic scale."""
    layers = facts["layers"]
    numbers = [layer[which] for layer in layers for which in ("entering", "accumulated")]
    positive = [each for each in numbers if 0 < each < math.inf] or [1e-8]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    scale = Scale(low, max(high, low + 1), len(layers))
    title = f"{facts['a']} and {shown(facts['b'], 80)}: where errors enter and accumulate"
    drawn = [svg.box(0, 0, 1100, 520, svg.PAPER), svg.text(LEFT, 30, title, 17, font_weight="600"), *axes(scale, layers)]
    accumulated = [scale.place(i, layer["accumulated"]) for i, layer in enumerate(layers) if layer["accumulated"] > 0]
    drawn.append(svg.line(accumulated, ACCUMULATED, 1.6, stroke_linejoin="round"))
    for i, layer in enumerate(layers):
        if layer["entering"] > 0:
            x, y = scale.place(i, layer["entering"])
            label = svg.titled(f"{layer['name']}: {layer['entering']:.2g}")
            drawn.append(
                svg.element("circle", label, cx=x, cy=y, r=2.6, fill=ENTERS, fill_opacity=0.75 if layer["inner"] else 0.3)
            )
    enters = "enters: this layer alone, given A's input (pale: with the layers within it)"
    drawn += [svg.element("circle", cx=75.0, cy=497.0, r=4, fill=ENTERS), svg.text(86, 501, enters)]
    drawn += [svg.line([(590, 497), (615, 497)], ACCUMULATED, 2), svg.text(623, 501, "has accumulated: B by itself")]
    return svg.picture(1100, 520, drawn, title)


def axes(scale: Scale, layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each power of ten, and one where a network begins."""
    for power in range(scale.low, scale.high + 1):
        _, y = scale.place(0, 10.0**power)
        yield svg.line([(LEFT, y), (LEFT + WIDTH, y)], "#e4e7eb", 1)
        yield svg.text(LEFT - 8, y + 4, f"1e{power}", 11, svg.PALE, text_anchor="end")
    names = [layer["name"].split(".")[0] for layer in layers]
    for i, name in enumerate(names):
        if name not in names[:i]:
            x = LEFT + WIDTH * i / scale.count
            yield svg.line([(x, TOP), (x, TOP + HEIGHT)], svg.LINE, 1)
            yield svg.text(x + 4, TOP + HEIGHT + 18, name, 11, svg.PALE)


def first_nonfinite(pipe: Pipeline, request: Request) -> dict[str, Any] | None:
    """Draws, and gives the facts of the first module that leaves the finite numbers; None where none does.  Draws the plain way.

    Raises what drawing raises beside NonFiniteError.
    """
    names = {name: pipe.model.get_submodule(name) for name, _ in pipe.model.named_children()}
    with watched(pipe), watching(names) as found:
        try:
            finish(pipe.stream(request))
        except NonFiniteError:
            if not found:
                raise
    return found[0].facts() if found else None

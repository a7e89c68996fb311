"""Drawings as SVG text: shapes as elements, numbers short, whatever a file or a user says escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

INK, PALE, LINE, PAPER = "#2b2f36", "#767c86", "#a9afb8", "#ffffff"
FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"


def short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")


def element(name: str, inner: str = "", **attributes: Any) -> str:
    """<name …>inner</name>; an underscore in the name of an attribute is a hyphen, one at its end is none."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{short(value) if isinstance(value, float) else escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{said}>{inner}</{name}>" if inner else f"<{name}{said}/>"


def text(x: float, y: float, words: str, size: float = 12, fill: str = INK, **attributes: Any) -> str:
    return element("text", escape(words), x=float(x), y=float(y), font_size=size, fill=fill, **attributes)


def titled(words: str) -> str:
    """What is shown where the pointer rests on an element."""
    return element("title", escape(words)) if words else ""


def box(x: float, y: float, width: float, height: float, fill: str, title: str = "", **attributes: Any) -> str:
    return element(
        "rect", titled(title), x=float(x), y=float(y), width=float(width), height=float(height), fill=fill, **attributes
    )


def line(points: Sequence[tuple[float, float]], stroke: str, width: float = 1.5, **attributes: Any) -> str:
    path = " ".join(f"{short(x)},{short(y)}" for x, y in points)
    return element("polyline", "", points=path, fill="none", stroke=stroke, stroke_width=width, **attributes)


def picture(width: float, height: float, parts: Sequence[str], title: str = "") -> str:
    """A whole drawing of so many units, which a page may show at any size."""
    inner = (titled(title) if title else "") + "".join(parts)
    return element(
        "svg", inner, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {short(width)} {short(height)}", style=FONT,
        width=float(width), height=float(height), role="img",
    )  # fmt: skip

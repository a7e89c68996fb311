"""The figures that matter most, out of all that `bench all` has measured, each beside its floor and the best of its peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
COLUMNS = ("time ms", "floor ms", "best peer ms", "to ours", "which peer")

# Rows of `bench kernels`: kernel, shape.
SHAPES = [
    ("group_norm", "SD 1.5 320@64x64"),
    ("group_norm", "VAE 128@1024x1024"),
    ("attention", "SD 1.5 self d=40 64x64"),
    ("attention", "SDXL self d=64 64x64"),
    ("wide_attention", "VAE d=512 128x128"),
]
NETWORKS = ["SD 1.5 UNet step", "SD 2.1-768 UNet step", "SDXL UNet step", "VAE decoding 512x512", "VAE decoding 1024x1024"]
OURS = ("minisd, whole step as drawn", "minisd, fused")  # of a network: the first that there is
FLOOR = "floor: the arithmetic alone"


def summary(tables: list[dict[str, Any]]) -> Iterator[tuple[str, Row]]:
    """(label, values) for each figure that was measured."""
    for name in NETWORKS:
        rows = rows_of(tables, f"{name}")
        times = {row["label"]: row["time_ms"] for row in rows if row.get("time_ms")}
        ours = next((times[label] for label in OURS if label in times), None)
        peers = {label: time for label, time in times.items() if label.startswith("diffusers")}
        yield from compared(name, ours, times.get(FLOOR), peers)
    for kernel, shape in SHAPES:
        rows = [row for row in rows_of(tables, f"{kernel}, ") if row["label"].startswith(shape) and row.get("time_us")]
        times = {row["variant"]: row["time_us"] for row in rows}
        ours = times.pop("minisd", None)
        share = next((row["of_ceiling"] for row in rows if row["variant"] == "minisd"), None)
        theirs = {variant: time for variant, time in times.items() if not variant[0].isdigit()}  # without other tiles of ours
        yield from compared(f"{kernel} {shape}", ours, ours * share if ours and share else None, theirs)
    for row in rows_of(tables, "SD 1.5 picture"):
        if row["label"].startswith(("minisd, prompt", "cold process", "the same, kernels")):
            peers = {
                each["label"]: each.get("time_s") for each in rows_of(tables, "SD 1.5 picture") if "diffusers" in each["label"]
            }
            yield from compared(f"SD 1.5: {row['label']}", row.get("time_s"), None, peers if "prompt" in row["label"] else {})
    for row in rows_of(tables, "opening a "):
        if row["label"].startswith("minisd"):
            peers = {each["label"]: each.get("time_s") for each in rows_of(tables, "opening a ") if "diffusers" in each["label"]}
            rate = f" at {row['GB/s']:.3g} GB/s" if row.get("GB/s") else ""
            yield from compared(f"opening an SD 1.5 file{rate}", row.get("time_s"), None, peers)


def rows_of(tables: list[dict[str, Any]], title: str) -> list[Row]:
    """The rows of all tables whose title begins so; of one label the last, but those that failed."""
    found = [row for table in tables if table["title"].startswith(title) for row in table["rows"] if "error_text" not in row]
    return list({(row["label"], row.get("variant")): row for row in found}.values())


def compared(label: str, ours: float | None, floor: float | None, peers: dict[str, float | None]) -> Iterator[tuple[str, Row]]:
    known = {name: time for name, time in peers.items() if time}
    if ours is None:
        return
    best = min(known, key=lambda name: known[name]) if known else None
    values: Row = {"time_ms": ours, "floor_ms": floor}
    if best is not None:
        values |= {"best_peer_ms": known[best], "to_ours": known[best] / ours, "which_peer": best}
    yield label, values

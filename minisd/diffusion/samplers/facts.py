"""What can be said of the samplers: read from their registry, and measured where it can be."""

from __future__ import annotations

from typing import Any

import torch

from ..program import program
from .registry import SAMPLERS, Sampler

STEPS = 30  # over which calls and noise are counted


def facts(name: str, sampler: Sampler) -> dict[str, Any]:
    """One sampler: calls of the network a step and whether it draws noise are counted, not claimed."""
    made = program(sampler.run, torch.logspace(1.15, -1.5, STEPS + 1, dtype=torch.float64), pair=sampler.pair)
    return {
        "name": name,
        "label": sampler.label,
        "order": sampler.order,
        "calls": round(len(made.sigmas) / STEPS, 1) if made else None,  # a step; None: it steps as far as the picture lets it
        "stochastic": bool(made and made.draws),
        "schedule": sampler.wish.spacing,
        "cfg_pp": sampler.pair,
        "options": dict(sampler.options),
        "aliases": list(sampler.names),
        "source": sampler.source,
    }


def all_facts() -> list[dict[str, Any]]:
    return [facts(name, sampler) for name, sampler in SAMPLERS.items()]


def as_table(rows: list[dict[str, Any]]) -> str:
    """A line each, for people."""
    lines = [("name", "order", "calls", "noise", "schedule", "options", "also called")]
    for row in rows:
        calls = "free" if row["calls"] is None else f"{row['calls']:g}"
        noise, options = "yes" if row["stochastic"] else "", ", ".join(row["options"])
        also = ", ".join([row["label"], *row["aliases"]])
        lines.append((row["name"], str(row["order"]), calls, noise, row["schedule"], options, also))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[6]]) for line in lines
    )

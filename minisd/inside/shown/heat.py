"""Cross-attention maps as pictures: heat over the picture, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from ...pictures.grids import labelled_grid
from ..maps import Attention

LEAST = 192  # pixels of a cell's shorter side: what is smaller is shown in whole multiples
# From nothing to all, as a reader's eye orders them: dark blue, violet, orange, pale yellow.
HEAT = np.array([[13, 8, 60], [110, 25, 130], [215, 75, 75], [250, 165, 60], [252, 250, 200]], dtype=float)

By = Literal["word", "layer", "step"]


def coloured(share: np.ndarray) -> np.ndarray:
    """(H, W) from 0 to 1 -> (H, W, 3), 0 to 255."""
    place = np.clip(share, 0, 1) * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    part = (place - low)[..., None]
    return HEAT[low] * (1 - part) + HEAT[low + 1] * part


def shown_size(image: Image.Image) -> tuple[int, int]:
    factor = max(1, -(-LEAST // min(image.size)))
    return image.width * factor, image.height * factor


def heat(found: Tensor, image: Image.Image, top: float | None = None) -> Image.Image:
    """A map (h, w) as colours over the grey picture; top: what is brightest, by default the map's own largest."""
    size = shown_size(image)
    top = float(found.max()) if top is None else top
    share = Image.fromarray((found / max(top, 1e-9)).clamp(0, 1).numpy().astype(np.float32)).resize(
        size, Image.Resampling.BICUBIC
    )
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.NEAREST), dtype=float)[..., None]
    mixed = 0.72 * coloured(np.asarray(share)) + 0.28 * grey
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def sheet(found: Attention, by: By = "word", layer: str | None = None) -> Image.Image:
    """The picture and the map of each word, in one row; or a row for each layer, or for each step.  layer: of this one alone."""
    image = found.result.images[0]
    whole = image.resize(shown_size(image), Image.Resampling.NEAREST)
    rows: list[tuple[str, str | None, int | None]] = [("all layers, all steps" if layer is None else short(layer), layer, None)]
    if by == "layer":
        rows = [(short(name), name, None) for name in found.maps]
    if by == "step":
        steps = len(next(iter(found.maps.values())))
        rows = [(f"step {step}", layer, step) for step in evenly(steps, 8)]
    cells: list[Image.Image | str] = []
    for _, name, step in rows:
        cells += [whole, *(heat(found.of(word, name, step), image) for word in found.words)]
    return labelled_grid(cells, ["picture", *found.words], [label for label, _, _ in rows], title_of(found))


def title_of(found: Attention) -> str:
    facts = found.result.metadata[0]
    return f"{facts['prompt']}: where its pixels look, each map by its own brightest, seed {facts['seed']}"


def short(layer: str) -> str:
    """A layer's place in the UNet: "output_blocks.2.1"."""
    return (
        layer.removeprefix("model.diffusion_model.")
        .partition(".transformer_blocks.0.attn2")[0]
        .replace(".transformer_blocks", "")
    )


def evenly(count: int, most: int) -> Sequence[int]:
    return range(count) if count <= most else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})

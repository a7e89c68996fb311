"""Draws the figures of the docs from minisd's own code: nothing in them is written down a second time.

python scripts/figures.py            all of them, into docs/figures/ (needs matplotlib, from the extra 'bench')
python scripts/figures.py unet       one: unet, schedules or denoising
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import minisd
from minisd.diffusion.levels import AS_THEY_COME, levels
from minisd.diffusion.schedule import scaled_linear
from minisd.models.family import UNET
from minisd.models.shapes import below
from minisd.models.unet import UNet
from minisd.workbench.blueprint import sd15

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
INK, PALE, LINE = "#2b2f36", "#767c86", "#a9afb8"
COLOURS = {  # of a layer, by its class
    "Conv2d": "#dfe3e8",
    "ResBlock": "#cddcec",
    "SpatialTransformer": "#f3dcc0",
    "Downsample": "#d5e5d3",
    "Upsample": "#d5e5d3",
}
COUNT = 200  # colours of a drawing: enough for the eye, at half the bytes
SHOWN = (1, 4, 8, 12, 20)  # steps of the picture in the making


# The UNet of SD 1.5


@dataclass(frozen=True)
class Shown:
    """A block as it ran: what it holds, and the shapes (C, H, W) that went in and came out."""

    name: str
    layers: list[str]
    given: tuple[int, ...]
    made: tuple[int, ...]


def walk(network: UNet, x: Tensor, context: Tensor) -> list[Shown]:
    """The blocks in the order in which they run, seen by forward hooks."""
    seen: list[Shown] = []

    def hook(name: str) -> Any:
        def see(block: nn.Sequential, given: tuple[Tensor, ...], made: Tensor) -> None:
            layers = [type(layer).__name__ for layer in block]
            seen.append(Shown(name, layers, tuple(given[0].shape[1:]), tuple(made.shape[1:])))

        return see

    for name, module in network.named_modules():
        if name == "middle_block" or name.rpartition(".")[0] in ("input_blocks", "output_blocks"):
            module.register_forward_hook(hook(name))
    network(x, torch.zeros(len(x), device=x.device), context)
    return seen


def sd15_blocks() -> list[Shown]:
    """Of SD 1.5 at 512x512 pixels: built and run on the meta device, where tensors are shapes without numbers."""
    with torch.no_grad(), torch.device("meta"):
        return walk(UNet(below(sd15(), UNET)), torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768))


def written(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def unet_figure(plt: Any) -> Any:
    blocks = sd15_blocks()
    down = [block for block in blocks if block.name.startswith("input")]
    up = [block for block in blocks if block.name.startswith("output")][::-1]  # beside the block whose output it takes
    (middle,) = (block for block in blocks if block.name == "middle_block")
    assert len(down) == len(up)

    figure = plt.figure(figsize=(11, 9.8))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 120), ylim=(106, -6))
    axis.axis("off")
    height, pitch, indent = 3.9, 7.2, 2.2
    tops = [4.5 + pitch * row for row in range(len(down))]
    heights = [block.made[1] for block in down]
    depth = [heights[0] // each for each in heights]
    insets = [indent * (factor.bit_length() - 1) for factor in depth]

    for level in dict.fromkeys(heights):  # a band for each resolution
        rows = [row for row, each in enumerate(heights) if each == level]
        top, bottom = tops[rows[0]] - 1.6, tops[rows[-1]] + height + 1.7
        shade = "#f6f7f9" if list(dict.fromkeys(heights)).index(level) % 2 == 0 else "#ffffff"
        bottom += pitch + 2.6 if level == heights[-1] else 0  # the middle block, too
        axis.fill_between([0, 120], top, bottom, color=shade, zorder=0, linewidth=0)

    def chips(layers: list[str], left: float, top: float) -> float:
        """The layers of a block side by side; returns where they end."""
        widths = {"Conv2d": 9.0, "ResBlock": 9.0, "SpatialTransformer": 16.6, "Downsample": 11.6, "Upsample": 9.8}
        for layer in layers:
            box = plt.Rectangle((left, top), widths[layer], height, facecolor=COLOURS[layer], edgecolor="white", linewidth=1.2)
            axis.add_patch(box)
            label(left + widths[layer] / 2, top + height / 2, layer, size=9)
            left += widths[layer]
        return left

    def label(x: float, y: float, text: str, size: float = 9, colour: str = INK, ha: str = "center", **more: Any) -> None:
        axis.text(x, y, text, size=size, color=colour, ha=ha, va="center", zorder=4, **more)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
        shape = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
        axis.annotate("", end, start, arrowprops=shape, zorder=2)

    left, right = 16.0, 70.0
    down_x, up_x = [left + inset + 4 for inset in insets], [right - inset + 4 for inset in insets]
    for row, (block, twin) in enumerate(zip(down, up, strict=True)):
        top, centre = tops[row], tops[row] + height / 2
        end = chips(block.layers, left + insets[row], top)
        label(left + insets[row] - 1, centre - 1.05, block.name, ha="right", weight="bold")
        label(left + insets[row] - 1, centre + 1.15, written(block.made), 8.5, PALE, ha="right")
        start = right - insets[row]
        edge = chips(twin.layers, start, top)
        label(edge + 1, centre - 1.05, twin.name, ha="left", weight="bold")
        label(edge + 1, centre + 1.15, written(twin.made), 8.5, PALE, ha="left")
        axis.plot([end, start - 0.8], [centre, centre], color=LINE, linewidth=1.1, zorder=1)
        arrow((start - 1.2, centre), (start, centre), LINE)
        channels = f"{twin.given[0] - block.made[0]} + {block.made[0]} channels"
        label((end + start) / 2, centre - 1.2, channels, 8, PALE)
        if row + 1 < len(down):
            following = tops[row + 1]
            x = max(down_x[row], down_x[row + 1])
            arrow((x, top + height), (x, following))
            x = min(up_x[row], up_x[row + 1])
            arrow((x, following), (x, top + height))

    # the middle, and the ends
    top = tops[-1] + pitch + 1.2
    width = 2 * 9.0 + 16.6
    start = (down_x[-1] + up_x[-1]) / 2 - width / 2
    end = chips(middle.layers, start, top)
    label((start + end) / 2, top + height + 1.5, middle.name, weight="bold", ha="right")
    label((start + end) / 2 + 1, top + height + 1.5, written(middle.made), 8.5, PALE, ha="left")
    centre = top + height / 2
    for x, ends in ((down_x[-1], (start, centre)), (up_x[-1], (end, centre))):
        axis.plot([x, x], [tops[-1] + height, centre], color=INK, linewidth=1.1, zorder=2)
        if x < start:
            arrow((x, centre), ends)
        else:
            axis.plot([ends[0], x], [centre, centre], color=INK, linewidth=1.1, zorder=2)
            arrow((x, centre), (x, tops[-1] + height))
    arrow((down_x[0], 1.2), (down_x[0], tops[0]))
    label(down_x[0], -0.2, f"noisy latents {written(down[0].given)}")
    arrow((up_x[0], tops[0]), (up_x[0], 1.2))
    label(up_x[0], -0.2, "GroupNorm, SiLU, Conv2d: the noise in them (4, 64, 64)")
    label(60, -3.4, "The UNet of Stable Diffusion 1.5 at 512 x 512 pixels, shapes (channels, height, width)", 11, weight="bold")
    notes = (
        "An output block is given the output of the one before it and, behind its channels, that of the block beside it (grey).\n"
        "Every ResBlock is told the timestep (time_embed); every SpatialTransformer attends to the text (77 x 768 numbers)."
    )
    label(60, 102.6, notes, 9, PALE, linespacing=1.6)
    return figure


# The noise levels


def visited(spacing: str, steps: int) -> Tensor:
    """The noise levels of SD 1.x that a sampler visits before it ends at zero: (steps,), falling."""
    return levels(scaled_linear(), spacing, steps, AS_THEY_COME).sigmas[:-1]


def schedules_figure(plt: Any) -> Any:
    steps = 20
    looks = {
        "linspace": ("#2f5d8a", "o"), "leading": ("#b5651d", "s"), "trailing": ("#5a8f5a", "^"),
        "karras": ("#8a4f7d", "D"), "exponential": ("#6b7280", "v"),
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(9, 5.2), constrained_layout=True)
    for spacing in looks:
        sigmas = visited(spacing, steps)
        colour, marker = looks[spacing]
        name = f"{spacing}: {sigmas[0]:.1f} to {sigmas[-1]:.3f}"
        axis.plot(range(1, steps + 1), sigmas, color=colour, marker=marker, markersize=4.5, linewidth=1.3, label=name)
    axis.set_yscale("log")
    axis.set_title(f"Noise levels that a sampler visits in {steps} steps, before it ends at zero", size=12, color=INK)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel("sigma: noise for each unit of the picture", color=INK)
    axis.set_xticks([1, 5, 10, 15, 20])
    axis.set_yticks([0.03, 0.1, 0.3, 1, 3, 10], ["0.03", "0.1", "0.3", "1", "3", "10"])
    axis.minorticks_off()
    axis.grid(color="#e4e7eb", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.legend(frameon=False, loc="lower left", labelcolor=INK)
    return figure


# A picture in the making


def denoising_figure(plt: Any) -> Any:
    prompt, seed, steps = "a red circle on a blue background", 1, 20
    pipe = minisd.load(device="cpu")
    seen = list(pipe.stream(prompt, steps=steps, seed=seed))

    def picture(latents: Tensor) -> Any:
        return ((pipe.codec.decode(latents)[0].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()

    figure, axes = plt.subplots(2, len(SHOWN), figsize=(10, 4.75), constrained_layout=True)
    with torch.no_grad():
        for column, number in enumerate(SHOWN):
            step = seen[number - 1]
            unit = step.before / (step.sigma**2 + 1) ** 0.5
            for axis, image in zip(axes[:, column], (picture(unit), picture(step.denoised)), strict=True):
                axis.imshow(image, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                for side in axis.spines.values():
                    side.set_visible(False)
            axes[0, column].set_title(f"step {number}, sigma {step.sigma:.2f}", size=10.5, color=INK)
    axes[0, 0].set_ylabel("x, its input", size=10.5, color=INK)
    axes[1, 0].set_ylabel("x_0, its estimate", size=10.5, color=INK)
    title = f'"{prompt}", seed {seed}, as the network sees it, decoded by the VAE'
    figure.suptitle(title, size=11.5, color=INK)
    return figure


FIGURES = {"unet": unet_figure, "schedules": schedules_figure, "denoising": denoising_figure}


def main(names: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.family"] = "DejaVu Sans"  # which comes with matplotlib
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names or FIGURES:
        figure = FIGURES[name](plt)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=100, facecolor="white")
        plt.close(figure)
        image = Image.open(drawn).convert("RGB")
        if name != "denoising":  # whose colours are a picture's
            image = image.quantize(COUNT, dither=Image.Dither.NONE)
        image.save(FOLDER / f"{name}.png", optimize=True)
        print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])

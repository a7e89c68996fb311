"""Guides beside classifier-free guidance: for editing pictures, for several prompts at once, for the first steps alone, against
the glare of strong guidance, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Affine, Call


@dataclass(frozen=True)
class TextAndImage(Affine):
    """Two guidances for editing a picture (Brooks et al. 2022, arXiv 2211.09800, eq. 3): none, the picture, picture and text.

    e_none + w_image (e_image - e_none) + w_text (e_both - e_image)
    """

    text: float | tuple[float, ...]
    image: float

    @property
    def roles(self) -> tuple[str, ...]:
        return "negative", "image", "positive"

    def weights(self, call: Call) -> Tensor:
        text = torch.tensor(self.text).float().view(-1)  # (B or 1,)
        return torch.stack([torch.full_like(text, 1 - self.image), self.image - text, text])


@dataclass(frozen=True)
class Composed(Affine):
    """Several prompts at once, each with its scale: u + sum_i s_i (c_i - u), which may be negative and have any sum.

    Liu et al. 2022, arXiv 2206.01714, composable diffusion; A1111 sd_samplers_cfg_denoiser.py, combine_denoised.
    """

    scales: tuple[tuple[float, ...], ...]  # (K - 1, B or 1): s_i, of each picture or of all

    @property
    def roles(self) -> tuple[str, ...]:
        return "negative", *(part_role(i) for i in range(len(self.scales)))

    def weights(self, call: Call) -> Tensor:
        scales = torch.tensor(self.scales).float()
        return torch.cat([1 - scales.sum(0, keepdim=True), scales])


def part_role(i: int) -> str:
    """The name of the i-th of the prompts that are joined by AND."""
    return "positive" if i == 0 else f"positive {i + 1}"


@dataclass(frozen=True)
class Until(Affine):
    """Another guidance for the first steps; from then on what the prompt alone answers, which is half the work or less.

    Late steps settle detail, where guidance moves the estimate least: Kynkäänniemi et al. 2024, arXiv 2404.07724, end it below a
    noise level, Castillo et al. 2023, arXiv 2312.12487, after a share of the steps.
    """

    guide: Affine
    steps: int  # that are guided

    @property
    def roles(self) -> tuple[str, ...]:
        return self.guide.roles

    def weights(self, call: Call) -> Tensor:
        weights = self.guide.weights(call)
        if call.step < self.steps:
            return weights
        alone = torch.zeros_like(weights)
        alone[self.roles.index("positive")] = 1
        return alone


@dataclass(frozen=True)
class Rescaled:
    """Classifier-free guidance, scaled back to the spread of c (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16).

    rescale: 0 … 1, how far.
    """

    scale: float | tuple[float, ...]
    rescale: float
    roles: tuple[str, ...] = ("negative", "positive")
    on: Literal["estimate", "output"] = "output"

    def __call__(self, answers: Sequence[Tensor], x: Tensor, call: Call) -> Tensor:
        negative, positive = answers
        scale = torch.tensor(self.scale, device=x.device).float().view(-1, 1, 1, 1)
        guided = negative + scale * (positive - negative)
        spread = positive.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return guided * (self.rescale * spread + 1 - self.rescale)


@dataclass(frozen=True)
class Own:
    """A user's function (answers, x, call) -> mixed, which may say in attributes of its own what it wants: `roles` and `on`."""

    function: Callable[[Sequence[Tensor], Tensor, Call], Tensor]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(getattr(self.function, "roles", ("negative", "positive")))

    @property
    def on(self) -> Literal["estimate", "output"]:
        return getattr(self.function, "on", "estimate")

    def __call__(self, answers: Sequence[Tensor], x: Tensor, call: Call) -> Tensor:
        return self.function(answers, x, call)

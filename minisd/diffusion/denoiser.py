"""From what the network predicts to what the samplers ask for: denoise(x, sigma) -> x_0, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import Schedule

Unet = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Guide = Callable[..., Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
Steps = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about B pictures beside the noisy latents."""

    context: Tensor  # (B, L, D), the text, token by token
    pooled: Tensor | None = None  # (B, P), the whole text in a vector, in families that have it
    vector: Tensor | None = None  # (B, A), the pooled text and the sizes, as the UNet's label_emb takes them
    extra: Tensor | None = None  # (B, C, h, w), channels beside the latents: a mask, a picture


def epsilon(output: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The network predicts the noise (Ho et al. 2020, arXiv 2006.11239, eq. 15)."""
    return x - sigma * output


def v(output: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """It predicts v = alpha eps - sigma x_0 (Salimans and Ho 2022, arXiv 2202.00512, appendix D)."""
    total = sigma**2 + sigma_data**2
    return x * sigma_data**2 / total - output * sigma * sigma_data / total.sqrt()


def edm(output: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """It predicts x_0 after preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1)."""
    return v(-output, x, sigma, sigma_data)


PREDICTIONS = {"epsilon": epsilon, "v": v, "edm": edm}


def unguided(positive: Tensor) -> Tensor:
    return positive


@dataclass(frozen=True)
class ClassifierFree:
    """u + w (c - u) (Ho and Salimans 2022, arXiv 2207.12598), of the outputs for the negative and the positive prompt.

    rescale: 0 … 1, how far the result is scaled back to the spread of c (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16).
    """

    scale: float
    rescale: float = 0.0

    def __call__(self, negative: Tensor, positive: Tensor) -> Tensor:
        guided = negative + self.scale * (positive - negative)
        if self.rescale == 0:
            return guided
        spread = positive.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return guided * (self.rescale * spread + 1 - self.rescale)


@dataclass(frozen=True)
class TextAndImage:
    """Two guidances for editing a picture (Brooks et al. 2022, arXiv 2211.09800, eq. 3): none, the picture, picture and text."""

    text: float
    image: float

    def __call__(self, nothing: Tensor, image: Tensor, both: Tensor) -> Tensor:
        return nothing + self.image * (image - nothing) + self.text * (both - image)


@dataclass(frozen=True)
class Denoiser:
    """x_0 as the network sees it.

    conditions: what `guide` compares, in its order; the network is called once for all of them.
    """

    unet: Unet
    schedule: Schedule
    prediction: str
    sigma_data: float
    conditions: Sequence[Conditioning]
    guide: Guide

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:  # (B, C, h, w), () -> (B, C, h, w)
        scaled = x / (sigma**2 + self.sigma_data**2).sqrt()  # unit variance again, as in training
        outputs = self.predict(scaled, self.schedule.timestep(sigma).float())
        return PREDICTIONS[self.prediction](self.guide(*outputs), x, sigma, self.sigma_data)

    def predict(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """The network's output for each of the conditions, (B, C, h, w) each, in float32."""
        told = stacked(self.conditions)
        x = torch.cat([x] * len(self.conditions))
        if told.extra is not None:
            x = torch.cat([x, told.extra], dim=1)
        t = torch.full((len(x),), float(t), device=x.device)  # a copy from the CPU would wait for the GPU
        return self.unet(x.to(told.context.dtype), t, told.context, told.vector).float().chunk(len(self.conditions))


def stacked(conditions: Sequence[Conditioning]) -> Conditioning:
    """Several conditions as one batch."""

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Conditioning(
        torch.cat([each.context for each in conditions]),
        vector=joined([each.vector for each in conditions]),
        extra=joined([each.extra for each in conditions]),
    )


def keeping(denoise: Callable[[Tensor, Tensor], Tensor], mask: Tensor, known: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser that knows the finished latents where the mask (B, 1, h, w) is 0 and asks the network where it is 1.

    Latents that start as known + sigma * noise then stay so, whatever the sampler (RePaint's known region, Lugmayr et al. 2022,
    arXiv 2201.09865, eq. 8a, with one noise throughout, as in diffusers).
    """

    def masked(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(mask > 0.5, denoise(x, sigma), known)

    return masked

"""From what the network predicts to what the samplers ask for: denoise(x, sigma) -> x_0, with guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import Schedule

Unet = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """x_0 as the network sees it, for noise prediction (k-diffusion external.py, DiscreteEpsDDPMDenoiser).

    context: (B, L, D), and with guidance (2*B, L, D), the negative prompts first.
    guidance_scale: w in classifier-free guidance, u + w (c - u) (Ho and Salimans 2022, arXiv 2207.12598); 1 leaves u out.
    """

    unet: Unet
    schedule: Schedule
    context: Tensor
    guidance_scale: float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        scaled = x / (sigma**2 + 1).sqrt()  # unit variance again, as in training
        t = self.schedule.timestep(sigma).float().to(x.device)
        return x - sigma * self.predict(scaled, t)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:  # (B, C, H, W), () -> (B, C, H, W), in float32
        if self.guidance_scale == 1:
            return self.call(x, t)
        negative, positive = self.call(torch.cat([x, x]), t).chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x.to(self.context.dtype), t.expand(len(x)), self.context).float()

"""A picture of latents that are still in the making, at almost no cost: each latent pixel's colour as a linear map of it.

The map is fitted to the autoencoder at hand, so there is one for every checkpoint.  (For SD 1.x and SDXL, ComfyUI publishes
such factors: comfy/latent_formats.py, `latent_rgb_factors`.)  A TAESD draws better previews, by its own `decode`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NonFiniteError

SHADES = 4  # of red, of green and of blue: 64 colours
SIDE = 8  # colours in a row
SQUARE = 4  # latent pixels: with 2 or 3, the edges count too much


class LinearDecoder:
    """Takes the place of an autoencoder's decoder for previews.  `fit_decoder` makes one."""

    unit_variance = True  # its latents are those of the UNet

    def __init__(self, factors: Tensor, offset: Tensor, downscale: int) -> None:
        self.factors, self.offset, self.downscale = factors, offset, downscale  # (3, C), (3,)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) of unit variance -> image (B, 3, H, W), about [-1, 1], blurred; float32."""
        factors, offset = self.factors.to(latents.device), self.offset.to(latents.device)
        colours = F.conv2d(latents.float(), factors[:, :, None, None], offset)  # (B, 3, h, w)
        return F.interpolate(colours, scale_factor=self.downscale, mode="bilinear")


@torch.no_grad()
def fit_decoder(encode: Callable[[Tensor], Tensor], downscale: int) -> LinearDecoder:
    """The linear map that fits an encoder best, by least squares over one picture of squares in 64 colours.

    encode: image (1, 3, H, W) in [-1, 1], float32 -> latents (1, C, H/f, W/f) of unit variance, with f = downscale.
    Raises NonFiniteError if the encoder overflows.
    """
    colours = squares()
    image = colours.repeat_interleave(downscale, 2).repeat_interleave(downscale, 3)
    latents = encode(image).float().cpu()  # (1, C, h, w)
    if not latents.isfinite().all():
        raise NonFiniteError("the VAE's encoder produced NaN or infinity; there will be no previews")
    inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)  # a channel of ones, for the offset
    solution = torch.linalg.lstsq(pixels(inputs), pixels(colours)).solution  # (C + 1, 3)
    return LinearDecoder(solution[:-1].T.contiguous(), solution[-1], downscale)


def squares() -> Tensor:
    """A picture (1, 3, 32, 32) in [-1, 1]: each of the 64 colours once, in no order."""
    shades = torch.linspace(-1, 1, SHADES)
    colours = torch.cartesian_prod(shades, shades, shades)  # (64, 3)
    order = torch.randperm(len(colours), generator=torch.Generator().manual_seed(0))
    return colours[order].T.reshape(1, 3, SIDE, SIDE).repeat_interleave(SQUARE, 2).repeat_interleave(SQUARE, 3)


def pixels(x: Tensor) -> Tensor:  # (1, C, h, w) -> (h*w, C)
    return x[0].flatten(1).T

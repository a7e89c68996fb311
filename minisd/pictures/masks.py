"""Masks: 1 where to paint, 0 where to keep."""

from __future__ import annotations

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .image import to_pil


def at_latents(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask (1, 1, H, W) at the size of latents, by nearest pixel, as inpainting models were trained (inpaint_st.py)."""
    return F.interpolate(mask, size=latents.shape[-2:]).to(latents)


def without_masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """A picture (1, 3, H, W) in [-1, 1], mid-grey where to paint."""
    return pixels * (mask < 0.5)


def paste(image: Image.Image, pixels: Tensor, mask: Tensor) -> Image.Image:
    """A finished picture, with what the mask keeps exactly as it was: the VAE alone would change it a little."""
    return Image.composite(image, to_pil(pixels[0]), Image.fromarray((mask[0, 0] * 255).byte().numpy()))

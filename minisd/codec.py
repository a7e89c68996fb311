"""Between pictures and latents of unit variance: the VAE with its scale, and what to do when it overflows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError
from .fast import tiling
from .fast.engine import Engine, Plain
from .models.family import VAE, Recognition, Training
from .models.taesd import TinyAutoencoder
from .models.vae import AutoencoderKL
from .system.device import gpu_computes_bfloat16, name_of, on_device
from .system.finite import Culprit, watching

Autoencoder = AutoencoderKL | TinyAutoencoder


class Codec:
    """A VAE together with the statistics of its latents: times `scale`, or by mean and deviation, they have unit variance.

    Those of a tiny autoencoder have it by themselves.  engine: what decodes in the place of `vae.decode`.
    """

    def __init__(
        self, vae: Autoencoder, recognition: Recognition, device: torch.device, dtype: torch.dtype, engine: Engine | None = None
    ) -> None:
        self.vae, self.device, self.engine = vae, device, engine or Plain()
        has_bfloat16 = device.type == "cuda" and gpu_computes_bfloat16(device)
        self.dtype = vae_dtype(dtype, recognition.family.vector and isinstance(vae, AutoencoderKL), has_bfloat16)
        vae.to(self.dtype)
        training = Training() if isinstance(vae, TinyAutoencoder) else recognition.training
        self.scale = 1.0 if isinstance(vae, TinyAutoencoder) else recognition.latent_scale
        self.mean, self.std = (
            torch.tensor(values or [default] * vae.latent_channels, device=device).view(1, -1, 1, 1)  # (1, C, 1, 1)
            for values, default in ((training.latent_mean, 0.0), (training.latent_std, 1.0))
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """A picture (B, 3, H, W) in [-1, 1] -> the mean of its latents (B, C, h, w), float32.  Raises NonFiniteError.

        The mean, without the little noise that the VAE was trained with: the same picture always gives the same latents.
        """
        latents = self.run(encode_with, pixels.to(self.device))
        if not latents.isfinite().all():
            said = self.at_fault(encode_with, pixels.to(self.device))
            raise NonFiniteError(
                f"the VAE made NaN or infinity of the init image: {said or 'its weights are broken'}; try another VAE"
            )
        return (latents - self.mean) / self.std * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1].  Raises NonFiniteError: no picture is made of NaN."""
        check_finite(latents, self.dtype, "UNet")
        pixels = self.run(self.decode_with, latents / self.scale * self.std + self.mean)
        if not pixels.isfinite().all():
            said = self.at_fault(self.decode_with, latents / self.scale * self.std + self.mean)
            broken = said or "its weights or the latents are broken (minisd inspect FILE --check names broken weights)"
            raise NonFiniteError(f"the VAE produced NaN or infinity in float32 too: {broken}; try another VAE")
        return pixels

    def at_fault(self, half: Callable[[Any, Tensor], Tensor], x: Tensor) -> str:
        """What is said of the first module that leaves the finite numbers, in float32."""
        wide = copy.deepcopy(self.vae).float()
        with on_device(wide, self.device), watching({VAE: wide}) as found:
            half(wide, x.float())
        return found[0].words() if found else ""

    def decode_with(self, vae: Autoencoder, latents: Tensor) -> Tensor:
        if isinstance(vae, TinyAutoencoder):
            return vae.decode(latents)
        return tiling.decode(vae, latents, partial(self.engine.decode, vae) if vae is self.vae else None)

    def run(self, half: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        """One half of the VAE on x, float32; where it overflows in a smaller dtype, again by a copy in float32."""
        with on_device(self.vae, self.device):
            out = half(self.vae, x.to(self.dtype)).float()
            if not out.isfinite().all() and self.dtype != torch.float32:
                warnings.warn(f"the VAE overflowed in {name_of(self.dtype)}; running it again in float32", stacklevel=4)
                out = half(copy.deepcopy(self.vae).float(), x)
        return out


def encode_with(vae: Autoencoder, pixels: Tensor) -> Tensor:
    return (tiling.encode(vae, pixels) if isinstance(vae, AutoencoderKL) else vae.encode(pixels))[0]


def check_finite(x: Tensor, dtype: torch.dtype, network: str, at_fault: Callable[[], Culprit | None] = lambda: None) -> None:
    """Raises NonFiniteError, with what to do about it.  at_fault: finds the module that made the first."""
    if not x.isfinite().all():
        found = at_fault()
        if found:
            raise NonFiniteError(f"the {network} produced NaN or infinity in {name_of(dtype)}: {found.words()}")
        first = "" if dtype == torch.float32 else "draw with dtype float32; if that does not help, "
        check = "its weights or those of the text encoder" if network == "UNet" else "its weights"
        broken = f"{first}{check} are broken: minisd inspect FILE --check names them"
        raise NonFiniteError(f"the {network} produced NaN or infinity in {name_of(dtype)}: {broken}")


def vae_dtype(dtype: torch.dtype, overflows: bool, has_bfloat16: bool) -> torch.dtype:
    """What the VAE runs in beside a UNet in `dtype`: SDXL's, which overflows in float16, in bfloat16 where the device has it.

    bfloat16 has float32's range and 3 bits less precision than float16.
    """
    return torch.bfloat16 if dtype == torch.float16 and overflows and has_bfloat16 else dtype

"""Who computes: the modules as they stand, or what is fast on a device.  Nothing above engines.py, which chooses, knows
which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Denoise, Denoiser, Noise
from ..errors import UsageError
from ..models.clip import TextEncoder
from ..models.unet import UNet
from ..models.vae import AutoencoderKL
from ..system.device import on_device
from .unet import FusedUNet
from .ways import Moment, Walk, Way


class Engine(Protocol):
    """What draws with one model."""

    def way(self, walk: Walk, x: Tensor) -> tuple[Way, str]:
        """The way that this walk will take from x, and why none faster."""

    def walk(self, walk: Walk, x: Tensor, noise: Noise) -> Iterator[Moment]:
        """From x (B, C, h, w) down the levels of a walk."""

    def read(self, encoder: TextEncoder, ids: Tensor) -> Sequence[Tensor]:
        """A text encoder's hidden states of ids (B, L): (B, L, D) each."""

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """`vae.decode`."""

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Another network stands in the place of one: what is kept of the old one goes."""

    def reform(self, form: Callable[[UNet], FusedUNet] | None) -> None:
        """The UNet's layers are others now, and `form` makes its fused form; None: it has no other than its modules."""

    def refresh(self) -> None:
        """To be called after weights were written to in a way that nothing shows (through `.data`)."""


class Plain:
    """The modules as they stand."""

    def way(self, walk: Walk, x: Tensor) -> tuple[Way, str]:
        return "plain", ""

    def walk(self, walk: Walk, x: Tensor, noise: Noise) -> Iterator[Moment]:
        return moments(walk, walk.denoiser(), x, noise, "plain")

    def read(self, encoder: TextEncoder, ids: Tensor) -> Sequence[Tensor]:
        return encoder.hidden_states(ids)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return vae.decode(latents)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        pass

    def reform(self, form: Callable[[UNet], FusedUNet] | None) -> None:
        pass

    def refresh(self) -> None:
        pass


def moments(walk: Walk, denoise: Denoiser, x: Tensor, noise: Noise, way: Way, ask: Denoise | None = None) -> Iterator[Moment]:
    """A walk by its sampler's own generator; ask: what the sampler calls in the place of the denoiser."""
    with on_device(walk.network.unet, x.device):  # type: ignore[arg-type]
        asked, before = 0, x.clone()  # as a sampler may work in place
        answer = denoise.pair if walk.sampler.pair else ask or denoise
        steps = walk.sampler.run(answer, x, walk.levels.sigmas, noise, **walk.options)
        for pair in steps:
            latents, denoised = yielded(walk, pair, before.shape)
            first = denoise.calls[asked] if asked < len(denoise.calls) else None
            moment = Moment(latents, denoised, before, first, way)
            if walk.transform:  # in the sampler's own memory, so that it goes on from there
                latents.copy_(shaped("transform", walk.transform(moment), latents.shape))
            yield moment
            asked, before, denoise.step = len(denoise.calls), latents.clone(), denoise.step + 1


def yielded(walk: Walk, pair: object, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """What a sampler has yielded, which a user may have written.  Raises UsageError."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise UsageError(f"sampler: expected {walk.sampler.label} to yield (latents, denoised), found {type(pair).__name__}")
    return shaped("sampler", pair[0], shape), shaped("sampler", pair[1], shape)


def shaped(name: str, x: object, shape: torch.Size) -> Tensor:
    if not isinstance(x, Tensor) or x.shape != shape:
        found = tuple(getattr(x, "shape", ())) or type(x).__name__
        raise UsageError(f"{name}: expected a tensor {tuple(shape)} from it, found {found}")
    return x

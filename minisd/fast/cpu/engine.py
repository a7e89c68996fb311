"""Who draws on a CPU: the fused networks, in every other way as the modules would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...diffusion.denoiser import Noise
from ...models.clip import TextEncoder
from ...models.unet import UNet as Definition
from ...models.vae import AutoencoderKL
from ...system.memory import keeping_freed_memory
from ..choice import chosen
from ..cuda import Cuda, decoder_recorder
from ..unet import FusedUNet
from ..ways import Moment, Walk, Way
from .networks import UNet, decoder_layer, last_layers, unet_layer


def fused(network: Definition) -> FusedUNet:
    made = UNet(network, unet_layer)
    made.out = last_layers(network.out)
    return made


class Cpu(Cuda):
    """Draws with one model by the samplers' own generators: there is nothing to record, and no kernel to launch.

    Where the modules as they stand are asked for (MINISD_KERNELS=torch), or kernels of ours (Triton's interpreter), they draw.
    """

    def __init__(self, unet: nn.Module, others: Iterable[nn.Module] = ()) -> None:
        super().__init__(unet, False, others)  # type: ignore[arg-type]
        self.form = fused

    def walk(self, walk: Walk, x: Tensor, noise: Noise) -> Iterator[Moment]:
        with keeping_freed_memory():
            yield from super().walk(walk, x, noise)

    def way(self, walk: Walk, x: Tensor) -> tuple[Way, str]:
        if not chosen().auto:
            return "plain", "kernels are chosen by name"
        taken, why = super().way(walk, x)
        return ("plain" if taken == "plain" else "network"), why

    def say(self, why: str) -> None:
        """Nothing: what the modules take longer is no fault that somebody should mend."""

    def read(self, encoder: TextEncoder, ids: Tensor) -> Sequence[Tensor]:
        return encoder.hidden_states(ids)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        if not chosen().auto or torch.is_autocast_enabled("cpu"):
            return vae.decode(latents)
        recorder = self.recorder(vae, lambda: decoder_recorder(vae, False, decoder_layer))
        if recorder is None:
            return vae.decode(latents)
        with keeping_freed_memory():
            return torch.cat([recorder(each) for each in latents.split(1)])  # in less memory, and each as if it were alone

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        super().replace(old, new.to(memory_format=torch.channels_last))  # type: ignore[call-overload]

"""The networks of a checkpoint called once on the meta device, in the form that a GPU runs: shapes and layouts, no data.

What asks for kernels on the way is the code that draws, by the same rules; who calls this decides what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..fast import operations
from ..fast.decoder import FusedDecoder
from ..fast.lossy.networks import form_of
from ..fast.unet import FusedUNet
from ..files.model import StableDiffusion
from ..models.family import VAE
from ..models.unet import BasicTransformerBlock, UNet

TOKENS = 77
PARTS = ("text", "UNet", "sampler", "VAE")  # in the order in which a picture needs them
Begin = Callable[[str], object]


class ChannelsLast(TorchFunctionMode):
    """The meta device lays every convolution's result out in PyTorch's own order; a GPU does as with what it is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.to(memory_format=torch.channels_last) if func is F.conv2d else result


@torch.no_grad()
def walk(
    model: StableDiffusion, latents: tuple[int, int], begin: Begin = lambda part: None, masked: Sequence[bool] = (False,)
) -> None:
    """Calls each network once, as for one picture with guidance: the text encoders, the UNet, the sampler's step, the decoder;
    the encoder too where there is a mask.

    model: on the meta device, each part in the dtype that it runs in.  latents: their height and width.
    begin: is told of each of PARTS before it is called.  masked: whether the sampler keeps a known region.
    """
    model.requires_grad_(False)
    with torch.device("meta"), ChannelsLast():
        begin("text")
        for encoder in model.text_encoders:
            encoder.hidden_states(torch.empty(2, TOKENS, dtype=torch.long))
        if form := form_of(model.unet):  # else its modules draw, by PyTorch's operations
            begin("UNet")
            fused, given = form(model.unet), unet_input(model.unet, latents)
            prediction = fused(given, *prepared(fused, 2))
            begin("sampler")
            for each in masked:
                sampler_step(prediction, given, each)
        if hasattr(model, VAE):
            begin("VAE")
            x = torch.empty(1, model.vae.latent_channels, *latents, dtype=next(model.vae.parameters()).dtype)
            FusedDecoder(model.vae)(x.contiguous(memory_format=torch.channels_last))
            if any(masked):  # a known region comes from a picture
                size = [model.vae.downscale * side for side in latents]
                model.vae.encode(torch.empty(1, 3, *size, dtype=x.dtype).contiguous(memory_format=torch.channels_last))


def prepared(fused: FusedUNet, batch: int) -> tuple[Tensor, Tensor]:
    """What a step is given that was made before the first: a row of `shifts`, and the keys and values of the prompt."""
    unet: UNet = fused.network  # type: ignore[assignment]
    dtype = next(unet.out.parameters()).dtype
    width = next(block.attn2.to_k.in_features for block in unet.modules() if isinstance(block, BasicTransformerBlock))
    vector = torch.empty(batch, unet.vector_channels, dtype=dtype) if unet.vector_channels else None
    return fused.shifts(torch.empty(1), vector)[0], fused.keys_values(torch.empty(batch, TOKENS, width, dtype=dtype))


def unet_input(unet: UNet, latents: tuple[int, int], batch: int = 2) -> Tensor:
    x = torch.empty(batch, unet.in_channels, *latents, dtype=next(unet.out.parameters()).dtype)
    return x.to(memory_format=torch.channels_last)


def sampler_step(prediction: Tensor, model_input: Tensor, masked: bool) -> None:
    """Guidance and a call of the sampler over memory as fast/cuda.py lays it out (Buffers), for one picture of two roles."""
    channels, (height, width) = prediction.shape[1], prediction.shape[2:]
    calls, rows = 32, 32
    history, asked = torch.zeros(rows, 1, channels, height, width), torch.zeros(1, channels, height, width)
    weights, table = torch.zeros(calls, len(prediction), 1), torch.zeros(calls, 4 + rows)
    known = {"known": torch.zeros_like(asked), "mask": torch.zeros(1, 1, height, width)} if masked else {}
    call = torch.zeros(1, dtype=torch.int64)
    operations.linear_step(history, asked, prediction, weights, table, call, model_input[:, :channels], **known)

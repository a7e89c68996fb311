"""The published architectures with random weights, made where they will run: no file, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..fast import choice
from ..files.model import NoInit, StableDiffusion
from ..models.family import SD1, SD2, SDXL, UNET, VAE, Family
from ..models.shapes import Shapes, below
from ..models.unet import UNet
from ..models.vae import AutoencoderKL
from ..workbench import blueprint


@dataclass(frozen=True)
class Published:
    name: str
    shapes: Callable[[], Shapes]
    family: Family
    latents: int  # pixels a side of the latents that it was trained on
    context: int
    vector: int = 0
    pooled: int = 0


MODELS = {
    "sd15": Published("SD 1.5", blueprint.sd15, SD1, 64, 768),
    "sd21": Published("SD 2.1-768", blueprint.sd21, SD2, 96, 1024),
    "sdxl": Published("SDXL", blueprint.sdxl, SDXL, 128, 2048, 2816, 1280),
}


def random_module(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A module whose activations stay near unit variance, as `blueprint.random_weights` has them, ready to run."""
    with torch.device("meta"), NoInit():
        module = make()
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for key, value in module.state_dict().items():
        value.normal_(generator=generator)
        if value.dim() > 1:
            value.mul_(prod(value.shape[1:]) ** -0.5)
        else:
            value.mul_(0.1).add_(1.0 if key.endswith("weight") else 0.0)
    return module


def random_unet(model: Published, device: torch.device, dtype: torch.dtype) -> UNet:
    return random_module(lambda: UNet(below(model.shapes(), UNET)), device, dtype)  # type: ignore[no-any-return]


def random_vae(device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    shapes = below(blueprint.sd15(), VAE)
    return random_module(lambda: AutoencoderKL(shapes), device, dtype)  # type: ignore[no-any-return]


def random_checkpoint(model: Published, path: Path, device: torch.device) -> Path:
    """A whole checkpoint in half precision, as the published files are: 2.1 GB for SD 1.5."""
    from safetensors.torch import save_file

    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16  # a CPU has no random numbers in float16 at any speed
    module = random_module(lambda: StableDiffusion(model.shapes(), model.family), device, dtype)
    save_file({key: value.to("cpu", torch.float16) for key, value in module.state_dict().items()}, path, {"format": "pt"})
    return path


@dataclass(frozen=True)
class StepInput:
    """What a UNet is given in a step with guidance: the same latents with two prompts."""

    x: Tensor
    t: Tensor
    context: Tensor
    y: Tensor | None
    pooled: Tensor | None
    sizes: Tensor | None  # the numbers behind y, as diffusers wants them


def step_input(model: Published, side: int, device: torch.device, dtype: torch.dtype) -> StepInput:
    from ..diffusion.denoiser import Conditioning
    from ..text.conditioner import with_sizes

    torch.manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, t = randn(1, 4, side, side).repeat(2, 1, 1, 1), torch.full((2,), 500.0, device=device)
    context = randn(2, 77, model.context)
    if not model.vector:
        return StepInput(x, t, context, None, None, None)
    numbers, pooled = [8 * side, 8 * side, 0, 0, 8 * side, 8 * side], randn(2, model.pooled)
    y = with_sizes(Conditioning(context, pooled), numbers).vector
    return StepInput(x, t, context, y, pooled, torch.tensor([numbers] * 2, device=device, dtype=dtype))


def laid_out(module: Any, device: torch.device, fused: bool = False) -> Any:
    """In channels-last memory where our kernels run, as the pipeline has it, and for the fused forms of a CPU; elsewhere in
    PyTorch's own order."""
    wanted = choice.wants("group_norm", device) or (fused and device.type == "cpu")
    return module.to(memory_format=torch.channels_last if wanted else torch.contiguous_format)

"""From a prompt to a picture.  Read this first: each station of the way has a file of its own name.

prompt -- tokenizer -- clip: context --.
                                       +-- samplers: one denoiser (unet) call a step -- latents -- vae.decode -- image
seed ---- request: noise --------------'
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import __version__
from .checkpoint import Checkpoint, open_checkpoint
from .denoiser import Denoiser
from .device import memory_errors, name_of, to_device, to_dtype
from .errors import NonFiniteError
from .family import SD1, Family, native_size
from .image import save_png, to_pil
from .model import StableDiffusion, averaged, load_model
from .request import Plan, Request, noise_source, settle
from .samplers import SAMPLERS, Steps
from .schedule import noise_levels, scaled_linear, start_scale
from .tokenizer import tokenize


def load(
    path: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    ema: bool = False,
) -> Pipeline:
    """Opens a checkpoint and makes it ready to draw.

    path: a single-file SD 1.x checkpoint (.safetensors or .ckpt); without one, the tiny checkpoint in the box.
    device: "cpu", "cuda", …; by default a GPU if there is one.
    dtype: float32, bfloat16 or float16; by default float16 on a GPU, bfloat16 on a CPU that computes it, else float32.
    ema: draw with the moving average of the UNet's weights that some files carry beside them.
    Raises CheckpointError (the file), UsageError (the other arguments), OutOfMemoryError.
    """
    where = to_device(device)
    kind = to_dtype(dtype, where)
    checkpoint = open_checkpoint(path if path is not None else tiny_checkpoint())
    if ema:
        checkpoint = averaged(checkpoint)
    with memory_errors():
        return Pipeline(load_model(checkpoint, where, kind), checkpoint, SD1, where, kind)


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about the picture."""

    context: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P), in families that have it


@dataclass(frozen=True)
class Step:
    """One step of one or more pictures in the making."""

    index: int  # counts the steps of all pictures of the call, from 0
    total: int
    latents: Tensor  # (B, C, h, w), at the noise level that is left
    denoised: Tensor  # (B, C, h, w), the estimate of the finished latents


@dataclass(frozen=True)
class Result:
    """Finished pictures; index i of every field belongs to picture i."""

    images: list[Image.Image]
    seeds: list[int | None]  # None where the caller gave the noise
    latents: Tensor  # (B, C, h, w), of unit variance, float32
    metadata: list[dict[str, Any]]  # enough to make the picture again

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes every picture with its recipe: out.png, out-2.png, out-3.png, …  Returns the paths; raises OutputError."""
        return [
            save_png(*parts) for parts in zip(self.images, numbered_paths(path, len(self.images)), self.metadata, strict=True)
        ]


def numbered_paths(path: str | os.PathLike[str], count: int) -> list[Path]:
    path = Path(path)
    return [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(2, count + 1))]


class Pipeline:
    """A checkpoint that draws.  `load` makes one."""

    def __init__(
        self, model: StableDiffusion, checkpoint: Checkpoint, family: Family, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.checkpoint, self.family, self.device, self.dtype = model, checkpoint, family, device, dtype
        self.unet, self.vae, self.text_encoder = model.unet, model.vae, model.text_encoder
        self.native_size = native_size(family, checkpoint.metadata)
        self.schedule = scaled_linear()

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int = 20,
        guidance_scale: float = 7.5,
        sampler: str = "euler",
        seed: int | None = None,
        num_images: int = 1,
        latents: Tensor | None = None,
        eta: float = 0.0,
        spacing: str | None = None,
    ) -> Result:
        """Draws num_images pictures of each prompt.

        width, height: pixels, multiples of 8; by default what the checkpoint was trained at.
        steps: 1 … 999.  guidance_scale: 1 takes the prompt as trained and half the time, more follows it harder.
        sampler: "euler" or "ddim".  eta: 0 … 1, how much noise DDIM adds back at each step.
        spacing: "linspace", "leading" or "trailing", the noise levels visited; by default the sampler's own.
        seed: picture i uses seed + i and equals the single run with that seed; None or -1 draws one.
        latents: starting noise (B, C, h, w) of unit variance instead of a seed.
        Raises UsageError (arguments), OutOfMemoryError, NonFiniteError (no picture is made of NaN).
        """
        sizes = (width, height, steps)
        return finish(
            self.stream(
                Request(prompt, negative_prompt, *sizes, guidance_scale, sampler, seed, num_images, latents, eta, spacing)
            )
        )

    @torch.no_grad()
    def stream(self, request: Request) -> Generator[Step, None, Result]:
        """Draws as a generator: yields every step, for progress and previews, and returns the Result (`finish` gets it)."""
        plan = settle(request, self.native_size, self.vae.latent_channels, self.vae.downscale)
        sigmas = noise_levels(self.schedule, plan.spacing, plan.steps, SAMPLERS[plan.sampler].unit_variance)
        # One at a time on a CPU: as fast, less memory, and picture i is bit for bit that of the single run.
        size = 1 if self.device.type == "cpu" else len(plan.prompts)
        parts = [slice(first, first + size) for first in range(0, len(plan.prompts), size)]
        latents: list[Tensor] = []
        images: list[Image.Image] = []
        with memory_errors():
            for part in parts:
                for index, (x, denoised) in enumerate(self.sample(plan, part, sigmas), plan.steps * len(latents)):
                    yield Step(index, plan.steps * len(parts), x, denoised)
                latents.append(x / (sigmas[-1] ** 2 + 1).sqrt())
                images += self.decode(latents[-1])
        return Result(images, plan.seeds, torch.cat(latents), [self.recipe(plan, i) for i in range(len(images))])

    def sample(self, plan: Plan, part: slice, sigmas: Tensor) -> Steps:
        """From noise down the levels `sigmas`, for some of the pictures; yields (latents, denoised), (B, C, h, w) each."""
        prompts, noise = plan.prompts[part], plan.noise[part].to(self.device)  # (B, C, h, w)
        negative = [plan.negative_prompt] * len(prompts) if plan.guidance_scale != 1 else []
        context = self.encode_prompt(negative + prompts).context  # (B or 2*B, L, D)
        denoise = Denoiser(self.unet, self.schedule, context, plan.guidance_scale)
        sampler = SAMPLERS[plan.sampler]
        start = noise * start_scale(sigmas[0], plan.spacing, sampler.unit_variance)
        return sampler.run(denoise, start, sigmas, noise_source(plan.seeds[part], noise), plan.eta)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Texts -> what conditions the UNet: context (B, 77, D)."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return Conditioning(self.text_encoder(torch.tensor(tokenize(prompts), device=self.device)))

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) of unit variance -> pictures; again in float32 if the VAE overflows.  Raises NonFiniteError."""
        if not latents.isfinite().all():
            raise NonFiniteError(f"the UNet produced NaN or infinity in {name_of(self.dtype)}; draw with dtype float32")
        latents = latents / self.family.latent_scale
        pixels = self.vae.decode(latents.to(self.dtype))  # (B, 3, H, W)
        if not pixels.isfinite().all() and self.dtype != torch.float32:
            warnings.warn(f"the VAE overflowed in {name_of(self.dtype)}; decoding again in float32", stacklevel=2)
            pixels = self.vae.float().decode(latents)
            self.vae.to(self.dtype)
        if not pixels.isfinite().all():
            raise NonFiniteError(
                "the VAE produced NaN or infinity in float32 too: its weights or the latents are broken; try another VAE"
            )
        return [to_pil(image) for image in pixels]

    def recipe(self, plan: Plan, i: int) -> dict[str, Any]:
        """What `minisd again` and other programs need to know about picture i."""
        return {
            "prompt": plan.prompts[i],
            "negative_prompt": plan.negative_prompt,
            "width": plan.width,
            "height": plan.height,
            "steps": plan.steps,
            "guidance_scale": plan.guidance_scale,
            "sampler": plan.sampler,
            "sampler_label": SAMPLERS[plan.sampler].label,
            "eta": plan.eta,
            "spacing": plan.spacing,
            "seed": plan.seeds[i],
            "model": self.checkpoint.path.stem,
            "model_path": None if self.checkpoint.path == tiny_checkpoint() else str(self.checkpoint.path),
            "model_sha256": self.checkpoint.sha256(),
            "ema": self.checkpoint.ema,
            "device": self.device.type,
            "dtype": name_of(self.dtype),
            "torch": torch.__version__,
            "version": __version__,
        }


def finish(steps: Generator[Step, None, Result]) -> Result:
    """Runs `Pipeline.stream` to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def tiny_checkpoint() -> Path:
    """The trained checkpoint that minisd carries: beside the package when installed, in weights/ in a checkout."""
    installed = Path(str(resources.files("minisd"))) / "weights" / "tiny.safetensors"
    return installed if installed.exists() else Path(__file__).parents[1] / "weights" / "tiny.safetensors"

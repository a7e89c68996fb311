"""From a prompt to a picture.  Read this first: each station of the way has a file of its own name.

prompt -- tokenizer -- clip -- prompt: conditioning --.
                                                      +-- samplers: one denoiser (unet) call a step -- latents -- vae -- image
seed ---- request: noise, init image, mask -----------'
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import __version__
from .codec import Autoencoder, Codec, check_finite
from .diffusion.denoiser import Conditioning, Denoise, Denoiser, Noise, Steps, keeping
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import TRAINING_STEPS, Continuous, Schedule, noise_levels, scaled_linear, start_scale, zero_terminal
from .errors import CheckpointError, UsageError
from .fast.cuda import Runtime, plain, text_recorder
from .files.checkpoint import Checkpoint, open_checkpoint
from .files.model import StableDiffusion, averaged, load_model, load_vae
from .files.saving import save_model
from .library.names import resolve
from .library.places import tiny_checkpoint
from .models import ops
from .models.family import Recognition, Training
from .models.taesd import TinyAutoencoder
from .pictures.image import to_pil
from .pictures.preview import LinearDecoder, fit_decoder
from .request import Canvas, Model, Plan, Request, noise_source, one_of, recipe_of, settle
from .result import Result, Step, finish, keeping_finished
from .system.device import name_of, to_device, to_dtype, visiting
from .system.memory import memory_errors
from .text.conditioner import Conditioner
from .walks import guided, shrunk


def load(
    path: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    vae: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    prediction: str | None = None,
    offload: bool = False,
    ema: bool = False,
) -> Pipeline:
    """Opens a checkpoint and makes it ready to draw.

    path: a single-file checkpoint (.safetensors or .ckpt) of SD 1.x, SD 2.x, SDXL or its refiner, or as a text the short name
        of one in the library (library.py); without one, the tiny one in the box.
    device: "cpu", "cuda", …; by default a GPU if there is one.
    dtype: float32, bfloat16 or float16; by default float16 on a GPU, bfloat16 on a CPU that computes it, else float32.
    vae: a file whose VAE takes the place of the checkpoint's: a VAE alone, another checkpoint, or the tiny TAESD (whose two
        halves may be two files).
    prediction: "epsilon" or "v", what the network predicts, where the file says nothing of it or the wrong thing.
    offload: keep the parts in main memory and bring each to the device while it works: slower, for a small GPU.
    ema: draw with the moving average of the UNet's weights that some files carry beside them.
    Raises CheckpointError (the files), UsageError (the other arguments), OutOfMemoryError.
    """
    where = to_device(device)
    kind = to_dtype(dtype, where)
    ops.chosen()  # a wrong MINISD_KERNELS is told before anything is read
    one_of("prediction", prediction, (None, "epsilon", "v"))
    checkpoint = open_checkpoint(resolve(path) if path is not None else tiny_checkpoint())
    if ema:
        checkpoint = averaged(checkpoint)
    with memory_errors():
        model, recognition = load_model(checkpoint, torch.device("cpu") if offload else where, kind)
        if prediction is not None:
            recognition = replace(recognition, training=replace(recognition.training, prediction=prediction))
        pipe = Pipeline(model, recognition, checkpoint, where, kind)
        if vae is not None:
            pipe.replace_vae(*(resolve(file, "vae") for file in ([vae] if isinstance(vae, str | os.PathLike) else vae)))
    return pipe


class Pipeline:
    """A checkpoint that draws.  `load` makes one."""

    def __init__(
        self, model: StableDiffusion, recognition: Recognition, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.recognition, self.checkpoint, self.device, self.dtype = model, recognition, checkpoint, device, dtype
        self.family, self.training = recognition.family, recognition.training
        self.unet, self.text_encoders = model.unet, model.text_encoders
        self.codec, self.vae_checkpoint = Codec(model.vae, recognition, device, dtype), checkpoint
        self.schedule = schedule_of(self.training)

    @property
    def vae(self) -> Autoencoder:
        return self.codec.vae

    def replace_vae(self, *paths: str | os.PathLike[str]) -> None:
        """Encodes and decodes with the VAE of another file from now on (TAESD may be in two).  Raises CheckpointError."""
        files = [open_checkpoint(path) for path in paths]
        home = next(self.vae.parameters()).device
        vae = load_vae(files, self.vae.latent_channels, home, self.dtype)
        if vae.downscale != self.vae.downscale:
            expected = f"expected a VAE whose latents are {self.vae.downscale} times smaller than the picture"
            raise CheckpointError(files[0].path, f"{expected}, found {vae.downscale} times")
        self.model.first_stage_model, self.vae_checkpoint = vae, files[0]
        self.codec = Codec(vae, self.recognition, self.device, self.dtype)
        self.__dict__.pop("painter", None)

    @cached_property
    def painter(self) -> Codec | LinearDecoder:
        """What draws previews: a tiny autoencoder if that is the VAE, else a linear map that is fitted to the VAE."""
        tiny = isinstance(self.vae, TinyAutoencoder)
        return self.codec if tiny else fit_decoder(self.codec.encode, self.vae.downscale)

    @cached_property
    def runtime(self) -> Runtime | None:
        """What draws at full speed, where the UNet lives on a GPU; set it to None, and nothing is fused or recorded."""
        on_gpu = next(self.unet.parameters()).device.type == "cuda"
        return Runtime(self.unet, graphs=True) if on_gpu else None

    @cached_property
    def conditioner(self) -> Conditioner:
        """The text encoders, recorded where they live on a GPU."""
        if next(self.text_encoders[0].parameters()).device.type != "cuda":
            return Conditioner(self.family, self.text_encoders, self.device)
        recorded = {encoder: text_recorder(encoder, graphs=True) for encoder in self.text_encoders}
        return Conditioner(self.family, self.text_encoders, self.device, lambda encoder, ids: recorded[encoder](ids).unbind())

    @torch.no_grad()
    def preview(self, denoised: Tensor) -> list[Image.Image]:
        """What the finished pictures will look like, from `Step.denoised` (B, C, h, w): rough, at almost no cost."""
        return [to_pil(pixels) for pixels in self.painter.decode(denoised)]

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
        refiner: Pipeline | None = None,
        **more: Any,
    ) -> Result:
        """Draws num_images pictures of each prompt.

        `request.Request` explains these arguments and what `more` may hold: eta, spacing, guidance_rescale, clip_skip;
        init_image, strength, mask, image_guidance_scale; SDXL's zero_negative, original_size, crop, target_size.
        refiner: another pipeline (SDXL's refiner) that goes on where this one has drawn high_noise_frac of the noise schedule.
        Raises UsageError (arguments), OutOfMemoryError, NonFiniteError (no picture is made of NaN), Interrupted (Ctrl-C).
        """
        unknown = more.keys() - Request.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(Request.__dataclass_fields__)
            raise UsageError(f"{', '.join(sorted(unknown))}: unknown; expected some of {known}")
        sizes = (width, height, steps)
        request = Request(prompt, negative_prompt, *sizes, guidance_scale, sampler, seed, num_images, latents, **more)
        return finish(self.stream(request, refiner))

    @torch.no_grad()
    def stream(self, request: Request, refiner: Pipeline | None = None) -> Generator[Step, None, Result]:
        """Draws as a generator: yields every step, for progress and previews, and returns the Result (`finish` gets it)."""
        if not isinstance(request, Request):
            raise UsageError(f"request: expected a minisd.Request, found {type(request).__name__}")
        plan = settle(request, self.facts())
        if refiner is not None:
            check_refiner(self, refiner, request)
        sigmas = self.sigmas(plan)
        # One at a time on a CPU: as fast, less memory, and picture i is bit for bit that of the single run.
        size = 1 if self.device.type == "cpu" else len(plan.prompts)
        parts = [slice(first, first + size) for first in range(0, len(plan.prompts), size)]
        index, total = 0, len(parts) * (len(sigmas) - 1)
        latents: list[Tensor] = []
        images: list[Image.Image] = []
        recipes: list[dict[str, Any]] = []

        def drawn() -> Result | None:
            count = len(recipes)
            return Result(images[:count], plan.seeds[:count], torch.cat(latents)[:count], recipes) if recipes else None

        with keeping_finished(drawn), memory_errors():
            over = plan.canvas if self.recognition.task != "edit" else None  # an editing model starts from noise alone
            known = self.codec.encode(over.pixels) if over else None
            for part in parts:
                for x, denoised in relay(plan, part, sigmas, known, self, refiner):
                    if self.device.type == "cpu":  # not to draw on for minutes; a GPU would have to be waited for
                        check_finite(x, self.dtype, "UNet")
                    yield Step(index, total, x, denoised)
                    index += 1
                latents.append(x / (sigmas[-1] ** 2 + 1).sqrt())
                images += [paste(to_pil(pixels), plan.canvas) for pixels in self.codec.decode(latents[-1])]
                recipes += [self.recipe(plan, i, refiner) for i in range(len(recipes), len(images))]
            result = drawn()
        assert result is not None
        return result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the model as a raw .safetensors checkpoint, in the dtype that it is loaded in; returns the path.

        Raises UsageError if a tiny autoencoder stands in for the VAE, and OutputError.
        """
        if isinstance(self.vae, TinyAutoencoder):
            raise UsageError("save: a checkpoint needs a whole VAE, found a tiny autoencoder; load it without --vae")
        return save_model(self.model, self.checkpoint, path)

    def facts(self) -> Model:
        """What a request for this model is checked against."""
        layers = min(encoder.depth for encoder in self.text_encoders)
        return Model(self.recognition, self.vae.latent_channels, self.vae.downscale, layers)

    def sigmas(self, plan: Plan) -> Tensor:
        """The noise levels of the way, falling; a strength below 1 leaves out the first (diffusers, get_timesteps)."""
        sampler = SAMPLERS[plan.request.sampler]
        sigmas = noise_levels(self.schedule, plan.spacing, plan.request.steps, sampler.unit_variance)
        return sigmas[-1 - int(plan.request.steps * plan.canvas.strength) :] if plan.canvas else sigmas

    def start(self, plan: Plan, part: slice, sigmas: Tensor, known: Tensor | None) -> Tensor:
        """The first latents (B, C, h, w): noise, and under it the init image where there is one."""
        noise = plan.noise[part].to(self.device)
        keeps = self.recognition.task == "draw" and plan.canvas is not None and plan.canvas.mask is not None
        if known is not None and plan.canvas and (plan.canvas.strength < 1 or keeps):
            return known + noise * sigmas[0]
        return noise * start_scale(self.schedule, sigmas[0], plan.spacing, SAMPLERS[plan.request.sampler].unit_variance)

    def sample(self, plan: Plan, part: slice, x: Tensor, sigmas: Tensor, known: Tensor | None, noise: Noise) -> Steps:
        """From x down the noise levels `sigmas`, for some of the pictures; yields (latents, denoised), (B, C, h, w) each."""
        told = guided(plan, plan.prompts[part], self.recognition, self.conditioner, self.codec)
        for condition in told.conditions:
            check_finite(condition.context, self.dtype, "text encoder")
        mask = plan.canvas.mask if plan.canvas and self.recognition.task == "draw" else None
        kind = (self.training.prediction, self.training.sigma_data, plan.request.eta)
        if self.runtime and mask is None and plain(told.guide, *kind):
            return self.runtime.sample(x, sigmas, told.conditions, told.guide, self.schedule, self.training.prediction)
        unet = self.runtime.network(told.conditions) if self.runtime else self.unet
        how = (self.schedule, self.training.prediction, self.training.sigma_data)
        denoise: Denoise = Denoiser(unet, *how, told.conditions, told.guide)
        if mask is not None and known is not None:
            denoise = keeping(denoise, shrunk(mask, x), known)
        return SAMPLERS[plan.request.sampler].run(denoise, x, sigmas, noise, plan.request.eta)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str], clip_skip: int | None = None) -> Conditioning:
        """Texts -> what conditions the UNet: context (B, 77*k, D), pooled (B, P) or None."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self.conditioner.encode(prompts, clip_skip)

    def recipe(self, plan: Plan, i: int, refiner: Pipeline | None = None) -> dict[str, Any]:
        """What `minisd again` and other programs need to know about picture i."""
        files = file_facts("model", self.checkpoint)
        if self.vae_checkpoint is not self.checkpoint:
            files |= file_facts("vae", self.vae_checkpoint)
        if refiner:
            files |= file_facts("refiner", refiner.checkpoint)
        how: dict[str, Any] = {"ema": self.checkpoint.ema}
        how |= {"prediction": self.training.prediction if self.training.prediction in ("epsilon", "v") else None}
        here = {"device": self.device.type, "dtype": name_of(self.dtype), "torch": torch.__version__, "version": __version__}
        return recipe_of(plan, i) | files | how | here


def file_facts(name: str, checkpoint: Checkpoint) -> dict[str, str | None]:
    path = None if checkpoint.path == tiny_checkpoint() else str(checkpoint.path)
    tensors = checkpoint.metadata.get("modelspec.hash_sha256")  # stays the same when a merge is made again, on another day
    hashes = {f"{name}_sha256": checkpoint.sha256(), f"{name}_tensors_sha256": tensors}
    return {name: checkpoint.path.stem, f"{name}_path": path} | hashes


def relay(plan: Plan, part: slice, sigmas: Tensor, known: Tensor | None, base: Pipeline, refiner: Pipeline | None) -> Steps:
    """The way of some of the pictures: all of it with the base, or the rest of it with a refiner.

    The base draws the noise levels of the first timesteps, the refiner goes on from there (Podell et al. 2023, arXiv 2307.01952,
    section 2.5); a level belongs to the base if its timestep is at least the cutoff (diffusers, denoising_end).
    """
    x = base.start(plan, part, sigmas, known)
    noise = noise_source(plan.seeds[part], x)
    cutoff = round(TRAINING_STEPS * (1 - plan.request.high_noise_frac))
    turn = int((base.schedule.timestep(sigmas[:-1]) >= cutoff).sum()) if refiner else len(sigmas) - 1
    for painter, levels in ((base, sigmas[: turn + 1]), (refiner or base, sigmas[turn:])):
        if len(levels) > 1:
            steps = painter.sample(plan, part, x, levels, known, noise)
            with visiting(painter.unet, painter.device):
                for step in steps:
                    yield step
                    x = step[0]


def schedule_of(training: Training) -> Schedule:
    """The noise levels that a network was trained on."""
    if training.sigmas:
        return Continuous(*training.sigmas)
    return zero_terminal(scaled_linear()) if training.zero_terminal else scaled_linear()


def check_refiner(base: Pipeline, refiner: Pipeline, request: Request) -> None:
    """Raises UsageError unless the two can share latents and noise levels."""
    if base.recognition.task != "draw" or refiner.recognition.task != "draw":
        raise UsageError("refiner: expected two models that draw from text, found one that edits or inpaints")
    same = (base.recognition.latent_scale, base.training.sigmas) == (refiner.recognition.latent_scale, refiner.training.sigmas)
    if not same or base.training.sigmas:
        raise UsageError(
            f"refiner: expected a model with the latents and noise levels of {base.family.title}, found {refiner.family.title}"
        )


def paste(image: Image.Image, canvas: Canvas | None) -> Image.Image:
    """The picture, with what the mask keeps exactly as it was: the VAE alone would change it a little."""
    if canvas is None or canvas.mask is None:
        return image
    return Image.composite(image, to_pil(canvas.pixels[0]), Image.fromarray((canvas.mask[0, 0] * 255).byte().numpy()))

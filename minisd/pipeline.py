"""From a prompt to a picture.  Each station of the way has a file of its own name.

prompt -- text/tokenizer -- models/clip -- text/conditioner: conditioning --.
                                                                            +-- diffusion/samplers: one denoiser call a step --.
seed ---- diffusion/noise, pictures/init: noise, init image, mask ----------'                                                  |
                                                                                         picture -- models/vae -- latents -----'
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .addons.embeddings import Embedding, taught
from .addons.stack import Stack
from .addons.wanted import NOTHING, Wanted, as_loras, wanted
from .codec import Autoencoder, Codec
from .diffusion.denoiser import Conditioning, Network
from .diffusion.spacings import spacing_named, visited
from .errors import CheckpointError, UsageError
from .fast.choice import chosen
from .fast.engines import engine
from .fast.lossy.networks import in_float8
from .fast.ways import AsLoaded
from .files.checkpoint import Checkpoint, hashed_ahead, open_checkpoint
from .files.model import StableDiffusion, averaged, load_model, load_vae
from .files.saving import save_model
from .files.training import said
from .library.names import resolve
from .library.places import tiny_checkpoint
from .models.family import Recognition
from .models.taesd import TinyAutoencoder
from .options import FLAG, checked, whole
from .pictures.image import to_pil
from .pictures.preview import LinearDecoder, fit_decoder
from .plan import Capabilities, Plan, check_text, pasted, planned, reading_of
from .recipe import recipe_of
from .request import LoraLike, Request, taking_options
from .result import Drawn, Result, Step, finish, keeping_finished, with_bar
from .system.device import name_of, on_device, to_device, to_dtype
from .system.memory import memory_errors
from .text.conditioner import Conditioner
from .text.prompts import encode
from .walks import Progress, check_refiner, check_words, course, in_parts, known_latents, start, trained_on, walk
from .warmup.starting import compiling


def load(
    path: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    vae: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    prediction: str | None = None, zero_snr: bool | None = None,
    offload: bool = False, ema: bool = False, fast: bool | None = None, strict: bool = False, fp8: bool = False,
) -> Pipeline:  # fmt: skip
    """Opens a checkpoint and makes it ready to draw.

    path: a checkpoint (.safetensors, .ckpt) of SD 1.x, 2.x, SDXL or its refiner, or its name in the library; else the tiny one.
    device: "cpu", "cuda", …; by default a GPU if there is one.
    dtype: float32, bfloat16 or float16; by default float16 on a GPU, bfloat16 on a CPU that computes it, else float32.
    vae: a file whose VAE takes the place of the checkpoint's: a VAE alone, another checkpoint, or TAESD (maybe in two files).
    prediction: "epsilon" or "v", what the network predicts, where the file says nothing of it or the wrong thing.
    zero_snr: whether it was trained with zero terminal SNR, likewise; only with prediction v.
    offload: keep the parts in main memory and bring each to the device while it works: slower, for a small GPU.
    ema: draw with the moving average of the UNet's weights that some files carry beside them.
    fast: False computes with the modules as they stand, always; by default as the environment's MINISD_FAST (1 or 0) says.
    strict: refuse a checkpoint with tensors that nothing asks for, instead of telling which they are.
    fp8: keep the UNet's weights in float8, in half the memory, and less exact (fast.lossy.float8).
    Raises CheckpointError (the files), UsageError (the other arguments), OutOfMemoryError.
    """
    for name, value in (("fast", False if fast is None else fast), ("strict", strict), ("fp8", fp8)):
        FLAG.check(name, value)
    where = to_device(device)
    kind = to_dtype(dtype, where)
    chosen()  # a wrong MINISD_KERNELS is told before anything is read
    checkpoint = said(open_checkpoint(resolve(path) if path is not None else tiny_checkpoint()), prediction, zero_snr)
    checkpoint = averaged(checkpoint) if ema else checkpoint
    vae_files = [resolve(file, "vae") for file in ([vae] if isinstance(vae, str | os.PathLike) else vae or ())]
    with memory_errors(), compiling(checkpoint, where, kind, False if offload else fast, fp8):
        model, recognition = load_model(checkpoint, torch.device("cpu") if offload else where, kind, strict, vae_files)
        pipe = Pipeline(model, recognition, hashed_ahead(checkpoint), where, kind, fast)
        if vae_files:
            pipe.replace_vae(*vae_files)
        if fp8:
            in_float8(pipe)
    return pipe


class Pipeline:
    """A checkpoint that draws.  `load` makes one."""

    def __init__(
        self,
        model: StableDiffusion,
        recognition: Recognition,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        fast: bool | None = None,
    ) -> None:
        self.model, self.recognition, self.checkpoint, self.device, self.dtype = model, recognition, checkpoint, device, dtype
        self.family, self.training = recognition.family, recognition.training
        self.unet, self.text_encoders = model.unet, model.text_encoders
        self.network = Network(model.unet, trained_on(self.training), self.training.prediction, self.training.sigma_data)
        self.engine = engine(model, device, fast)
        at_work = partial(on_device, device=device)
        self.conditioner = Conditioner(self.family, self.text_encoders, device, self.engine.read, at_work)
        self.codec = Codec(model.vae, recognition, device, dtype, self.engine)
        self.as_loaded = AsLoaded((model.unet, *model.text_encoders, model.vae))
        self.stack = Stack(model, self.family, self.as_loaded.layering)
        self.embeddings: dict[str, Embedding] = {}  # by the name that prompts have for it
        self.vae_files: list[Checkpoint] = []  # of another VAE than the checkpoint's own
        self.batch_size = 1  # pictures of a step on a CPU; with more, those beside a picture may change its last digits

    def __repr__(self) -> str:
        where = f"{name_of(self.dtype)} on {self.device}"
        return f"Pipeline({self.checkpoint.path.name}: {self.family.title}, {self.recognition.task}, {where})"

    @property
    def vae(self) -> Autoencoder:
        """What encodes and decodes, in its own dtype and scale; `codec` makes latents of unit variance of it."""
        return self.codec.vae

    @torch.no_grad()
    def encode_prompt(
        self, prompts: str | Sequence[str], clip_skip: int | None = None, emphasis: str = "original", plain_prompt: bool = False
    ) -> Conditioning:
        """Texts -> what conditions the UNet: context (B, 77*k, D), pooled (B, P) or None.  May be given in a prompt's place.

        emphasis, plain_prompt: as in `Request`.  Raises UsageError also for texts with AND or editing, which are no single one.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, list | tuple) or not prompts:
            raise UsageError(f"prompts: expected a text or a list of texts, found {repr(prompts)[:80]}")
        reading = reading_of(emphasis, plain_prompt)
        for text in prompts:
            check_text("prompts", text, reading)
        if clip_skip is not None:
            whole(1, self.capabilities().text_layers).check("clip_skip", clip_skip)
        return encode(self.conditioner, prompts, reading, clip_skip)

    def noise_levels(self, spacing: str = "linspace", steps: int = 20) -> Tensor:
        """The levels (steps + 1,) of a spacing of diffusion.spacings, float64, falling to 0: what `sigmas` takes."""
        checked("steps", steps)
        return visited(spacing_named(spacing), self.network.schedule, steps, bool(self.family.vector))

    @taking_options(Request)
    def __call__(self, request: Request) -> Result:
        """Draws num_images pictures of each prompt; `request.Request` explains the arguments.

        Raises UsageError (arguments), OutOfMemoryError, NonFiniteError (no picture is made of NaN), Interrupted (Ctrl-C).
        """
        steps = self.stream(request)
        return with_bar(steps) if request.progress else finish(steps)

    @taking_options(Request)
    def stream(self, request: Request) -> Generator[Step, None, Result]:
        """Draws as a generator: yields every step, for progress and previews, and returns the Result (`finish` gets it).

        Takes the same arguments as the call, and checks them at once.
        """
        request, addons = wanted(request, self.stack.kept)
        self.stack.check(addons)
        plan = planned(request, self.capabilities())
        check_refiner(self, request.refiner)
        check_words(plan, self)
        return self.draw(plan, addons)

    @torch.no_grad()
    def draw(self, plan: Plan, addons: Wanted = NOTHING) -> Generator[Step, None, Result]:
        """The way itself, picture by picture on a CPU, all at once on a GPU."""
        legs, parts = course(plan, self), in_parts(plan, self)
        progress, drawn = Progress(plan, legs, len(parts)), Drawn(plan.seeds)
        with keeping_finished(drawn.result), memory_errors(), self.stack.holding(addons):
            known = known_latents(plan, self)
            for part in parts:
                x, noise = start(plan, part, legs[0], known)
                for leg in legs:
                    one = walk(plan, part, leg, known, progress)
                    for moment in leg.pipe.engine.walk(one, x, noise):
                        yield progress.step(moment)
                        x = moment.latents
                latents = progress.finished(x / legs[-1].levels.end_scale)
                pictures = [pasted(to_pil(pixels), plan.init) for pixels in self.codec.decode(latents)]
                drawn.add(latents, pictures, [recipe_of(plan, i, self, progress.way) for i in range(part.start, part.stop)])
        return drawn.whole()

    def attention(self, *given: Any, **options: Any) -> Any:
        """Draws one picture, and keeps where its pixels looked in the prompt: see `inside.maps.attention`."""
        from .inside.maps import attention

        return attention(self, *given, **options)

    @torch.no_grad()
    def preview(self, denoised: Tensor) -> list[Image.Image]:
        """What the finished pictures will look like, from `Step.denoised` (B, C, h, w): rough, at almost no cost."""
        return [to_pil(pixels) for pixels in self.previewer.decode(denoised)]

    @cached_property
    def previewer(self) -> Codec | LinearDecoder:
        """A tiny autoencoder if that is the VAE, else a linear map that is fitted to the VAE."""
        return self.codec if isinstance(self.vae, TinyAutoencoder) else fit_decoder(self.codec.encode, self.vae.downscale)

    def set_loras(self, loras: Sequence[LoraLike], rule: str = "paper", partial: bool = False) -> None:
        """Layers these, and no others, on the weights from now on: paths or names, (path, strength), (path, strength, text
        strength) or `addons.wanted.Lora`.  [] gives the file's own weights back, to the bit; a new strength reads no file again.

        rule, partial: `lora_rule`, `lora_partial` of a request.  Raises CheckpointError, UsageError, weights untouched.
        """
        self.stack.keep(Wanted(as_loras(loras), rule, partial))

    def add_embedding(self, path: str | os.PathLike[str], name: str | None = None) -> list[str]:
        """Teaches the text encoders the word of a textual inversion, or those inside a LoRA; returns their names.

        name: what prompts call it, bare or as embedding:NAME; by default the file's name.  Raises CheckpointError, UsageError.
        """
        self.conditioner, found = taught(self.conditioner, self.engine.read, resolve(path, "embedding"), name)
        self.embeddings |= found
        return list(found)

    def replace_vae(self, *paths: str | os.PathLike[str]) -> None:
        """Encodes and decodes with the VAE of another file from now on (TAESD may be in two).  Raises CheckpointError."""
        files = [hashed_ahead(open_checkpoint(path)) for path in paths]
        vae = load_vae(files, self.vae.latent_channels, next(self.vae.parameters()).device, self.dtype)
        if vae.downscale != self.vae.downscale:
            raise CheckpointError(files[0].path, f"expected latents {self.vae.downscale} times smaller, found {vae.downscale}")
        self.engine.replace(self.vae, vae)
        self.model.first_stage_model, self.vae_files = vae, files
        self.codec = Codec(vae, self.recognition, self.device, self.dtype, self.engine)
        self.as_loaded = AsLoaded((self.unet, *self.text_encoders, vae))
        self.stack.layering = self.as_loaded.layering
        self.__dict__.pop("previewer", None)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the model as a raw .safetensors checkpoint, in the dtype that it is loaded in; returns the path.

        Raises UsageError if a tiny autoencoder stands in for the VAE, and OutputError.
        """
        if isinstance(self.vae, TinyAutoencoder):
            raise UsageError("save: a checkpoint needs a whole VAE, found a tiny autoencoder; load it without --vae")
        return save_model(self.model, self.checkpoint, path)

    def weights_changed(self) -> None:
        """To be called after weights were written to through `.data`, which nothing shows; all other changes are noticed."""
        self.engine.refresh()

    def capabilities(self) -> Capabilities:
        """What a request for this model is checked against."""
        layers = min(encoder.depth for encoder in self.text_encoders)
        return Capabilities(self.recognition, self.vae.latent_channels, self.vae.downscale, layers, self.unet.context_channels)

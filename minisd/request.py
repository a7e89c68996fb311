"""The arguments of one call, as the user gave them, and what becomes of them once they are checked."""

from __future__ import annotations

import os
import re
import secrets
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .diffusion.denoiser import Noise
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import BY_SIGMA, SPACINGS, TRAINING_STEPS
from .errors import UsageError
from .files.checkpoint import data_sha256, file_sha256
from .models.family import Recognition
from .pictures.init import Picture, fingerprint, open_picture, to_mask, to_pixels

MAX_PROMPT = 10_000  # characters; the text encoder reads about 300 of them
MAX_SIDE = 4096  # pixels
MAX_IMAGES = 1000  # in one call
STRENGTH = 0.8  # of img2img where nobody says (diffusers' and OctoAI's default)
RANDOM_SEEDS = 4_294_967_294  # A1111 processing.py, get_fixed_seed


@dataclass(frozen=True)
class Request:
    """What a user may ask for.

    prompt: a text, or a list of texts, each of which gives num_images pictures.
    width, height: pixels, multiples of 8; by default those of the init image, else what the checkpoint was trained at.
    steps: 1 … 999.  guidance_scale: 1 takes the prompt as trained and half the time, more follows it harder.
    sampler: "euler" or "ddim".  eta: 0 … 1, how much noise DDIM adds back at each step.
    spacing: one of schedule.SPACINGS, the noise levels visited; by default what the checkpoint or the sampler wants.
    seed: picture i uses seed + i and equals the single run with that seed; None or -1 draws one.
    latents: starting noise (B, C, h, w) of unit variance instead of a seed.
    guidance_rescale: 0 … 1, against the glare of strong guidance; 0.7 is usual for models that predict v.
    clip_skip: 1 takes the last layer of the text encoders, 2 the one before it, …; by default the family's.
    init_image: a picture (PIL, or the path of one) to start from, to edit, or to paint into.
    strength: 0 … 1, how much of the way from noise is walked: 1 forgets the init image, a little keeps most of it.
    mask: a picture, white where to paint and black where to keep the init image.
    image_guidance_scale: how closely an editing model (InstructPix2Pix) keeps to the init image; 1 … 2 is usual.
    zero_negative: SDXL: an empty negative prompt is zeros (True) or the encoding of no words (False).
    original_size, crop, target_size: SDXL: (width, height), (left, top) and (width, height) that the UNet is told.
    aesthetic_score, negative_aesthetic_score: what the SDXL refiner is told of the picture wanted, and of the one not wanted.
    high_noise_frac: 0 … 1, the part of the noise schedule that the base draws before a refiner takes over.
    """

    prompt: str | Sequence[str]
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance_scale: float = 7.5
    sampler: str = "euler"
    seed: int | None = None
    num_images: int = 1
    latents: Tensor | None = None
    eta: float = 0.0
    spacing: str | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    init_image: Picture | None = None
    strength: float | None = None
    mask: Picture | None = None
    image_guidance_scale: float = 1.5
    zero_negative: bool | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    high_noise_frac: float = 0.8


@dataclass(frozen=True)
class Canvas:
    """What is known of the picture before it is drawn."""

    pixels: Tensor  # (1, 3, H, W) in [-1, 1]
    mask: Tensor | None  # (1, 1, H, W), 1 where to paint, 0 where to keep
    strength: float
    sources: dict[str, str | None]  # the init image and the mask: their paths where they have one, and fingerprints


@dataclass(frozen=True)
class Plan:
    """A request that was checked, everything settled that it left open.  prompts, seeds and noise go together, by picture."""

    request: Request
    prompts: list[str]
    width: int
    height: int
    spacing: str
    zero_negative: bool
    canvas: Canvas | None
    seeds: list[int | None]  # None where the caller gave the noise
    noise: Tensor  # (B, C, h, w), unit variance, float32, on the CPU


@dataclass(frozen=True)
class Model:
    """What must be known of a model to check a request for it."""

    recognition: Recognition
    channels: int  # of its latents
    downscale: int  # how many times smaller than the picture they are
    text_layers: int  # of its shallowest text encoder

    @property
    def spacing(self) -> str | None:
        """The noise levels that the model asks for; None leaves them to the sampler."""
        training = self.recognition.training
        if training.sigmas:
            return "karras" if training.prediction == "edm" else "exponential"  # Playground 2.5's and CosXL's own
        return "trailing" if training.zero_terminal else None


def settle(request: Request, model: Model) -> Plan:
    """Checks a request for a model.  Raises UsageError, which names the argument, what was expected and what was found."""
    given = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
    whole("num_images", request.num_images, 1, MAX_IMAGES)
    for text in (*given, request.negative_prompt):
        check_text(text)
    if not given:
        raise UsageError("prompt: expected at least one, found an empty list")
    prompts = [text for text in given for _ in range(request.num_images)]
    check_numbers(request, model)
    spacing = request.spacing or model.spacing or SAMPLERS[request.sampler].spacing
    one_of("spacing", spacing, tuple(BY_SIGMA) if model.recognition.training.sigmas else SPACINGS)
    init = open_picture("init_image", request.init_image) if request.init_image is not None else None
    width, height = picture_size(request, model, init)
    canvas = settle_canvas(request, model, init, width, height)
    zero = model.recognition.family.zero_negative if request.zero_negative is None else request.zero_negative
    seeds, noise = start(request, (len(prompts), model.channels, height // model.downscale, width // model.downscale))
    return Plan(request, prompts, width, height, spacing, zero and not request.negative_prompt, canvas, seeds, noise)


def check_numbers(request: Request, model: Model) -> None:
    whole("steps", request.steps, 1, TRAINING_STEPS - 1)
    number("guidance_scale", request.guidance_scale, 0, 100)
    number("guidance_rescale", request.guidance_rescale, 0, 1)
    number("image_guidance_scale", request.image_guidance_scale, 0, 100)
    number("eta", request.eta, 0, 1)
    one_of("sampler", request.sampler, SAMPLERS)
    if request.eta and request.sampler != "ddim":
        raise UsageError(f"eta: expected 0 with sampler {request.sampler!r}, found {request.eta}; only ddim adds noise")
    if request.clip_skip is not None:
        whole("clip_skip", request.clip_skip, 1, model.text_layers)
    if request.zero_negative and not model.recognition.family.vector:
        raise UsageError(f"zero_negative: only SDXL was trained so, found {model.recognition.family.title}")
    number("high_noise_frac", request.high_noise_frac, 0, 1)
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        number(name, getattr(request, name), 0, 10)
    for name in ("original_size", "crop", "target_size"):
        pair = getattr(request, name)
        if pair is not None and (len(pair) != 2 or not all(isinstance(side, int) and 0 <= side <= 65_536 for side in pair)):
            raise UsageError(f"{name}: expected two whole numbers from 0 to 65,536, found {pair!r}")


def picture_size(request: Request, model: Model, init: Image.Image | None) -> tuple[int, int]:
    """(width, height): as asked for, else that of the init image in whole eights, else the model's own."""
    default = tuple(max(8, side // 8 * 8) for side in init.size) if init else model.recognition.size
    width, height = (
        side if side is not None else own for side, own in zip((request.width, request.height), default, strict=True)
    )
    for name, side in (("width", width), ("height", height)):
        whole(name, side, 8, MAX_SIDE)
        if side % 8:
            near = side // 8 * 8
            raise UsageError(f"{name}: expected a multiple of 8, found {side}; the nearest are {near} and {near + 8}")
    return width, height


def settle_canvas(request: Request, model: Model, init: Image.Image | None, width: int, height: int) -> Canvas | None:
    """The pictures that the request gives, which must be those that the model's task asks for."""
    task = model.recognition.task
    if init is None:
        if task != "draw":
            needs = "a picture" if task == "edit" else "a picture and a mask"
            raise UsageError(f"init_image: this checkpoint is trained to {task}; it needs {needs}, found none")
        for name in ("mask", "strength"):
            if getattr(request, name) is not None:
                raise UsageError(f"{name}: expected an init_image to go with it, found none")
        return None
    if task == "inpaint" and request.mask is None:
        raise UsageError("mask: this checkpoint is trained to inpaint; it needs a mask, found none")
    if task == "edit" and request.mask is not None:
        raise UsageError("mask: this checkpoint edits the whole picture; expected no mask")
    if task == "edit" and request.strength not in (None, 1):
        raise UsageError(f"strength: this checkpoint edits by image_guidance_scale; expected 1, found {request.strength}")
    strength = request.strength if request.strength is not None else STRENGTH if task == "draw" and request.mask is None else 1.0
    number("strength", strength, 0, 1)
    if int(request.steps * strength) < 1:
        raise UsageError(f"strength: {strength} of {request.steps} steps is less than one; give more of either")
    sources = {"init_image": path_of(request.init_image), "init_sha256": fingerprint(init), "mask": None}
    mask = None
    if request.mask is not None:
        picture = open_picture("mask", request.mask)
        mask = to_mask(picture, width, height)
        sources |= {"mask": path_of(request.mask), "mask_sha256": fingerprint(picture)}
        if not mask.any():
            raise UsageError("mask: expected white where to paint, found none")
    return Canvas(to_pixels(init, width, height), mask, float(strength), sources)


def path_of(picture: Picture | None) -> str | None:
    return None if picture is None or isinstance(picture, Image.Image) else os.path.abspath(picture)


def start(request: Request, shape: tuple[int, ...]) -> tuple[list[int | None], Tensor]:
    """The seed of every picture and the noise that it starts from, (B, C, h, w).

    Each picture has a generator of its own, on the CPU: picture i equals the single run with its seed, on every device.
    """
    if request.latents is not None:
        if request.seed is not None:
            raise UsageError("latents and seed: expected one of the two, found both")
        if not isinstance(request.latents, Tensor) or tuple(request.latents.shape) != shape:
            raise UsageError(f"latents: expected a tensor of shape {shape}, found {tuple(getattr(request.latents, 'shape', ()))}")
        return [None] * shape[0], request.latents.detach().float().cpu()
    first = secrets.randbelow(RANDOM_SEEDS) if request.seed in (None, -1) else request.seed
    assert first is not None
    whole("seed", first, 0, 2**63 - 1 - shape[0])
    seeds = [first + i for i in range(shape[0])]
    return list(seeds), torch.cat([torch.randn((1, *shape[1:]), generator=generator(seed)) for seed in seeds])


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def noise_source(seeds: Sequence[int | None], like: Tensor) -> Noise:
    """Fresh unit noise (B, C, h, w) at each call; every picture's own generator goes on behind its starting noise."""
    generators = [torch.Generator("cpu").manual_seed(0) if seed is None else generator(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.cat([torch.randn((1, *like.shape[1:]), generator=source) for source in generators]).to(like.device)

    draw()
    return draw


def whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name}: expected a whole number from {low} to {high}, found {value!r}")


def number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not low <= value <= high:  # which NaN is not, either
        raise UsageError(f"{name}: expected a number from {low} to {high}, found {value!r}")


def one_of(name: str, value: object, choices: Collection[str | None]) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        raise UsageError(f"{name}: expected one of {known}, found {value!r}")


# What other programs understand in a prompt: (red:1.2), <lora:name:0.8>.
SYNTAX = re.compile(r"\([^()]*[^\W\d][^()]*:\s*(\d?\.\d+|\d)\s*\)|<(lora|lyco|hypernet):[^<>]*>")


def check_text(text: object) -> None:
    if not isinstance(text, str):
        raise UsageError(f"prompt: expected a text or a list of texts, found {type(text).__name__}")
    if len(text) > MAX_PROMPT:
        raise UsageError(
            f"prompt: expected at most {MAX_PROMPT:,} characters, found {len(text):,}; the text encoder reads about 300"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("prompt: expected text in UTF-8, found bytes that are not") from None
    if "\0" in text:
        raise UsageError("prompt: expected a text, found a NUL character in it")
    if found := SYNTAX.search(text):
        warnings.warn(
            f"prompt: {found[0]!r} is read as plain words: weights and LoRAs in a prompt are not known yet", stacklevel=2
        )


REPEATED = tuple(name for name in Request.__dataclass_fields__ if name not in ("latents", "num_images"))


def recipe_of(plan: Plan, i: int) -> dict[str, Any]:
    """What was asked for and settled about picture i, ready for JSON."""
    asked = {name: getattr(plan.request, name) for name in REPEATED}
    settled = {"prompt": plan.prompts[i], "width": plan.width, "height": plan.height, "spacing": plan.spacing}
    settled |= {"seed": plan.seeds[i], "sampler_label": SAMPLERS[plan.request.sampler].label}
    given = {"strength": plan.canvas.strength, **plan.canvas.sources} if plan.canvas else {}
    recipe = asked | settled | given
    return {name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()}


def is_same(recipe: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether a file is the model that a recipe names, or has its numbers, as a merge that was made again."""
    if recipe.get("model_sha256") in (None, file_sha256(checkpoint)):
        return True
    tensors = recipe.get("model_tensors_sha256")
    return isinstance(tensors, str) and data_sha256(checkpoint) == tensors.removeprefix("0x")


def repeat(recipe: Mapping[str, Any], checkpoint: Path) -> Request:
    """The request that a picture's recipe describes.  Warns if a file is no longer the one it was; raises UsageError."""
    if recipe.get("seed") in (None, -1):
        raise UsageError(
            "the picture was drawn from noise that its caller gave, which it does not carry; it cannot be made again"
        )
    if not is_same(recipe, checkpoint):
        warnings.warn(f"{checkpoint} is not the checkpoint that drew this picture ({recipe.get('model')})", stacklevel=2)
    for name, known in (("init_image", recipe.get("init_sha256")), ("mask", recipe.get("mask_sha256"))):
        if known is None:
            continue
        if not recipe.get(name):
            raise UsageError(f"{name}: the picture was made from one that had no file; it cannot be made again")
        if fingerprint(open_picture(name, recipe[name])) != known:
            warnings.warn(f"{name} {recipe[name]} is not the picture that this one was made from", stacklevel=2)
    if "prompt" not in recipe:
        raise UsageError("the picture's minisd chunk says nothing of its prompt")
    count = recipe.get("grid", 1)  # pictures; a grid carries the recipe of its first
    whole("grid", count, 1, MAX_IMAGES)
    return Request(**{name: recipe[name] for name in REPEATED if name in recipe}, num_images=count)

"""The arguments of one call, as the user gave them, and what becomes of them once they are checked."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError
from .samplers import SAMPLERS, Noise
from .schedule import SPACINGS, TRAINING_STEPS

MAX_PROMPT = 10_000  # characters; the text encoder reads about 300 of them
MAX_SIDE = 4096  # pixels
MAX_IMAGES = 1000  # in one call
RANDOM_SEEDS = 4_294_967_294  # A1111 processing.py, get_fixed_seed


@dataclass(frozen=True)
class Request:
    """What a user may ask for; `Pipeline.__call__` explains each field."""

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


@dataclass(frozen=True)
class Plan:
    """A request that was checked, everything settled that it left open.  prompts, seeds and noise go together, by picture."""

    prompts: list[str]
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    eta: float
    spacing: str
    seeds: list[int | None]  # None where the caller gave the noise
    noise: Tensor  # (B, C, h, w), unit variance, float32, on the CPU


def settle(request: Request, native_size: tuple[int, int], channels: int, downscale: int) -> Plan:
    """Checks a request for a model with so many latent channels, each so many times smaller than the picture.

    Raises UsageError, which names the argument, what was expected and what was found.
    """
    given = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
    whole("num_images", request.num_images, 1, MAX_IMAGES)
    for text in (*given, request.negative_prompt):
        check_text(text)
    if not given:
        raise UsageError("prompt: expected at least one, found an empty list")
    prompts = [text for text in given for _ in range(request.num_images)]
    width, height = request.width or native_size[0], request.height or native_size[1]
    for name, side in (("width", width), ("height", height)):
        whole(name, side, 8, MAX_SIDE)
        if side % 8:
            raise UsageError(
                f"{name}: expected a multiple of 8, found {side}; the nearest are {side // 8 * 8} and {side // 8 * 8 + 8}"
            )
    whole("steps", request.steps, 1, TRAINING_STEPS - 1)
    number("guidance_scale", request.guidance_scale, 0, 100)
    number("eta", request.eta, 0, 1)
    one_of("sampler", request.sampler, SAMPLERS)
    spacing = request.spacing or SAMPLERS[request.sampler].spacing
    one_of("spacing", spacing, SPACINGS)
    if request.eta and request.sampler != "ddim":
        raise UsageError(f"eta: expected 0 with sampler {request.sampler!r}, found {request.eta}; only ddim adds noise")
    shape = (len(prompts), channels, height // downscale, width // downscale)
    seeds, noise = start(request, shape)
    settled = (request.steps, float(request.guidance_scale), request.sampler, float(request.eta), spacing)
    return Plan(prompts, request.negative_prompt, width, height, *settled, seeds, noise)


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
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name}: expected a number from {low} to {high}, found {value!r}")


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")


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

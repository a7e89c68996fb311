"""What becomes of a request once it is checked for a model: everything settled that it left open."""

from __future__ import annotations

import math
import os
import re
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .addons.controls.control import as_controls
from .diffusion.denoiser import Conditioning, Timeline
from .diffusion.noise import Origin, dialect_named
from .diffusion.samplers import SAMPLERS, Sampler, named
from .diffusion.spacings import SPACINGS, spacing_named
from .diffusion.worlds import DEFAULTS, OWN_DEFAULTS, sde_noise_of
from .errors import UsageError
from .models.family import Recognition
from .options import MAX_IMAGES, MAX_SIDE, OPTIONS, checked, whole
from .pictures.init import Picture, as_tensor, fingerprint, open_picture, to_mask, to_pixels
from .pictures.masks import paste
from .request import Request
from .text import grammar
from .text.added import Added, called

MAX_PROMPT = 10_000  # characters; the text encoder reads about 300 of them


STRENGTH = 0.8  # of img2img where nobody says (diffusers' and OctoAI's default)


LARGEST = 4  # times the pixels that a model was trained at: what is drawn over a picture at most, where nobody says


RANDOM_SEEDS = 4_294_967_294  # A1111 processing.py, get_fixed_seed


@dataclass(frozen=True)
class InitImage:
    """What is known of the picture before it is drawn."""

    pixels: Tensor  # (1, 3, H, W) in [-1, 1]
    mask: Tensor | None  # (1, 1, H, W), 1 where to paint, 0 where to keep
    strength: float
    sources: dict[str, str | None]  # the init image and the mask: their paths where they have one, and fingerprints


def pasted(picture: Image.Image, init: InitImage | None) -> Image.Image:
    """A finished picture, with what the mask keeps of the init image exactly as it was."""
    return picture if init is None or init.mask is None else paste(picture, init.pixels, init.mask)


@dataclass(frozen=True)
class Plan:
    """A request that was checked, everything settled that it left open.  Lists go by picture."""

    request: Request
    prompts: list[str]
    negatives: list[str]
    scales: list[float]  # of guidance
    seeds: list[int | None]  # None where the caller gave the noise
    origins: list[Origin]  # of all other noise, where he did
    latents: Tensor | None  # (B, C, h, w), the caller's starting noise, float32
    shape: tuple[int, int, int]  # (C, h, w) of the latents
    width: int
    height: int
    sampler: Sampler
    options: dict[str, Any]  # of the sampler
    spacing: str
    zero_negative: list[bool]
    init: InitImage | None
    reading: str  # how prompts are read: one of options.EMPHASES, or "plain"
    seconds: dict[str, list[str | None]]  # what the second text encoder reads, by prompt_2 and negative_prompt_2


@dataclass(frozen=True)
class Capabilities:
    """What must be known of a model to check a request for it."""

    recognition: Recognition
    channels: int  # of its latents
    downscale: int  # how many times smaller than the picture they are
    text_layers: int  # of its shallowest text encoder
    context: int  # channels of what its UNet reads of a prompt

    @property
    def spacing(self) -> str | None:
        """The noise levels that the model asks for; None leaves them to the sampler."""
        training = self.recognition.training
        if training.sigmas:
            return "karras" if training.prediction == "edm" else "exponential"  # Playground 2.5's and CosXL's own
        return "trailing" if training.zero_terminal else None


def planned(request: Request, model: Capabilities) -> Plan:
    """Checks a request for a model.  Raises UsageError, which names the argument, what was expected and what was found."""
    request = as_in(request)
    if request.refiner is not None and any(
        isinstance(x, Conditioning | Timeline) for x in (request.prompt, request.negative_prompt)
    ):
        raise UsageError("refiner: expected prompts that are texts, found a conditioning, which one model alone can read")
    reading = reading_of(request.emphasis, request.plain_prompt)
    texts = texts_of(request, model, reading)
    if request.seeds is not None and not isinstance(request.seeds, str):
        if request.seed is not None:
            raise UsageError("seed and seeds: expected a list in one of the two, found both")
        request = replace(request, seed=request.seeds, seeds="rising")
    request = replace(request, **{name: checked(name, getattr(request, name)) for name in OPTIONS if name != "negative_prompt"})
    controls = as_controls(request.controls, "noise" if request.like == "comfyui" else "steps")
    request = replace(request, rng=dialect_named(request.rng), controls=controls)
    sampler, request = sampler_of(request)
    options = sampler_options(request, sampler)
    if request.sde_noise is None:
        request = replace(request, sde_noise=sde_noise_of(request.like, request.sampler))
    if request.guidance_scale is None:
        request = replace(request, guidance_scale=model.recognition.guidance)
    check_for_model(request, model)
    check_seconds(request, model, reading)
    check_noise(request)
    check_shortcuts(request, sampler)
    spacing = spacing_of(request, model, sampler)
    init = open_picture("init_image", request.init_image) if request.init_image is not None else None
    width, height = picture_size(request, model, init)
    shape = (model.channels, height // model.downscale, width // model.downscale)
    prompts, negatives, scales, seeds, seconds = by_picture(request, *texts)
    latents = own_latents(request, (len(prompts), *shape))
    zero = model.recognition.family.zero_negative if request.zero_negative is None else request.zero_negative
    empty = [not first and not second for first, second in zip(negatives, seconds["negative_prompt_2"], strict=True)]
    zeros = [zero and each and isinstance(request.negative_prompt, str | Sequence) for each in empty]
    return Plan(
        request, prompts, negatives, scales, [None] * len(seeds) if latents is not None else list(seeds),
        origins_of(request, seeds), latents, shape,
        width, height, sampler, options, spacing, zeros, settle_init(request, model, init, width, height),
        reading, seconds,
    )  # fmt: skip


def reading_of(emphasis: object, plain: object) -> str:
    """How prompts are read: as text/grammar.py calls it.  Raises UsageError."""
    found = str(checked("emphasis", emphasis) or "original")
    if not checked("plain_prompt", plain):
        return found
    if found != "original":
        raise UsageError(f"emphasis: expected none beside plain_prompt, which reads no weights, found {found!r}")
    return "plain"


def texts_of(request: Request, model: Capabilities, reading: str) -> tuple[list[str], list[str]]:
    """The prompts, and the negative ones; empty texts where conditionings are given in their place."""
    found = []
    for name in ("prompt", "negative_prompt"):
        value = getattr(request, name)
        if name == "negative_prompt" and value is None:  # as diffusers has it
            value = ""
        if isinstance(value, Conditioning | Timeline):
            count = check_conditioning(name, value, model)
            texts = [""] * count
        else:
            texts = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
        for text in texts:
            check_text(name, text, reading)
        if not texts:
            raise UsageError(f"{name}: expected at least one, found an empty list")
        found.append(texts)
    return found[0], found[1]


def check_conditioning(name: str, given: Conditioning | Timeline, model: Capabilities) -> int:
    """How many pictures a conditioning is for."""
    entries = given.entries if isinstance(given, Timeline) else ((0, given),)
    if not entries:
        raise UsageError(f"{name}: expected at least one conditioning, found a timeline without")
    for _, each in entries:
        shape = tuple(getattr(each.context, "shape", ()))
        if not isinstance(each.context, Tensor) or len(shape) != 3 or shape[2] != model.context or shape[1] % 77 or 0 in shape:
            raise UsageError(f"{name}: expected a conditioning with context (B, 77*k, {model.context}), found {shape}")
        if model.recognition.family.vector and (each.pooled is None or each.pooled.dim() != 2 or len(each.pooled) != shape[0]):
            found = None if each.pooled is None else tuple(each.pooled.shape)
            raise UsageError(f"{name}: expected a conditioning with a pooled vector ({shape[0]}, P), found {found}")
        if not each.context.isfinite().all():
            raise UsageError(f"{name}: expected a conditioning of numbers, found NaN or infinity")
    sizes = {tuple(each.context.shape) for _, each in entries}
    if len(sizes) > 1:
        raise UsageError(f"{name}: expected conditionings of one shape at all times, found {sorted(sizes)}")
    return sizes.pop()[0]


def by_picture(
    request: Request, prompts: list[str], negatives: list[str]
) -> tuple[list[str], list[str], list[float], list[int], dict[str, list[str | None]]]:
    """Prompts, negative prompts, guidance scales, seeds, and what the second text encoder reads, one for each picture."""
    seconds = {"prompt_2": request.prompt_2, "negative_prompt_2": request.negative_prompt_2}
    given = seconds | {"negative_prompt": negatives, "guidance_scale": request.guidance_scale, "seed": request.seed}
    lists = {name: list(value) for name, value in given.items() if isinstance(value, list | tuple) and len(value) != 1}
    each = request.num_images
    if len(prompts) == 1 and each == 1:
        each = max([1, *map(len, lists.values())])
    count = len(prompts) * each
    if count > MAX_IMAGES:
        raise UsageError(f"num_images: expected at most {MAX_IMAGES:,} pictures in one call, found {count:,}")

    def spread(name: str, value: Any) -> list[Any]:
        values = list(value) if isinstance(value, list | tuple) else [value]
        if len(values) in (1, count):
            return values * count if len(values) == 1 else values
        if len(values) == len(prompts):
            return [one for one in values for _ in range(each)]
        by_prompt = f"{len(prompts)}, one for each prompt" if len(prompts) > 1 else ""
        known = ", or ".join(filter(None, ["one", by_prompt, f"{count}, one for each picture" if each > 1 else ""]))
        raise UsageError(f"{name}: expected {known}, found {len(values)}")

    return (
        [prompt for prompt in prompts for _ in range(each)],
        spread("negative_prompt", negatives),
        spread("guidance_scale", request.guidance_scale),
        settle_seeds(request, len(prompts), each, spread),
        {name: spread(name, value) for name, value in seconds.items()},
    )


def settle_seeds(request: Request, prompts: int, each: int, spread: Callable[[str, Any], list[Any]]) -> list[int]:
    """The seed of every picture, of `each` pictures of each prompt."""

    def drawn(seed: int | None) -> int:
        return secrets.randbelow(RANDOM_SEEDS) if seed in (None, -1) else seed  # type: ignore[return-value]

    given = request.seed
    if isinstance(given, list | tuple):
        if request.seeds == "same" and len(given) == each:
            return [drawn(seed) for seed in given] * prompts
        seeds = [drawn(seed) for seed in spread("seed", given)]
        rises = prompts > 1 and len(given) == prompts  # a seed for each prompt: its pictures go on from there
        return [seed + i % each if rises else seed for i, seed in enumerate(seeds)]
    first = drawn(given)  # type: ignore[arg-type]
    if request.rng == "comfy" or request.subseed_strength:  # all of one seed, as there
        return [first] * (prompts * each)
    return [first + (i % each if request.seeds == "same" else i) for i in range(prompts * each)]


def check_noise(request: Request) -> None:
    for name in ("subseed_strength", "ensd"):
        if request.rng == "comfy" and getattr(request, name):
            raise UsageError(f"{name}: expected 0 with rng comfy, which has none, found {getattr(request, name)}")
    if request.subseed_strength and request.latents is not None:
        raise UsageError("latents and subseed_strength: expected one of the two, found both")
    if request.batch_place is not None and not request.batch_place[0] < request.batch_place[1] <= MAX_IMAGES:
        raise UsageError(f"batch_place: expected (i, B) with i < B <= {MAX_IMAGES}, found {request.batch_place}")


def check_shortcuts(request: Request, sampler: Sampler) -> None:
    """What is left out for speed: who has nothing to leave out, or cannot do without, is told so."""
    for name in ("controls", "rescue"):
        if request.cache > 1 and getattr(request, name):
            raise UsageError(f"cache: expected 1 beside {name}, which looks into every block of the UNet, found {request.cache}")
    if request.cfg_until == 1:
        return
    scales = request.guidance_scale if isinstance(request.guidance_scale, tuple) else (request.guidance_scale,)
    why = {
        "guidance_scale 1, which is none": set(scales) == {1},
        "a guide of one's own, which may look at call.step itself": request.guide is not None,
        "guidance_rescale, which measures both answers": bool(request.guidance_rescale),
        f"sampler {sampler.label!r}, which asks for the negative prompt at every step": sampler.pair,
    }
    for found, holds in why.items():
        if holds:
            raise UsageError(f"cfg_until: expected 1 beside {found}, found {request.cfg_until}")


def origins_of(request: Request, seeds: Sequence[int]) -> list[Origin]:
    """What the noise of every picture is made of.  In dialect comfy those of one given seed are a batch."""
    if request.rng == "comfy":
        if isinstance(request.seed, list | tuple):
            return [Origin(seed) for seed in seeds]
        own = request.num_images if request.seeds == "same" else len(seeds)
        first, size = request.batch_place or (0, own)
        return [Origin(seed, index=first + i % own, batch=max(size, first + own)) for i, seed in enumerate(seeds)]
    given, strength = request.subseed, request.subseed_strength
    subseed = secrets.randbelow(RANDOM_SEEDS) if given in (None, -1) else given
    return [
        Origin(
            seed,
            subseed + i if strength and subseed is not None else None,
            strength,
            seed + request.ensd if request.ensd else None,
        )
        for i, seed in enumerate(seeds)
    ]


def own_latents(request: Request, shape: tuple[int, ...]) -> Tensor | None:
    if request.latents is None:
        return None
    if request.seed is not None:
        raise UsageError("latents and seed: expected one of the two, found both")
    found = tuple(getattr(request.latents, "shape", ()))
    if found != shape:
        raise UsageError(f"latents: expected a tensor of shape {shape}, found {found or type(request.latents).__name__}")
    latents = as_tensor("latents", request.latents).float()
    if not latents.isfinite().all():
        raise UsageError("latents: expected numbers, found NaN or infinity")
    return latents


def as_in(request: Request) -> Request:
    """With the defaults of minisd, or of the program that it is to be like, for what nobody asked for."""
    defaults = OWN_DEFAULTS | DEFAULTS.get(str(request.like), {})
    if request.emphasis is not None:  # which a text without grammar has not
        defaults["plain_prompt"] = False
    open_: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(request, name) is None}
    return replace(request, **open_)


def sampler_of(request: Request) -> tuple[Sampler, Request]:
    """The sampler of a name or of a user's own function, and the request with our name for it."""
    given = request.sampler
    if isinstance(given, Sampler):
        return given, request
    if callable(given):
        return Sampler(given, getattr(given, "__name__", type(given).__name__)), request
    if not isinstance(given, str):
        raise UsageError(f"sampler: expected the name of one, or a function, found {repr(given)[:80]}")
    name, spacing = named(given)
    if spacing and request.spacing is not None and spacing_named(request.spacing) != spacing:
        raise UsageError(f"spacing: sampler {given!r} says {spacing}, found {request.spacing}")
    return SAMPLERS[name], replace(request, sampler=name, spacing=spacing or request.spacing)


def spacing_of(request: Request, model: Capabilities, sampler: Sampler) -> str:
    """As asked for, else the model's, else the sampler's.  Raises UsageError where the model has not what it needs."""
    asked = None if request.spacing is None or request.spacing.casefold() == "automatic" else spacing_named(request.spacing)
    own = None if model.recognition.training.sigmas and SPACINGS[sampler.wish.spacing].timesteps else sampler.wish.spacing
    spacing = asked or model.spacing or own or "karras"
    if model.recognition.training.sigmas and SPACINGS[spacing].timesteps:
        known = ", ".join(name for name, each in SPACINGS.items() if not each.timesteps)
        raise UsageError(f"spacing: expected one of {known} for a model without timesteps, found {spacing!r}")
    return spacing


def sampler_options(request: Request, sampler: Sampler) -> dict[str, Any]:
    """What is asked of the sampler itself.  Raises UsageError."""
    given = dict(request.sampler_options or {})
    if request.eta is not None and ("eta" in sampler.options or request.eta):
        if given.get("eta", request.eta) != request.eta:
            raise UsageError(f"eta: expected one, found {request.eta} and, in sampler_options, {given['eta']}")
        given["eta"] = request.eta
    return sampler.checked(given)


def check_for_model(request: Request, model: Capabilities) -> None:
    """What one option says of another, or the model of it."""
    if 0 in (request.guidance_scale if isinstance(request.guidance_scale, tuple) else (request.guidance_scale,)):
        warnings.warn("guidance_scale 0 draws the negative prompt alone; 1 turns guidance off", stacklevel=2)
    if request.clip_skip is not None:
        whole(1, model.text_layers).check("clip_skip", request.clip_skip)
    if request.zero_negative and not model.recognition.family.vector:
        raise UsageError(f"zero_negative: only SDXL was trained so, found {model.recognition.family.title}")
    if request.sigmas is not None:
        check_sigmas(request.sigmas)


def check_sigmas(given: object) -> None:
    try:
        sigmas = torch.as_tensor(given).double()
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"sigmas: expected numbers (N + 1,), found {repr(given)[:80]}") from None
    falling = sigmas.dim() == 1 and len(sigmas) > 1 and bool((sigmas.diff() < 0).all()) and bool(sigmas[-1] >= 0)
    if not falling or not sigmas[0] < 1e6:
        found = f"shape {tuple(sigmas.shape)}" if sigmas.dim() != 1 else str(sigmas.tolist())[:80]
        raise UsageError(f"sigmas: expected two or more numbers (N + 1,), falling, not below 0, found {found}")


def picture_size(request: Request, model: Capabilities, init: Image.Image | None) -> tuple[int, int]:
    """(width, height): as asked for, else those of the init image, else the model's own."""
    default = model.recognition.size
    if init is not None and None in (request.width, request.height):
        default = size_from(request, init, default)
    width, height = (
        side if side is not None else own for side, own in zip((request.width, request.height), default, strict=True)
    )
    for name, side in (("width", width), ("height", height)):
        checked(name, side)
        if side % 8:
            near = side // 8 * 8
            raise UsageError(f"{name}: expected a multiple of 8, found {side}; the nearest are {near} and {near + 8}")
    return width, height


def size_from(request: Request, init: Image.Image, own: tuple[int, int]) -> tuple[int, int]:
    """The init image's size in whole eights; in its proportions, if a model that draws at `own` size could not draw so large."""
    (width, height), most = init.size, LARGEST * own[0] * own[1]
    scale = min(1.0, math.sqrt(most / (width * height)), MAX_SIDE / max(width, height))
    fitting = max(8, int(width * scale) // 8 * 8), max(8, int(height * scale) // 8 * 8)
    if scale < 1:
        name = path_of(request.init_image)
        found = (
            f"init_image{f' {os.path.basename(name)}' if name else ''}: {width}x{height} is more than this model can draw well"
        )
        sizes = f"drawing {fitting[0]}x{fitting[1]} (it was trained at {own[0]}x{own[1]})"
        warnings.warn(f"{found}: {sizes}; give a size for another", stacklevel=2)
    return fitting


def settle_init(request: Request, model: Capabilities, init: Image.Image | None, width: int, height: int) -> InitImage | None:
    """The pictures that the request gives, which must be those that the model's task asks for."""
    check_task(request, model.recognition.task, init)
    if init is None:
        return None
    drawing = model.recognition.task == "draw" and request.mask is None
    strength = request.strength if request.strength is not None else STRENGTH if drawing else 1.0
    steps = request.steps if request.sigmas is None else len(torch.as_tensor(request.sigmas)) - 1
    if request.strength is None and int(steps * strength) < 1:  # nobody is told of a strength that nobody gave
        strength = 1.0
        warnings.warn("init_image: a single step leaves nothing of it; give more steps", stacklevel=2)
    if int(steps * strength) < 1:
        raise UsageError(f"strength: {strength} of {steps} steps is less than one; give more of either")
    sources = {"init_image": path_of(request.init_image), "init_sha256": fingerprint(init), "mask": None}
    mask = None
    if request.mask is not None:
        picture = open_picture("mask", request.mask)
        mask = to_mask(picture, width, height)
        sources |= {"mask": path_of(request.mask), "mask_sha256": fingerprint(picture)}
        if not mask.any():
            raise UsageError("mask: expected white where to paint, found none")
    return InitImage(to_pixels(init, width, height), mask, float(strength), sources)


def check_task(request: Request, task: str, init: Image.Image | None) -> None:
    if init is None:
        if task != "draw":
            needs = "a picture" if task == "edit" else "a picture and a mask"
            raise UsageError(f"init_image: this checkpoint is trained to {task}; it needs {needs}, found none")
        for name in ("mask", "strength"):
            if getattr(request, name) is not None:
                raise UsageError(f"{name}: expected an init_image to go with it, found none")
    elif task == "inpaint" and request.mask is None:
        raise UsageError("mask: this checkpoint is trained to inpaint; it needs a mask, found none")
    elif task == "edit" and request.mask is not None:
        raise UsageError("mask: this checkpoint edits the whole picture; expected no mask")
    elif task == "edit" and request.strength not in (None, 1):
        raise UsageError(f"strength: this checkpoint edits by image_guidance_scale; expected 1, found {request.strength}")


def path_of(picture: Picture | None) -> str | None:
    file = getattr(picture, "filename", None) if isinstance(picture, Image.Image) else picture  # of a picture that PIL opened
    return os.path.abspath(file) if isinstance(file, str | os.PathLike) and str(file) else None


TAG = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")  # addons/wanted.py has taken those out that mean something here


def check_text(name: str, text: object, reading: str) -> None:
    if not isinstance(text, str):
        wanted = "a text or a list of texts, or what encode_prompt gives"
        raise UsageError(f"{name}: expected {wanted}, found {type(text).__name__}")
    if len(text) > MAX_PROMPT:
        raise UsageError(
            f"{name}: expected at most {MAX_PROMPT:,} characters, found {len(text):,}; the text encoder reads about 300"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name}: expected text in UTF-8, found bytes that are not") from None
    if "\0" in text:
        raise UsageError(f"{name}: expected a text, found a NUL character in it")
    if found := TAG.search(text):
        warnings.warn(f"{name}: {found[0]!r} is read as plain words: only the prompt itself names LoRAs", stacklevel=2)
    check_grammar(name, text, reading)


def words_of(plan: Plan, i: int, added: Added) -> list[str]:
    """The added words in the texts of picture i, each once.  Raises UsageError for embedding:NAME that is none of them."""
    texts = [plan.prompts[i], plan.negatives[i], *(texts[i] for texts in plan.seconds.values())]
    found: list[str] = []
    for k, text in enumerate(texts):
        found += called(grammar.all_pieces(text or "", k == 0, plan.request.steps, plan.reading), added, plan.reading)
    return list(dict.fromkeys(found))


def check_grammar(name: str, text: str, reading: str) -> None:
    """Raises UsageError for weights that are none; warns of one that may not be meant."""
    try:
        grammar.checked(text, reading, joins=name == "prompt")
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    tail = grammar.lone_weight(text) if name == "prompt" and reading not in ("comfy", "plain") else None
    if tail is not None:
        warnings.warn(
            f"prompt: {tail!r} at its end is no word but a weight of guidance, as A1111 has it; "
            "plain_prompt (--plain-prompt) takes all for words",
            stacklevel=2,
        )


def check_seconds(request: Request, model: Capabilities, reading: str) -> None:
    """What a second text encoder is to read, where there is one."""
    for name in ("prompt_2", "negative_prompt_2"):
        value, first = getattr(request, name), getattr(request, name.removesuffix("_2"))
        if value is None:
            continue
        if len(model.recognition.family.towers) < 2:
            raise UsageError(f"{name}: only SDXL has a second text encoder, found {model.recognition.family.title}")
        if isinstance(first, Conditioning | Timeline):
            raise UsageError(f"{name}: expected none beside a conditioning, which holds what both text encoders read")
        for text in [value] if isinstance(value, str) else value:
            check_text(name, text, reading)

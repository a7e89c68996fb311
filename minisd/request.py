"""The arguments of one call, as the user gave them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from torch import Tensor

from .diffusion.denoiser import Conditioning, Guide, Observer, Timeline
from .diffusion.samplers import Sampler
from .errors import UsageError
from .options import OPTIONS, unknown
from .pictures.init import Picture

if TYPE_CHECKING:
    import torch

    from .addons.controls.control import Control
    from .codec import Codec
    from .diffusion.denoiser import Network
    from .fast.engine import Engine
    from .files.checkpoint import Checkpoint
    from .models.family import Family, Recognition, Training
    from .models.unet import UNet
    from .result import Step
    from .text.conditioner import Conditioner


LoraLike = Any  # a path, (path, strength), (path, strength, text strength) or an addons.wanted.Lora
Text = str | Conditioning | Timeline


class Stations(Protocol):
    """What a pipeline consists of, as those see it who are handed one: `pipeline.Pipeline` is one."""

    checkpoint: Checkpoint
    recognition: Recognition
    unet: UNet
    family: Family
    training: Training
    device: torch.device
    dtype: torch.dtype  # of the UNet and the text encoders
    conditioner: Conditioner  # texts -> conditioning
    network: Network  # noisy latents and conditioning -> its answer
    engine: Engine  # walks down noise levels
    codec: Codec  # pictures <-> latents
    batch_size: int  # pictures of a step on a CPU


@dataclass(frozen=True)
class Request:
    """What a user may ask for.

    prompt: a text, or a list of texts, each of which gives num_images pictures; or what `Pipeline.encode_prompt` makes of them.
    negative_prompt, guidance_scale, seed: one for all pictures, or a list with one for each prompt or picture.
    width, height: pixels, multiples of 8; by default those of the init image, scaled down where it has more than four times the
        pixels that the checkpoint was trained at; without one, those.
    steps: 1 … 999.  guidance_scale: 1 takes the prompt as trained and half the time, more follows it harder; by default what the
        checkpoint's metadata name, else 7.5.
    sampler: one of diffusion.samplers.SAMPLERS, or what A1111, ComfyUI, diffusers, OctoAI or stable-diffusion.cpp call it; or a
        function (denoise, x, sigmas, noise) that yields (latents, estimate).
    seed: picture i uses seed + i and equals the single run with that seed; None or -1 draws one.
    seeds: "rising" so, or "same": every prompt gets the same ones; or a list of them, as `seed` takes it.
    latents: starting noise (B, C, h, w) of unit variance instead of a seed.
    rng: what makes noise of a seed (diffusion.noise): "cpu", "nv" (A1111's GPU) or "comfy" (one draw for all, of one seed).
    subseed, subseed_strength: A1111's variation, 0 … 1: all pictures have the seed, and picture i goes towards subseed + i.
    ensd: added to the seed for all noise but the first (A1111's eta noise seed delta).
    sde_noise: of a sampler's steps, "independent" draws, or "brownian": increments of one path, whatever the number of steps.
    batch_place: rng "comfy": (i, B), where the picture is number i of B that were drawn together; recipes say so.
    sigmas: noise levels (N + 1,) of one's own, falling, instead of steps and spacing.
    guide: a function (answers, x, call) -> mixed, or a diffusion.denoiser.Guide, in the place of classifier-free guidance.
    high_noise_frac: 0 … 1, the part of the noise schedule that the base draws before a refiner takes over.
    init_image: a picture (PIL, array, tensor, or the path of one) to start from, to edit, or to paint into.
    strength: 0 … 1, how much of the way from noise is walked: 1 forgets the init image, a little keeps most of it.
    mask: a picture, white where to paint and black where to keep the init image.
    image_guidance_scale: how closely an editing model (InstructPix2Pix) keeps to the init image; 1 … 2 is usual.
    clip_skip: 1 takes the last layer of the text encoders, 2 the one before it, …; by default the family's.
    eta: 0 … 1, how much noise a sampler adds back at each step; by default its own.
    sampler_options: what else the sampler has, such as {"s_churn": 10}; `SAMPLERS[name].options` says what.
    spacing: the noise levels visited, one of diffusion.spacings.SPACINGS or what other programs call it; by default what the
        checkpoint or the sampler wants.
    like: another program, by whose rules levels, first noise and timesteps are made (diffusion.worlds), and what follows from it
        for the options that are not given.
    guidance_rescale: 0 … 1, against the glare of strong guidance; 0.7 is usual for models that predict v.
    original_size, crop, target_size: SDXL: (width, height), (left, top) and (width, height) that the UNet is told.
    zero_negative: SDXL: an empty negative prompt is zeros (True) or the encoding of no words (False).
    aesthetic_score, negative_aesthetic_score: what the SDXL refiner is told of the picture wanted, and of the one not wanted.
    refiner: another pipeline (SDXL's refiner) that goes on where this one has drawn high_noise_frac of the noise schedule.
    prompt_2, negative_prompt_2: SDXL: what its second text encoder reads; by default the same as the first.
    emphasis: how weights and brackets in prompts are read, one of options.EMPHASES: A1111's grammar and its ways to weigh
        ("original", "no-norm", "ignore", "none"), or "comfy" for ComfyUI's.
    plain_prompt: prompts are words, whatever they contain.
    loras: add-ons of the LoRA family for this call, in the place of those of `Pipeline.set_loras`: a list of paths or names in
        the library, (path, strength), (path, strength, text strength) or `addons.wanted.Lora`; <lora:name:0.8> in a prompt adds
        one.
    lora_blocks: what multiplies their strength in blocks of the UNet, see models.blocks.block_ratios.
    lora_rule: "paper", or "comfyui" where kinds of it (DoRA, OFT) are computed otherwise there (addons.lora_formulas.delta).
    lora_partial: take of a LoRA what fits the checkpoint, where else it is refused.
    controls: ControlNets and T2I-Adapters, each with the picture that it is to follow: a list of `minisd.Control`.
    style: the name of one of library.styles, whose words go around prompt and negative prompt.
    cfg_until: 0 … 1, the share of the steps, the first, that are guided; the others follow the prompt alone, in half the time.
    cache: 1 … 20: the deep part of the UNet is computed at every cache-th call, and reused between (fast.lossy.cached).
    rescue: computes those blocks of the UNet in float32 that overflow in its own dtype; each is told.
    progress: show a bar.  transform: what the latents become after each step, Step -> (B, C, h, w).
    observe: is shown every call of the network: (call, x, estimates of x_0 by role).
    """

    prompt: Text | Sequence[str]
    negative_prompt: Text | Sequence[str] = ""
    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance_scale: float | Sequence[float] | None = None
    sampler: str | Sampler | Callable[..., Any] = "euler"
    seed: int | Sequence[int] | None = None
    num_images: int = 1
    latents: Tensor | None = None
    seeds: Literal["rising", "same"] | Sequence[int] = "rising"
    sigmas: Tensor | Sequence[float] | None = None
    guide: Guide | Callable[..., Tensor] | None = None
    high_noise_frac: float = 0.8
    init_image: Picture | None = None
    strength: float | None = None
    mask: Picture | None = None
    image_guidance_scale: float = 1.5
    clip_skip: int | None = None
    eta: float | None = None
    sampler_options: Mapping[str, float] | None = None
    spacing: str | None = None
    like: Literal["comfyui", "a1111", "diffusers"] | None = None
    guidance_rescale: float = 0.0
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    zero_negative: bool | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    rng: str | None = None
    subseed: int | None = None
    subseed_strength: float = 0.0
    ensd: int = 0
    sde_noise: Literal["independent", "brownian"] | None = None
    batch_place: tuple[int, int] | None = None
    refiner: Stations | None = None
    progress: bool = False
    transform: Callable[[Step], Tensor] | None = None
    observe: Observer | None = None
    prompt_2: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    emphasis: str | None = None
    plain_prompt: bool | None = None
    loras: Sequence[LoraLike] | None = None
    lora_blocks: str | None = None
    lora_rule: Literal["paper", "comfyui"] | None = None
    lora_partial: bool = False
    controls: Sequence[Control] = ()
    style: str | None = None
    rescue: bool = False
    cfg_until: float = 1.0
    cache: int = 1


def request_of(given: tuple[Any, ...], options: Mapping[str, Any]) -> Request:
    """The request that a call's arguments are: those of Request, or one that is made already, and what is to be changed of it."""
    if names := [name for name in options if name not in OPTIONS and name != "prompt"]:
        raise unknown(names)
    if given and isinstance(given[0], Request):
        if len(given) > 1:
            raise UsageError("request: expected names for what is changed of it, such as steps=30")
        return replace(given[0], **options)
    try:
        return Request(*given, **options)
    except TypeError as error:
        raise UsageError(f"arguments: {str(error).replace('Request.__init__() ', '')}") from None


Given = ParamSpec("Given")
Answer = TypeVar("Answer", covariant=True)


class TakesOptions(Protocol[Given, Answer]):
    """A method with the arguments of Request, every one of them typed; or with a Request, and what is to be changed of it."""

    @overload
    def __call__(self, request: Request, /, **changes: Any) -> Answer: ...
    @overload
    def __call__(self, *given: Given.args, **options: Given.kwargs) -> Answer: ...


def taking_options(
    make: Callable[Given, Request],
) -> Callable[[Callable[[Any, Request], Answer]], TakesOptions[Given, Answer]]:
    """Gives a method of (self, request) the arguments that a Request is made of, checked at the call."""

    def decorate(method: Callable[[Any, Request], Answer]) -> TakesOptions[Given, Answer]:
        @wraps(method)
        def taking(self: Any, *given: Any, **options: Any) -> Answer:
            return method(self, request_of(given, options))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        taking.__signature__ = inspect.Signature([own, *inspect.signature(make).parameters.values()])  # type: ignore[attr-defined]
        return cast(TakesOptions[Given, Answer], taking)

    return decorate

"""What the UNet is told at every step, by the model's task: drawing, inpainting, or editing a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import Codec
from .diffusion.denoiser import ClassifierFree, Conditioning, Guide, TextAndImage, unguided
from .models.family import REFINER, Recognition
from .request import Canvas, Plan
from .text.conditioner import Conditioner, with_sizes, zeroed


@dataclass(frozen=True)
class Guided:
    """The conditions that the network is called with, and how its outputs for them become one."""

    conditions: Sequence[Conditioning]
    guide: Guide


def guided(plan: Plan, prompts: Sequence[str], recognition: Recognition, conditioner: Conditioner, codec: Codec) -> Guided:
    """What the plan tells the UNet of B pictures with these prompts."""
    request, count = plan.request, len(prompts)
    positive, negative = positive_and_negative(plan, prompts, conditioner)
    if recognition.task == "edit":
        assert plan.canvas is not None
        picture = (codec.encode(plan.canvas.pixels) / codec.scale).expand(count, -1, -1, -1)  # not scaled (edit_cli.py)
        nothing = replace(negative, extra=torch.zeros_like(picture))
        conditions = [nothing, replace(negative, extra=picture), replace(positive, extra=picture)]
        return Guided(conditions, TextAndImage(request.guidance_scale, request.image_guidance_scale))
    if recognition.task == "inpaint":
        assert plan.canvas is not None
        extra = hole(plan.canvas, codec).expand(count, -1, -1, -1)
        positive, negative = replace(positive, extra=extra), replace(negative, extra=extra)
    if request.guidance_scale == 1:
        return Guided([positive], unguided)
    return Guided([negative, positive], ClassifierFree(request.guidance_scale, request.guidance_rescale))


def positive_and_negative(plan: Plan, prompts: Sequence[str], conditioner: Conditioner) -> tuple[Conditioning, Conditioning]:
    """The conditionings of the positive and of the negative prompts, equally many chunks long."""
    request, family = plan.request, conditioner.family
    negatives = [request.negative_prompt] * len(prompts)
    positive, negative = halves(conditioner.encode([*prompts, *negatives], request.clip_skip))
    if not family.vector:
        return positive, negative
    if plan.zero_negative:
        negative = zeroed(negative)
    size = (plan.width, plan.height)
    (width, height), (left, top) = request.original_size or size, request.crop
    told = [height, width, top, left]
    if family is REFINER:
        good, bad = [*told, request.aesthetic_score], [*told, request.negative_aesthetic_score]
    else:
        good = bad = [*told, *reversed(request.target_size or size)]
    return with_sizes(positive, good), with_sizes(negative, bad)


def halves(both: Conditioning) -> tuple[Conditioning, Conditioning]:
    contexts = both.context.chunk(2)
    pooled = both.pooled.chunk(2) if both.pooled is not None else (None, None)
    return Conditioning(contexts[0], pooled[0]), Conditioning(contexts[1], pooled[1])


def hole(canvas: Canvas, codec: Codec) -> Tensor:
    """The mask and the latents of the picture without what is under it, (1, 1 + C, h, w), as inpainting models take them."""
    assert canvas.mask is not None
    seen = codec.encode(canvas.pixels * (canvas.mask < 0.5))  # mid-grey where to paint
    return torch.cat([shrunk(canvas.mask, seen), seen], dim=1)


def shrunk(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask (1, 1, H, W) at the size of latents, by nearest pixel, as inpainting models were trained (inpaint_st.py)."""
    return F.interpolate(mask, size=latents.shape[-2:]).to(latents)

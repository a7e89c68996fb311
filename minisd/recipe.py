"""What a picture's metadata say of the request that it came from, and that request again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .diffusion.denoiser import Conditioning, Timeline
from .errors import UsageError, shown
from .files.checkpoint import data_sha256, file_sha256
from .options import MAX_IMAGES, RECORDED, whole
from .pictures.init import fingerprint, open_picture
from .plan import Plan
from .request import Request


def recipe_of(plan: Plan, i: int) -> dict[str, Any]:
    """What was asked for and settled about picture i, ready for JSON."""
    request, origin, handed = plan.request, plan.origins[i], Conditioning | Timeline
    asked = {name: getattr(request, name) for name in RECORDED if name not in ("sigmas", "guide", "controls")}
    settled = {
        "prompt": None if isinstance(request.prompt, handed) else plan.prompts[i],
        "negative_prompt": None if isinstance(request.negative_prompt, handed) else plan.negatives[i],
        **{name: texts[i] for name, texts in plan.seconds.items()},
        "guidance_scale": plan.scales[i],
        "seed": plan.seeds[i],
        "subseed": origin.subseed,
        "batch_place": [origin.index, origin.batch] if origin.batch > 1 else None,
        "width": plan.width,
        "height": plan.height,
        "spacing": plan.spacing,
        "own_spacing": plan.sampler.wish.spacing,
        "eta": plan.options.get("eta", plan.sampler.options.get("eta", 0.0)),
        "sampler": request.sampler if isinstance(request.sampler, str) else plan.sampler.label,
        "sampler_label": plan.sampler.label,
        "init_image": None,
        "mask": None,
    }
    given: dict[str, Any] = {"strength": plan.init.strength, **plan.init.sources} if plan.init else {}
    if request.sigmas is not None:
        given["sigmas"] = torch.as_tensor(request.sigmas).tolist()
        given["steps"] = len(given["sigmas"]) - 1
    own = [name for name in ("sampler", "guide", "transform") if not isinstance(getattr(request, name), str | None)]
    if request.controls:
        given["controls"] = [control.facts() for control in request.controls]
    if own:
        given["own"] = own
    if request.guide is not None:
        given["guide"] = getattr(request.guide, "__name__", type(request.guide).__name__)
    recipe = asked | settled | given
    return {name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()}


def is_same(recipe: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether a file is the model that a recipe names, or has its numbers, as a merge that was made again."""
    if recipe.get("model_sha256") in (None, file_sha256(checkpoint)):
        return True
    tensors = recipe.get("model_tensors_sha256")
    return isinstance(tensors, str) and data_sha256(checkpoint) == tensors.removeprefix("0x")


def repeat(recipe: Mapping[str, Any], checkpoint: Path, elsewhere: Mapping[str, str | None] | None = None) -> Request:
    """The request that a picture's recipe describes.  Warns if a file is no longer the one it was; raises UsageError.

    elsewhere: paths that take the place of those that it names, of init_image and mask.
    """
    recipe = dict(recipe) | {name: path for name, path in (elsewhere or {}).items() if path is not None}
    if recipe.get("seed") in (None, -1):
        raise UsageError(
            "the picture was drawn from noise that its caller gave, which it does not carry; it cannot be made again"
        )
    for name in ("prompt", "negative_prompt"):
        if name in recipe and recipe[name] is None:
            raise UsageError(
                f"{name}: the picture's caller gave a conditioning, which it does not carry; it cannot be made again"
            )
    if recipe.get("own"):
        raise UsageError(f"the picture was drawn with its caller's own {', '.join(recipe['own'])}; it cannot be made again")
    if recipe.get("changed"):
        what = shown(recipe["changed"], 100)
        warnings.warn(f"the picture's model was changed in memory ({what}); this one is as the file has it", stacklevel=2)
    if not is_same(recipe, checkpoint):
        warnings.warn(f"{checkpoint} is not the checkpoint that drew this picture ({recipe.get('model')})", stacklevel=2)
    check_sources(recipe)
    if "prompt" not in recipe:
        raise UsageError("the picture's minisd chunk says nothing of its prompt")
    recipe = {"plain_prompt": "emphasis" not in recipe} | recipe  # from before prompts had a grammar
    count = whole(1, MAX_IMAGES).check("grid", recipe.get("grid", 1))  # pictures; a grid carries the recipe of its first
    return Request(**{name: recipe[name] for name in ("prompt", *RECORDED) if name in recipe}, num_images=count)


def check_sources(recipe: Mapping[str, Any]) -> None:
    """Warns where an init image, a mask or a control's picture is no longer the one that it was."""
    for control in recipe.get("controls", ()):
        known, file = (control.get(name) for name in ("image_sha256", "image"))
        if known and file and fingerprint(open_picture("controls: image", file)) != known:
            warnings.warn(f"controls: image {file} is not the picture that this one was made from", stacklevel=2)
    for name, known in (("init_image", recipe.get("init_sha256")), ("mask", recipe.get("mask_sha256"))):
        if known is None:
            continue
        if not recipe.get(name):
            raise UsageError(f"{name}: the picture was made from one that had no file; it cannot be made again")
        if fingerprint(open_picture(name, recipe[name])) != known:
            warnings.warn(f"{name} {recipe[name]} is not the picture that this one was made from", stacklevel=2)

"""What a picture's metadata say of the request that it came from, and that request again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from .addons.wanted import Lora, as_lora
from .diffusion.denoiser import Conditioning, Timeline
from .errors import UsageError, shown
from .fast.lossy.float8 import is_float8
from .files.checkpoint import Checkpoint, data_sha256, file_sha256
from .library.names import resolve
from .library.places import tiny_checkpoint
from .options import MAX_IMAGES, RECORDED, whole
from .pictures.init import fingerprint, open_picture
from .plan import Plan, words_of
from .request import Request
from .system.device import name_of

if TYPE_CHECKING:
    from .pipeline import Pipeline


def recipe_of(plan: Plan, i: int, pipe: Pipeline, way: str) -> dict[str, Any]:
    """What `minisd again` and other programs need to know about picture i, ready for JSON."""
    files: dict[str, Any] = dict(file_facts("model", pipe.checkpoint))
    if pipe.vae_files:
        files |= file_facts("vae", pipe.vae_files[0])
        if len(pipe.vae_files) > 1:
            files |= {"vae_paths": [str(file.path) for file in pipe.vae_files]}
    if plan.request.refiner is not None:
        files |= file_facts("refiner", plan.request.refiner.checkpoint)
    if pipe.stack.active:
        files |= {"loras": pipe.stack.facts(), "lora_rule": pipe.stack.rule}
    if pipe.conditioner.added and (names := words_of(plan, i, pipe.conditioner.added[0])):
        files |= {"embeddings": [pipe.embeddings[name].facts() for name in names]}
    how: dict[str, Any] = {"ema": pipe.checkpoint.ema, "way": way, "task": pipe.recognition.task}
    if is_float8(pipe.unet):
        how["fp8"] = True
    if changed := pipe.as_loaded.changed():
        how["changed"] = changed
    if pipe.training.prediction in ("epsilon", "v"):
        how |= {"prediction": pipe.training.prediction, "zero_snr": pipe.training.zero_terminal}
    here = {"device": pipe.device.type, "dtype": name_of(pipe.dtype), "torch": torch.__version__, "version": __version__}
    return settled(plan, i) | files | how | here


def file_facts(name: str, checkpoint: Checkpoint) -> dict[str, str | None]:
    path = None if checkpoint.path == tiny_checkpoint() else str(checkpoint.path)
    tensors = checkpoint.metadata.get("modelspec.hash_sha256")  # stays the same when a merge is made again, on another day
    hashes = {f"{name}_sha256": checkpoint.sha256(), f"{name}_tensors_sha256": tensors}
    return {name: checkpoint.path.stem, f"{name}_path": path} | hashes


def settled(plan: Plan, i: int) -> dict[str, Any]:
    """What was asked for and settled about picture i."""
    request, origin, handed = plan.request, plan.origins[i], Conditioning | Timeline
    asked = {name: getattr(request, name) for name in RECORDED if name not in ("sigmas", "guide", "loras", "controls")}
    found = {
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
    recipe = asked | found | given
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
    if recipe.get("loras"):
        recipe["loras"] = [found_again(each) for each in recipe["loras"]]
    if "prompt" not in recipe:
        raise UsageError("the picture's minisd chunk says nothing of its prompt")
    recipe = {"plain_prompt": "emphasis" not in recipe} | recipe  # from before prompts had a grammar
    count = whole(1, MAX_IMAGES).check("grid", recipe.get("grid", 1))  # pictures; a grid carries the recipe of its first
    return Request(**{name: recipe[name] for name in ("prompt", *RECORDED) if name in recipe}, num_images=count)


def found_again(said: Any) -> Lora:
    """A LoRA of a recipe, by its path, else by its name; warns where it is another.  Raises UsageError, CheckpointError."""
    lora = as_lora(said)
    name = Path(lora.source).stem
    lora = replace(lora, source=lora.source if os.path.exists(lora.source) else resolve(name, "lora"))
    if said.get("sha256") not in (None, file_sha256(Path(lora.source))):
        warnings.warn(f"{lora.source} is not the LoRA that this picture was made with ({name})", stacklevel=2)
    return lora


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

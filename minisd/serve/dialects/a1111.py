"""AUTOMATIC1111's API: /sdapi/v1/txt2img and img2img.  Fields of it that minisd has not are refused where they ask for something,
and named in the answer where they do not.

Source: AUTOMATIC1111 webui, modules/api (models.py, api.py) and modules/processing.py; sd-webui-controlnet, its arguments; the
package webuiapi 0.9.17 (what is sent, and read).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ... import __version__
from ...addons.controls.preprocess import PREPROCESS, preprocessed
from ...diffusion.samplers import SAMPLERS, named
from ...errors import UsageError
from ...library.styles import named as style_named
from ...library.styles import styled
from ...pictures.infotext import rng_named
from ...pictures.metadata import parameters_text
from ..errors import RefusedError, clean, told
from ..jobs import Done
from ..pictures import blurred, filled, from_base64, grey, pasted_softly, region_of, to_base64
from ..service import Service, aside
from ..shelf import Drawing, public

router = APIRouter(prefix="/sdapi/v1")
NAMES = {"guidance_scale": "cfg_scale", "model": "sd_model_checkpoint", "spacing": "scheduler", "init_image": "init_images"}


def is_plain(value: Any, depth: int = 0) -> Any:
    """What JSON can say again: no NaN, nothing that UTF-8 has not, not too deep.  Raises ValueError."""
    if depth > 20 or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("expected plain numbers, texts and lists")
    if isinstance(value, str):
        value.encode()
    for each in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        is_plain(each, depth + 1)
    return value


Plain = Annotated[Any, AfterValidator(is_plain)]
PlainDict = Annotated[dict[str, Any], AfterValidator(is_plain)]
Text = Annotated[str, Field(max_length=10_000)]
Seed = Annotated[int, Field(ge=-1, lt=2**63 - 2000)]


class Common(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Plain]

    prompt: Text | None = ""
    negative_prompt: Text | None = ""
    styles: list[str] | None = None
    seed: Seed | None = -1
    subseed: Seed | None = -1
    subseed_strength: Annotated[float, Field(ge=0, le=1)] | None = 0
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = 1
    n_iter: Annotated[int, Field(ge=1)] | None = 1
    steps: Annotated[int, Field(ge=1)] | None = 50
    cfg_scale: float | None = 7.0
    width: int | None = None
    height: int | None = None
    denoising_strength: float | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: Annotated[float, Field(ge=0, le=1)] | None = None
    override_settings: PlainDict | None = None
    send_images: bool | None = True
    alwayson_scripts: PlainDict | None = None


class Text2Image(Common):
    pass


class Image2Image(Common):
    init_images: list[str]
    resize_mode: int | None = 0
    mask: str | None = None
    mask_blur: Annotated[int, Field(ge=0, le=512)] | None = None
    mask_blur_x: Annotated[int, Field(ge=0, le=512)] | None = 4
    mask_blur_y: Annotated[int, Field(ge=0, le=512)] | None = 4
    inpainting_fill: int | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=4096)] | None = 0
    inpainting_mask_invert: int | None = 0
    image_cfg_scale: float | None = None
    include_init_images: bool | None = False


# What asks for nothing, of fields that minisd has not: any other value is refused.
IDLE: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,), "tiling": (False,), "restore_faces": (False,), "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1), "script_name": ("", "None"), "s_min_uncond": (0,), "firstpass_image": (),
    "initial_noise_multiplier": (1,), "latent_mask": (), "firstphase_width": (0,), "firstphase_height": (0,), "infotext": ("",),
    "controlnet_units": ([],), "save_images": (False,),
}  # fmt: skip
# What may have any value where hires fix is off, or says nothing of the picture.
ASIDE = {
    "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name", "hr_sampler_name",
    "hr_scheduler", "hr_prompt", "hr_negative_prompt", "do_not_save_samples", "do_not_save_grid", "script_args", "mask_round",
    "override_settings_restore_afterwards", "force_task_id", "disable_extra_networks", "comments",
}  # fmt: skip
SETTINGS = ("sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers", "eta_noise_seed_delta", "randn_source")
MODULES = {"none": "none", "canny": "canny", "invert": "invert", "blur_gaussian": "blur", "tile_resample": "tile"}
MODES = {0: False, "Balanced": False, 2: True, "ControlNet is more important": True}  # whether that is guess mode
NO_VAE = ("", "automatic", "none")


@router.post("/txt2img")
async def txt2img(body: Text2Image, asked: Request) -> JSONResponse:
    return await generated(body, asked)


@router.post("/img2img")
async def img2img(body: Image2Image, asked: Request) -> JSONResponse:
    return await generated(body, asked)


async def generated(body: Common, asked: Request) -> JSONResponse:
    service: Service = asked.app.state.service
    ignored = unused(body)
    drawing = service.checked(await aside(True, drawing_of, body, service, ignored))
    echo = {name: value for name, value in body.model_dump().items() if name not in ("init_images", "mask", "alwayson_scripts")}
    try:
        done = await service.drawn(drawing, asked, "a1111")
    except RefusedError as refused:
        if refused.code != "interrupted":
            raise
        return JSONResponse({"images": [], "parameters": echo, "info": json.dumps({"interrupted": True})})
    return JSONResponse(await aside(done.large, answer, body, drawing, done, echo, ignored))


def unused(body: Common) -> list[str]:
    """The names of fields that minisd has not.  Raises RefusedError where one asks for something."""
    found = []
    for name, value in (body.__pydantic_extra__ or {}).items():
        if name in IDLE and value is not None and value not in IDLE[name]:
            raise RefusedError(422, f"{name}: minisd has no such thing; leave it out", name, "not_supported")
        found.append(clean(name))
    for name, script in (body.alwayson_scripts or {}).items():
        args = script.get("args") if isinstance(script, dict) else script
        if name.casefold() != "controlnet" and args:
            raise RefusedError(422, "alwayson_scripts: expected controlnet alone", "alwayson_scripts", "not_supported")
    return found


def drawing_of(body: Common, service: Service, ignored: list[str]) -> Drawing:
    settings = service.options | (body.override_settings or {})
    ignored += [f"override_settings.{clean(name)}" for name in body.override_settings or {} if name not in SETTINGS]
    model = service.model_of(text_of(settings, "sd_model_checkpoint"))
    vae = text_of(settings, "sd_vae") or ""
    positive, negative = prompts_of(body)
    sampler = sampler_of(body)
    options: dict[str, Any] = {
        "prompt": positive, "negative_prompt": negative, "width": body.width, "height": body.height, "steps": body.steps or 50,
        "guidance_scale": 7.0 if body.cfg_scale is None else body.cfg_scale, "sampler": sampler, "seed": body.seed,
        "num_images": (body.batch_size or 1) * (body.n_iter or 1), "clip_skip": settings.get("CLIP_stop_at_last_layers"),
        "subseed_strength": body.subseed_strength or 0.0, "ensd": settings.get("eta_noise_seed_delta") or 0,
        "spacing": None if (body.scheduler or "automatic").casefold() == "automatic" else body.scheduler,
    }  # fmt: skip
    if body.subseed_strength:
        options["subseed"] = body.subseed
    if settings.get("randn_source"):
        options["rng"] = rng_of(settings)
    options |= sampler_options(body, sampler, ignored)
    refiner = None
    if body.refiner_checkpoint and body.refiner_checkpoint.casefold() not in NO_VAE:
        refiner = service.index.find(body.refiner_checkpoint, "checkpoint", "refiner_checkpoint")
        options["high_noise_frac"] = 0.8 if body.refiner_switch_at is None else body.refiner_switch_at
    most = service.settings.limits.sent_pixels
    finish = add_picture(options, body, most) if isinstance(body, Image2Image) else None
    return Drawing(
        model, options, vae=None if vae.casefold() in NO_VAE else service.index.find(vae, "vae", "sd_vae"), refiner=refiner,
        controls=controls_of(body, service, (body.width, body.height)), finish=finish,
    )  # fmt: skip


def text_of(settings: Mapping[str, Any], name: str) -> str | None:
    value = settings.get(name)
    if value is not None and not isinstance(value, str):
        raise RefusedError(422, f"{name}: expected a text", name)
    return value


def rng_of(settings: Mapping[str, Any]) -> str:
    try:
        return rng_named(str(settings["randn_source"]))
    except UsageError as error:
        raise told(error, "") from None


def prompts_of(body: Common) -> tuple[str, str]:
    prompt, negative = body.prompt or "", body.negative_prompt or ""
    for name in body.styles or ():
        try:
            prompt, negative = styled(style_named(name), prompt, negative)
        except UsageError as error:
            raise RefusedError(422, f"styles: {str(error).removeprefix('style: ')}", "styles") from None
    return prompt, negative


def sampler_of(body: Common) -> str:
    """sampler_index is the old name, and sampler_name wins.  Raises RefusedError."""
    name = body.sampler_name or body.sampler_index or "Euler"
    try:
        named(name)
    except UsageError:
        raise RefusedError(404, "Sampler not found", "sampler_name", "not_found") from None
    return name


def sampler_options(body: Common, name: str, ignored: list[str]) -> dict[str, Any]:
    """Clients send all of these always: a sampler takes those that it has; others, at their idle values, ask for nothing."""
    takes, found = SAMPLERS[named(name)[0]].options, {}
    idle = {"eta": (0, 1), "s_churn": (0,), "s_tmin": (0,), "s_tmax": (0,), "s_noise": (1,)}
    for option, values in idle.items():
        value = getattr(body, option)
        if value is None:
            continue
        if option in takes and (option == "eta" or value not in values):
            found[option] = value
        elif option not in takes and value not in values:
            ignored.append(option)
    eta = {"eta": found.pop("eta")} if "eta" in found else {}
    return eta | ({"sampler_options": found} if found else {})


def add_picture(options: dict[str, Any], body: Image2Image, most: int) -> Any:
    """Puts picture and mask into the options; gives what becomes of the pictures that are drawn so, if anything."""
    if len(body.init_images) != 1:
        raise RefusedError(422, f"init_images: expected one picture, found {len(body.init_images)}", "init_images")
    image = from_base64(body.init_images[0], "init_images", most)
    size = (body.width or max(8, image.width // 8 * 8), body.height or max(8, image.height // 8 * 8))
    if body.resize_mode not in (None, 0, 1):
        raise RefusedError(422, "resize_mode: expected 0 (just resize) or 1 (crop and resize)", "resize_mode", "not_supported")
    options |= {"strength": 0.75 if body.denoising_strength is None else body.denoising_strength}
    if body.image_cfg_scale is not None:
        options["image_guidance_scale"] = body.image_cfg_scale
    if body.mask is None:
        options["init_image"] = cropped(image, size) if body.resize_mode == 1 else image
        return None
    return add_mask(options, body, image, size, most)


def cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if min(size) < 8 or max(size) > 8192:
        return image  # which is told where the size is checked
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def add_mask(options: dict[str, Any], body: Image2Image, image: Image.Image, size: tuple[int, int], most: int) -> Any:
    assert body.mask is not None
    if body.inpainting_fill not in (None, 0, 1):
        raise RefusedError(422, "inpainting_fill: expected 0 (fill) or 1 (original)", "inpainting_fill", "not_supported")
    if not (min(size) >= 8 and max(size) <= 8192):
        raise RefusedError(422, "width: expected 8 to 8192 pixels", "width")
    mask = grey(from_base64(body.mask, "mask", most), image.size)
    mask = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    blurs = (body.mask_blur_x or 0, body.mask_blur_y or 0) if body.mask_blur is None else (body.mask_blur, body.mask_blur)
    mask = blurred(mask, *blurs)
    region = region_of(image, mask, body.inpaint_full_res_padding or 0, size) if body.inpaint_full_res else None
    if region is not None:
        image, part = region.crop(*size)
    else:
        if body.resize_mode == 1:
            image, mask = cropped(image, size), cropped(mask, size)
        image, part = image.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.LANCZOS)
    start = filled(image, part) if not body.inpainting_fill else image
    paint = part.point(lambda value: 255 if value > 8 else 0)  # all that the soft edge lets through
    options |= {"init_image": start, "mask": paint, "width": size[0], "height": size[1]}
    return region.put_back if region is not None else pasted_softly(image, part)


def controls_of(body: Common, service: Service, size: tuple[int | None, int | None]) -> tuple[Any, ...]:
    scripts = {name.casefold(): script for name, script in (body.alwayson_scripts or {}).items()}
    script = scripts.get("controlnet") or {}
    units = script.get("args") if isinstance(script, dict) else None
    if not isinstance(units, list | None) or len(units or ()) > 8:
        raise RefusedError(422, "alwayson_scripts: controlnet: expected args, a list of up to 8 units", "alwayson_scripts")
    on = [unit for unit in units or () if not isinstance(unit, dict) or unit.get("enabled", True)]
    return tuple(control_of(unit, body, service, size) for unit in on)


def control_of(unit: Any, body: Common, service: Service, size: tuple[int | None, int | None]) -> tuple[Any, Mapping[str, Any]]:
    def refuse(what: str) -> RefusedError:
        return RefusedError(422, f"alwayson_scripts: controlnet: {what}", "alwayson_scripts")

    if not isinstance(unit, dict) or not isinstance(unit.get("model"), str):
        raise refuse("expected units with the name of a model")
    if unit.get("control_mode") not in (None, *MODES):
        raise refuse(f"control_mode: expected some of {', '.join(map(str, MODES))}")
    if unit.get("mask") or unit.get("mask_image"):
        raise refuse("mask: minisd has none for controls")
    numbers = {name: unit.get(name, value) for name, value in {"weight": 1.0, "guidance_start": 0.0, "guidance_end": 1.0}.items()}
    if wrong := [name for name, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise refuse(f"{wrong[0]}: expected a number")
    sent = unit.get("image") or unit.get("input_image")
    sent = sent.get("image") if isinstance(sent, dict) else sent
    if not isinstance(sent, str):
        raise refuse("image: expected a picture")
    image = from_base64(sent, "alwayson_scripts", service.settings.limits.sent_pixels)
    fields = {
        "image": placed(image, size, unit.get("resize_mode")), "strength": numbers["weight"],
        "start": numbers["guidance_start"], "end": numbers["guidance_end"], "guess": MODES[unit.get("control_mode") or 0],
        "preprocess": module_of(str(unit.get("module") or "none")),
    }  # fmt: skip
    return service.index.find(unit["model"], "controlnet", "alwayson_scripts"), fields


def module_of(name: str) -> str:
    """What makes the hint: A1111's extension has names of its own.  Raises RefusedError."""
    low = name.casefold().split(" ")[0]
    found = MODULES.get(low, low)
    if found not in PREPROCESS:
        try:
            preprocessed(Image.new("RGB", (8, 8)), next((part for part in (low, low.split("_")[0])), low))
        except UsageError as error:
            raise told(error, "") from None
    return found


def placed(image: Image.Image, size: tuple[int | None, int | None], mode: Any) -> Image.Image:
    """A hint in the proportions of a drawing: 0 stretches it, 1 cuts off, 2 adds black."""
    width, height = size
    if width is None or height is None or not (min(width, height) >= 8 and max(width, height) <= 8192):
        return image
    if image.width * height == image.height * width:
        return image
    if mode in (1, "Crop and Resize", "Scale to Fit (Inner Fit)", "Inner Fit (Scale to Fit)"):
        return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    if mode in (2, "Resize and Fill", "Envelope (Outer Fit)", "Outer Fit (Shrink to Fit)"):
        return ImageOps.pad(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return image


def answer(body: Common, drawing: Drawing, done: Done, echo: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    result = done.result
    recipes = [public(recipe, drawing) for recipe in result.metadata]
    images = []
    if body.send_images is not False:
        pairs = zip(done.pictures, recipes, strict=True)
        images = [to_base64(picture, "png", recipe) for picture, recipe in pairs]
        if isinstance(body, Image2Image) and body.include_init_images:
            images += body.init_images
    info = info_of(drawing, done, recipes)
    info |= {"ignored": list(ignored), "warnings": done.warnings}
    return {"images": images, "parameters": dict(echo), "info": json.dumps(info), "ignored": list(ignored)}


def info_of(drawing: Drawing, done: Done, recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What A1111 says of the pictures (processing.py, Processed.js), as far as minisd knows it."""
    first, count = recipes[0], len(recipes)
    subseeds = [recipe.get("subseed") or -1 for recipe in recipes]
    return {
        "prompt": first["prompt"], "all_prompts": [recipe["prompt"] for recipe in recipes],
        "negative_prompt": first["negative_prompt"], "all_negative_prompts": [recipe["negative_prompt"] for recipe in recipes],
        "seed": first["seed"], "all_seeds": [recipe["seed"] for recipe in recipes],
        "subseed": subseeds[0], "all_subseeds": subseeds, "subseed_strength": first.get("subseed_strength", 0.0),
        "width": done.pictures[0].width, "height": done.pictures[0].height, "sampler_name": first["sampler_label"],
        "cfg_scale": first["guidance_scale"], "steps": first["steps"], "batch_size": count, "restore_faces": False,
        "face_restoration_model": None, "sd_model_name": drawing.model.name,
        "sd_model_hash": (first.get("model_sha256") or "")[:10], "sd_vae_name": first.get("vae"),
        "sd_vae_hash": (first.get("vae_sha256") or "")[:10] or None, "seed_resize_from_w": -1, "seed_resize_from_h": -1,
        "denoising_strength": first.get("strength"), "extra_generation_params": {}, "index_of_first_image": 0,
        "infotexts": [parameters_text(recipe) for recipe in recipes], "styles": [], "job_timestamp": "",
        "clip_skip": first.get("clip_skip") or 1, "is_using_inpainting_conditioning": first.get("task") == "inpaint",
        "version": f"minisd {__version__}",
    }  # fmt: skip

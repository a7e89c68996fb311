"""What a picture carries about how it was made: the text that other programs read, and what `minisd again` needs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from ..errors import UsageError
from ..options import OPTIONS, RECIPE, Option
from ..system.regular import open_regular
from .foreign import why_no_recipe

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_FILE = 128 << 20  # bytes of a picture that is not ours; a photograph of 50 million pixels takes about 100 million as a PNG
MAX_HEAD = 8 << 20  # bytes of a PNG before its pixels; a recipe has a few thousand, a colour profile up to half a million
MAX_CHUNKS = 10_000

# What its samplers take beside eta (A1111 processing.py, generation_params of sd_samplers_common.py).
SAMPLER_OPTIONS = {"s_churn": "Sigma churn", "s_tmin": "Sigma tmin", "s_tmax": "Sigma tmax", "s_noise": "Sigma noise"}
# A1111's names of its ways to weigh words (sd_emphasis.py); it does not say the first, and ComfyUI's is none of them.
EMPHASES = {"no-norm": "No norm", "ignore": "Ignore", "none": "None"}
HEAD = ("Steps", "Sampler", "CFG scale", "Seed")  # comes first, and is said always


def check_kinds(path: object, recipe: Mapping[str, Any]) -> None:
    """Raises UsageError if something in a recipe, which may come from a stranger, is of another kind than minisd writes."""
    for name, kind in RECIPE.items():
        if recipe.get(name) is not None:
            kind.check(f"{path}: its minisd chunk: {name}", recipe[name])


def quote(value: object) -> str:
    """A value of the parameters text; quoted if a comma, colon or line break would end it (A1111 infotext_utils.py, quote)."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def parameters_text(recipe: Mapping[str, Any]) -> str:
    """The `parameters` text that A1111 writes and that other programs read (A1111 processing.py, create_infotext)."""
    said = {word_for(option, recipe): said_of(option, recipe) for option in OPTIONS.values() if option.infotext}
    loras, embeddings = recipe.get("loras") or [], recipe.get("embeddings") or []
    fields = {
        **{name: said.pop(name) for name in HEAD},
        "Size": f"{recipe['width']}x{recipe['height']}",
        "Model hash": recipe["model_sha256"][:10] if recipe["model_sha256"] else None,
        "Model": recipe["model"].replace(",", "").replace(":", ""),
        "VAE hash": recipe["vae_sha256"][:10] if recipe.get("vae_sha256") else None,
        "VAE": recipe.get("vae"),
        **said,
        **{SAMPLER_OPTIONS.get(name, name): value for name, value in (recipe.get("sampler_options") or {}).items()},
        "RNG": "NV" if recipe.get("rng") == "nv" else "CPU",
        "Refiner": recipe.get("refiner"),
        "Refiner switch at": recipe["high_noise_frac"] if recipe.get("refiner") else None,
        "Lora hashes": ", ".join(f"{name_of(each)}: {each['autov3']}" for each in loras if each.get("autov3")) or None,
        "TI hashes": ", ".join(f"{each['name']}: {each['sha256'][:12]}" for each in embeddings if each["sha256"]) or None,
        **control_lines(recipe.get("controls") or []),
        **compared_text(recipe),
        "Version": f"minisd {recipe['version']}",
    }
    last = ", ".join(f"{name}: {quote(value)}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    return f"{' '.join([recipe['prompt'], *map(tag_of, loras)])}{negative}\n{last}"


def name_of(lora: Mapping[str, Any]) -> str:
    return os.path.splitext(os.path.basename(lora["source"]))[0]


def tag_of(lora: Mapping[str, Any]) -> str:
    """As A1111 writes it in a prompt: the strength for the text encoder first."""
    unet, text = lora["strength"], lora["text_strength"]
    return f"<lora:{name_of(lora)}:{unet:g}>" if text in (None, unet) else f"<lora:{name_of(lora)}:{text:g}:{unet:g}>"


# What the extension calls what makes the hint, and its thresholds (sd-webui-controlnet, scripts/preprocessor/).
MODULES: dict[str, tuple[str, float | None, float | None]] = {
    "none": ("none", None, None),
    "tile": ("tile_resample", 1.0, None),
    "canny": ("canny", 100.0, 200.0),
    "invert": ("invert (from white bg & black line)", None, None),
    "blur": ("blur_gaussian", 8.0, None),
}


def control_lines(controls: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """ControlNets that had a file, as A1111's extension writes them (sd-webui-controlnet, internal_controlnet/args.py).

    What it has no words for (one side of guidance, noise levels) is left out.
    """
    found = {}
    for i, each in enumerate(controls):
        if not each.get("source"):
            continue
        module, low, high = MODULES[each["preprocess"]]
        name = name_of(each).replace(",", "").replace(":", "")
        modes = {
            True: "ControlNet is more important",
            False: None if each.get("where") in ("positive", "negative") else "Balanced",
        }
        by_steps = each.get("range") != "noise"
        fields = {
            "Module": module,
            "Model": f"{name} [{each['hash']}]" if each.get("hash") else name,
            "Weight": float(each["strength"]),
            "Resize Mode": "Just Resize",
            "Threshold A": low,
            "Threshold B": high,
            "Guidance Start": float(each["start"]) if by_steps else None,
            "Guidance End": float(each["end"]) if by_steps else None,
            "Pixel Perfect": True,
            "Control Mode": modes[bool(each.get("guess"))],
        }
        found[f"ControlNet {i}"] = ", ".join(f"{field}: {value}" for field, value in fields.items() if value is not None)
    return found


def word_for(option: Option, recipe: Mapping[str, Any]) -> str:
    """A1111 has two fields for eta."""
    return "Eta DDIM" if option.name == "eta" and recipe["sampler_label"] == "DDIM" else str(option.infotext)


def said_of(option: Option, recipe: Mapping[str, Any]) -> object:
    """An option's value as A1111 writes it; None where it says nothing of it."""
    value = recipe["sampler_label"] if option.name == "sampler" else recipe.get(option.name)
    if option.name == "spacing":
        value = schedule_type(recipe)
    if option.name == "emphasis":
        value = EMPHASES.get(str(value))
    if option.name == "image_guidance_scale" and recipe.get("task") != "edit":
        value = None
    always = option.infotext in HEAD or option.name == "subseed"
    return None if not always and value in (None, 0) else value


def schedule_type(recipe: Mapping[str, Any]) -> str | None:
    """A1111's label of the spacing, or ours where it has none; nothing where it is what its sampler takes by itself."""
    from ..diffusion.spacings import SPACINGS

    spacing = recipe.get("spacing")
    label = SPACINGS[spacing].label if spacing in SPACINGS else None
    same = spacing == recipe.get("own_spacing", spacing)
    if recipe.get("sigmas") or (same and spacing in ("linspace", "leading", "lcm")):
        return None
    return label or str(spacing).capitalize()


def unreadable(text: str) -> str | None:
    """What keeps other programs from reading a prompt back out of the parameters text as it was (A1111 infotext_utils.py,
    parse_generation_parameters, and readers that look for "Steps:"); None where nothing does."""
    lines = text.split("\n")
    if "\r" in text or any(len(line.splitlines()) > 1 for line in lines):
        return "a line end other than a line feed"
    if any(line != line.strip() for line in lines) or text != text.strip():
        return "spaces or empty lines around it or its lines"
    marks = [mark for mark in ("Negative prompt:", "Steps:") if any(line.startswith(mark) for line in lines)]
    return f"a line that begins with {marks[0]!r}" if marks else None


def tell_unreadable(recipe: Mapping[str, Any]) -> None:
    """Warns where the parameters text does not hold the prompts."""
    for name in ("prompt", "negative_prompt"):
        if (why := unreadable(recipe.get(name) or "")) is not None:
            found = f"{name}: has {why}, which other programs cannot read back from the picture's parameters text"
            warnings.warn(f"{found}; minisd again has it as it is", stacklevel=3)


def compared_text(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What changes from cell to cell of a comparison, as A1111 writes it of a grid (A1111 scripts/xyz_grid.py)."""
    if "compare" not in recipe:
        return {}
    fields = {"Script": "X/Y/Z plot"}
    for name in ("x", "y"):
        axis = recipe["compare"][name]
        fields |= {f"{name.upper()} Type": axis["type"], f"{name.upper()} Values": ", ".join(map(str, axis["values"]))}
    return fields


def check_head(file: BinaryIO) -> None:
    """Raises ValueError where a PNG has much before its pixels, all of which Pillow would bring into memory to open it; or where
    a file of another kind, which it may bring in as a whole, is larger than pictures are."""
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        for _ in range(MAX_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
                break
            if file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR) > MAX_HEAD:
                raise ValueError(f"it has more than {MAX_HEAD:,} bytes before its pixels")
        else:
            raise ValueError(f"it has more than {MAX_CHUNKS:,} chunks before its pixels")
    elif (size := file.seek(0, os.SEEK_END)) > MAX_FILE:
        raise ValueError(f"it has {size:,} bytes; at most {MAX_FILE:,} were expected")
    file.seek(0)


def why_not(error: BaseException) -> str:
    """Why a picture cannot be read, in words about the file, not about Python's objects."""
    if isinstance(error, UnidentifiedImageError):
        return "it does not begin like one"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `minisd` chunk of a PNG.  Raises UsageError, which says what the file is instead, if it carries none."""
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what is broken in a block that nobody asks for
            check_head(file)
            with Image.open(file, formats=FORMATS) as image:
                if image.format != "PNG" or "minisd" not in image.info:
                    raise why_no_recipe(path, image)
                recipe = json.loads(image.info["minisd"])
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: expected a PNG, found a folder") from None
    except (OSError, ValueError, RecursionError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: is not a PNG that can be read: {why_not(error)}") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: its minisd chunk is not a recipe")
    check_kinds(path, recipe)
    if not isinstance(recipe.get("prompt", ""), str):
        lost = "the picture's caller gave a conditioning, which it does not carry; it cannot be made again"
        raise UsageError(f"{path}: prompt: {lost}")
    return recipe

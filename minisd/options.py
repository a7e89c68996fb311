"""Every option of a drawing, once: command line, checks, recipe, parameters text and axes of a comparison are made from it.

`request.Request` has a field for each (a test holds names and defaults together), which is where Python's types are.
Nothing here imports torch.
"""

from __future__ import annotations

import numbers
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .errors import UsageError

MAX_SIDE = 4096  # pixels
MAX_IMAGES = 1000  # in one call
MAX_STEPS = 999
MAX_SEED = 2**63 - 1 - MAX_IMAGES


@dataclass(frozen=True)
class Kind:
    """What a value may be."""

    expected: str
    parse: Callable[[str], Any]  # from the command line
    convert: Callable[[Any], Any]  # from Python or JSON; raises TypeError or ValueError, or returns None for what does not fit

    def check(self, name: str, value: object) -> Any:
        """The value as plain Python has it.  Raises UsageError, which names the argument, what was expected and found."""
        try:
            found = self.convert(value)
        except (TypeError, ValueError, OverflowError):
            found = None
        if found is None:
            raise UsageError(f"{name}: expected {self.expected}, found {repr(value)[:80]}")
        return found


def whole(low: int, high: int, at_least: int | None = None) -> Kind:
    """at_least: a number below `low` that is taken as well, such as the seed -1."""

    def convert(value: Any) -> int | None:
        number = operator.index(value)  # NumPy's, too, but no float and no text
        return number if not isinstance(value, bool) and (low <= number <= high or number == at_least) else None

    return Kind(f"a whole number from {low} to {high}", int, convert)


def number(low: float, high: float) -> Kind:
    def convert(value: Any) -> int | float | None:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return None
        plain = value if isinstance(value, int | float) else float(value)
        return plain if low <= plain <= high else None  # which NaN is not, either

    return Kind(f"a number from {low} to {high}", float, convert)


def one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", str, lambda value: value if isinstance(value, str) and value in names else None)


def pair(text: str) -> tuple[int, int]:
    width, mark, height = text.lower().partition("x")
    if not (mark and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"expected WIDTHxHEIGHT such as 512x768, found {text!r}")
    return int(width), int(height)


def levels(text: str) -> list[float] | str:
    """Numbers between commas; what is none is left to the check of them, which says what was expected."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        return text


def two_numbers(value: Any) -> tuple[int, int] | None:
    first, second = (operator.index(each) for each in value)
    return (first, second) if 0 <= first <= 65_536 and 0 <= second <= 65_536 else None


def numbers_by_name(text: str) -> dict[str, float]:
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    return {name.strip(): float(value) for name, _, value in parts}


def plain_numbers(value: Any) -> dict[str, float] | None:
    fits = all(isinstance(name, str) and isinstance(each, numbers.Real) for name, each in dict(value).items())
    return {name: each if isinstance(each, int) else float(each) for name, each in dict(value).items()} if fits else None


def with_numbers(text: str, most: int) -> tuple[Any, ...]:
    """NAME and up to so many numbers, with colons between them; the name may hold colons, too."""
    found = re.fullmatch(r"(.+?)" + r"(?::([-+.\de]+))?" * most, text, re.DOTALL)
    if found is None:
        raise ValueError(f"expected a name, found {text!r}")
    return (found[1], *(float(each) for each in found.groups()[1:] if each is not None))


def lora(text: str) -> tuple[Any, ...]:
    """NAME[:strength[:text_strength]]."""
    return with_numbers(text, 2)


def control(text: str) -> dict[str, Any]:
    """NAME[:strength[:start:end]]."""
    return dict(zip(("source", "strength", "start", "end"), with_numbers(text, 3), strict=False))


TEXT = Kind("a text", str, lambda value: value if isinstance(value, str) else None)
FLAG = Kind("true or false", bool, lambda value: bool(value) if isinstance(value, bool) else None)
PAIR = Kind("two whole numbers from 0 to 65,536", pair, two_numbers)
TEXTS = Kind("texts", str, lambda value: [TEXT.check("", each) for each in value] if isinstance(value, list) else None)
CONTROLS = Kind("a list of controls", control, lambda value: tuple(value) if isinstance(value, list | tuple) else None)
CONTROL_FACTS = Kind(
    "what a recipe says of controls", str,
    lambda value: value if isinstance(value, list) and all(isinstance(each, dict) for each in value) else None,
)  # fmt: skip
NUMBERS = Kind("numbers", str, lambda value: [number(0, 1e30).check("", each) for each in value])
NUMBERS_BY_NAME = Kind("numbers by name, such as s_churn=10", numbers_by_name, plain_numbers)
LEVELS = Kind("numbers, falling", levels, lambda value: value)
FUNCTION = Kind("a function", str, lambda value: value if callable(value) else None)
LORAS = Kind(
    "a list of LoRAs", lora, lambda value: value if isinstance(value, list | tuple) and not isinstance(value, str) else None
)
# Names, functions, pictures and tensors, which are looked at where they are used.
ANYTHING = Kind("a name, a function or a picture", str, lambda value: value)
# How prompts are read (text/grammar.py): A1111's four ways to weigh (sd_emphasis.py), and ComfyUI's dialect.
EMPHASES = ("original", "no-norm", "ignore", "none", "comfy")


@dataclass(frozen=True)
class Option:
    """flag: on the command line.  metavar: what stands for its value there.  by_picture: may be a list, with one for each.
    infotext, axis: A1111's word for it in the parameters text, and as an axis of a grid.  recorded: whether it is part of a
    recipe; `stands_as` of what kind it is there, where that is another.
    """

    name: str
    kind: Kind
    default: Any
    help: str = ""
    flag: str | None = None
    metavar: str | None = None
    group: str = ""
    by_picture: bool = False
    infotext: str | None = None
    axis: str | None = None
    recorded: bool = True
    stands_as: Kind | None = None


FILES, START = "model files", "starting from a picture"
ADDONS = "add-ons"
FINER, SDXL, NOISE = "finer control", "what SDXL is told", "where noise comes from"
OPTIONS = {
    option.name: option
    for option in (
        Option("negative_prompt", TEXT, "", "what it should not show", "--negative", "TEXT", by_picture=True),
        Option(
            "style", TEXT, None, "words of a style around the prompt; minisd styles lists them", "--style", "NAME", recorded=False
        ),
        Option("width", whole(8, MAX_SIDE), None, flag="--size"),
        Option("height", whole(8, MAX_SIDE), None, flag="--size"),
        Option("steps", whole(1, MAX_STEPS), 20, "denoising steps", "--steps", "N", infotext="Steps", axis="Steps"),
        Option(
            "sampler", ANYTHING, "euler", "minisd samplers lists them", "--sampler", "NAME",
            infotext="Sampler", axis="Sampler", stands_as=TEXT,
        ),
        Option(
            "guidance_scale", number(0, 100), None, "guidance scale; 1 turns it off (default: the checkpoint's own, else 7.5)",
            "--cfg", "W", by_picture=True, infotext="CFG scale", axis="CFG Scale",
        ),
        Option(
            "seed", whole(0, MAX_SEED, at_least=-1), None,
            "makes the picture repeatable; picture i has seed N + i (default, and -1: random)", "--seed", "N",
            by_picture=True, infotext="Seed", axis="Seed",
        ),
        Option("seeds", one_of("rising", "same"), "rising", recorded=False),
        Option("num_images", whole(1, MAX_IMAGES), 1, "pictures to draw", "--num-images", "N", recorded=False),
        Option("latents", ANYTHING, None, recorded=False),
        Option(
            "sigmas", LEVELS, None, "noise levels of one's own, falling to 0, in the place of --steps and --spacing",
            "--sigmas", "S,S,…", FINER, stands_as=NUMBERS,
        ),
        Option("guide", FUNCTION, None, stands_as=TEXT),
        Option(
            "high_noise_frac", number(0, 1), 0.8, "the part that the first draws", "--high-noise-frac", "F", FILES
        ),
        Option(
            "init_image", ANYTHING, None, "draw over this picture, edit it, or paint into it", "--init", "PICTURE", START,
            stands_as=TEXT,
        ),
        Option(
            "strength", number(0, 1), None, "0 to 1: how much of it may change (default: 0.8; 1 under a mask)",
            "--strength", "S", START, infotext="Denoising strength",
        ),
        Option(
            "mask", ANYTHING, None, "white where to paint, black where to keep", "--mask", "PICTURE", START, stands_as=TEXT
        ),
        Option(
            "image_guidance_scale", number(0, 100), 1.5, "how closely an editing model keeps to it", "--image-cfg", "W", START,
            infotext="Image CFG scale",
        ),
        Option(
            "clip_skip", whole(1, 100), None, "1: the text encoder's last layer, 2: the one before it, …",
            "--clip-skip", "N", FINER, infotext="Clip skip",
        ),
        Option(
            "eta", number(0, 1), None, "0 to 1: noise that a stochastic sampler adds at each step (default: its own)",
            "--eta", "E", FINER, infotext="Eta",
        ),
        Option(
            "sampler_options", NUMBERS_BY_NAME, None, "such as s_churn=10,s_noise=1.003: minisd samplers says which has which",
            "--sampler-options", "NAME=VALUE,…", FINER,
        ),
        Option(
            "spacing", TEXT, None,
            "which noise levels: karras, trailing, … (default: the checkpoint's or sampler's own; minisd samplers lists them)",
            "--spacing", "NAME", FINER, infotext="Schedule type",
        ),
        Option(
            "like", one_of("comfyui", "a1111", "diffusers"), None,
            "by the rules of comfyui, a1111 or diffusers where they differ from minisd's: for pictures of theirs",
            "--like", "NAME", FINER,
        ),
        Option(
            "guidance_rescale", number(0, 1), 0.0, "0 to 1: against the glare of strong guidance",
            "--rescale", "R", FINER, infotext="CFG Rescale",
        ),
        Option(
            "rng", TEXT, None, "cpu, the default: minisd's, and A1111's RNG CPU; nv: A1111's RNG GPU and NV; comfy: ComfyUI's",
            "--rng", "NAME", NOISE,
        ),
        Option(
            "subseed", whole(0, MAX_SEED, at_least=-1), None, "of the noise that a variation goes towards (default: random)",
            "--subseed", "N", NOISE, infotext="Variation seed",
        ),
        Option(
            "subseed_strength", number(0, 1), 0.0, "0 to 1, how far; the pictures have one seed, and subseeds N + i",
            "--subseed-strength", "F", NOISE, infotext="Variation seed strength",
        ),
        Option(
            "ensd", whole(0, 2**32), 0, "added to the seed for the noise of the steps (A1111's eta noise seed delta)",
            "--ensd", "N", NOISE, infotext="ENSD",
        ),
        Option(
            "sde_noise", one_of("independent", "brownian"), None,
            "independent noise for each step (default), or brownian: of one path, as other programs have it for samplers of SDEs",
            "--sde-noise", "NAME", NOISE,
        ),
        Option("batch_place", PAIR, None),
        Option(
            "controls", CONTROLS, (), "a ControlNet or T2I-Adapter, with its strength, and the shares of the steps where it acts",
            "--control", "NAME[:S[:A:B]]", ADDONS, stands_as=CONTROL_FACTS,
        ),
        Option("original_size", PAIR, None, "size before cropping (default: the picture's)", "--original-size", "WxH", SDXL),
        Option("crop", PAIR, (0, 0), "left and top of the crop (default: 0x0)", "--crop", "LxT", SDXL),
        Option("target_size", PAIR, None, "size after cropping (default: the picture's)", "--target-size", "WxH", SDXL),
        Option(
            "zero_negative", FLAG, None,
            "an empty negative prompt is all zeros, not the encoding of no words (default: as SDXL was trained, zeros)",
            "--zero-negative", None, SDXL,
        ),
        Option("aesthetic_score", number(0, 10), 6.0, "0 to 10, what the refiner aims at", "--aesthetic", "S", SDXL),
        Option("negative_aesthetic_score", number(0, 10), 2.5),
        Option("refiner", ANYTHING, None, recorded=False),
        Option("progress", FLAG, False, recorded=False),
        Option("transform", FUNCTION, None, recorded=False),
        Option("observe", FUNCTION, None, recorded=False),
        Option(
            "prompt_2", TEXT, None, "what the second text encoder reads (default: the prompt)", "--prompt-2", "TEXT", SDXL,
            by_picture=True,
        ),
        Option(
            "negative_prompt_2", TEXT, None, "likewise, of what it should not show", "--negative-2", "TEXT", SDXL, by_picture=True
        ),
        Option(
            "emphasis", one_of(*EMPHASES), None,
            "how (red:1.2) is read: as A1111 does, original (default), no-norm, ignore or none; or comfy",
            "--emphasis", "NAME", FINER, infotext="Emphasis",
        ),
        Option("plain_prompt", FLAG, None, "prompts are words: no brackets, AND or BREAK", "--plain-prompt", None, FINER),
        Option(
            "loras", LORAS, None, "a LoRA or one of its relatives, with its strength and another for the text; may be repeated",
            "--lora", "NAME[:S[:T]]", ADDONS, axis="LoRA",
        ),
        Option(
            "lora_blocks", TEXT, None, "what multiplies it in blocks of the UNet: input.0-3=0,middle=0.5 (see merge --blocks)",
            "--lora-blocks", "SPEC", ADDONS,
        ),
        Option(
            "lora_rule", one_of("paper", "comfyui"), None,
            "comfyui: its rule for DoRA, OFT and BOFT, for pictures of it (default: the paper's)", "--lora-rule", "NAME", ADDONS,
        ),
        Option(
            "rescue", FLAG, False, "where a block of the UNet overflows, compute it in float32 (the VAE does so by itself)",
            "--rescue", None, FINER,
        ),
        Option(
            "cfg_until", number(0, 1), 1.0, "0 to 1: guides this share of the steps, the first; the others take half the time",
            "--cfg-until", "F", FINER,
        ),
        Option(
            "cache", whole(1, 20), 1, "the deep part of the UNet every N-th time alone (DeepCache): faster, and less exact",
            "--cache", "N", FINER,
        ),
        Option(
            "lora_partial", FLAG, False, "take of a LoRA what fits the checkpoint, where else it is refused",
            "--lora-partial", None, ADDONS,
        ),
    )
}  # fmt: skip
RECORDED = [option.name for option in OPTIONS.values() if option.recorded]
# What a recipe may hold, where it holds anything.
RECIPE = {name: OPTIONS[name].stands_as or OPTIONS[name].kind for name in RECORDED}
RECIPE |= dict.fromkeys(("prompt", "device", "dtype", "prediction", "task", "own_spacing"), TEXT)
RECIPE |= dict.fromkeys(("model_path", "vae_path", "refiner_path"), TEXT)
RECIPE |= dict.fromkeys(("ema", "fp8", "zero_snr"), FLAG) | dict.fromkeys(("vae_paths", "own"), TEXTS)
RECIPE |= {"embeddings": CONTROL_FACTS, "changed": TEXT}
AXES = {option.flag.removeprefix("--"): option for option in OPTIONS.values() if option.axis and option.flag}  # by their names

# What the same things are called elsewhere, and what to do about it here.
DIFFUSERS = {
    "num_inference_steps": "steps", "num_images_per_prompt": "num_images", "image": "init_image", "mask_image": "mask",
    "generator": "seed, a whole number", "scheduler": "sampler and spacing", "timesteps": "sigmas", "cfg": "guidance_scale",
    "callback_on_step_end": "transform, or the steps of pipe.stream(…)", "callback": "the steps of pipe.stream(…)",
    "prompt_embeds": "a Conditioning as the prompt", "negative_prompt_embeds": "a Conditioning as negative_prompt",
    "eta_noise": "eta", "denoising_end": "refiner and high_noise_frac", "cfg_scale": "guidance_scale", "size": "width and height",
    "crops_coords_top_left": "crop, (left, top)", "output_type": "result.images, result.latents", "init": "init_image",
    "sampler_name": "sampler", "n_iter": "num_images", "batch_size": "num_images", "schedule": "spacing",
}  # fmt: skip


def unknown(names: list[str]) -> UsageError:
    """What to say of options that there are none of, the nearest one first."""
    name = names[0]
    if name in DIFFUSERS:
        return UsageError(f"{name}: unknown; here it is {DIFFUSERS[name]}")
    close = get_close_matches(name, OPTIONS, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    return UsageError(f"{', '.join(names)}: unknown; {meant}expected some of {', '.join(OPTIONS)}")


def checked(name: str, value: object) -> Any:
    """An option's value as plain Python has it; a list of values, where it may be given for each picture."""
    option = OPTIONS[name]
    if value is None and option.default is None:
        return None
    shape = getattr(value, "shape", None)
    if shape == ():  # a single number of NumPy's or torch's
        value = value.item()  # type: ignore[attr-defined]
    if option.by_picture and (isinstance(value, list | tuple | range) or shape):
        values: Any = value.tolist() if shape else value  # type: ignore[attr-defined]
        return tuple(option.kind.check(name, each) for each in values)
    return option.kind.check(name, value)

"""Programs that write what they did as names and values: InvokeAI as one JSON object, kohya's sd-scripts as a chunk for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from .found import Found
from .graphs import short
from .infotext import sampler_words

FLAGS = {"steps": "--steps", "cfg_scale": "--cfg", "scale": "--cfg", "seed": "--seed", "cfg_rescale_multiplier": "--rescale"}
# Where their names for samplers are none that others use.  InvokeAI: _k is Karras.
SAMPLERS = {
    "dpmsolver": "dpmpp_2m", "dpmsolver++": "dpmpp_2m", "dpmsingle": "dpmpp_2s", "pndm": "plms", "k_lms": "lms",
    "k_euler": "euler", "k_euler_a": "euler_ancestral", "k_dpm_2": "dpm_2", "k_dpm_2_a": "dpm_2_ancestral",
    "kdpm_2": "dpm_2", "kdpm_2_a": "dpm_2_ancestral",
}  # fmt: skip
KNOWN = {
    "positive_prompt", "negative_prompt", "width", "height", "scheduler", "model", "vae", "clip_skip", "app_version",
    "generation_mode", "rand_device", "prompt", "negative-prompt", "sampler", "seamless_x", "seamless_y", "positive_style_prompt",
    "negative_style_prompt", "ref_images", "cfg_rescale_multiplier", "original-width", "original-height", *FLAGS,
}  # fmt: skip
IDLE: tuple[object, ...] = (None, False, "", 0, [], {})


def of_record(record: Mapping[str, Any], program: str, prompt: str, negative: str, sampler: str) -> Found:
    """prompt, negative, sampler: the names that the program has for them."""
    said: list[tuple[str, tuple[str, ...]]] = []
    lacking = [name for name, value in record.items() if name not in KNOWN and value not in IDLE]
    for name, flag in FLAGS.items():
        if record.get(name) not in IDLE:
            said.append((f"{name}: {record[name]}", (flag, str(record[name]))))
    if isinstance(record.get("width"), int) and isinstance(record.get("height"), int):
        size = f"{record['width']}x{record['height']}"
        said.append((f"size: {size}", ("--size", size)))
    if isinstance(record.get("clip_skip"), int) and record["clip_skip"] > 0:
        said.append((f"clip_skip: {record['clip_skip']}", ("--clip-skip", str(record["clip_skip"] + 1))))  # layers left out
    if name := str(record.get(sampler) or ""):
        try:
            plain = name.removesuffix("_k")
            words = sampler_words(SAMPLERS.get(plain, plain))
            said.append((f"{sampler}: {name}", (*words, *(("--spacing", "karras") if plain != name else ()))))
        except UsageError:
            lacking.append(f"{sampler}: {name}")
    model = record.get("model")
    title = model.get("name") or model.get("model_name") if isinstance(model, dict) else None
    texts = [str(record.get(key) or "") for key in (prompt, negative)]
    return Found(program, texts[0], texts[1], tuple(said), tuple(lacking), "diffusers", short(title) if title else None)

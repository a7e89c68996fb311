"""A picture by networks that `conversion` has made for OpenVINO: its runtime, NumPy, and no torch.

The loop is that of minisd/by_hand.py.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def options(dtype: str, threads: int) -> dict[str, Any]:
    """One picture at a time, as soon as may be, in this number format where the CPU has it."""
    return {"INFERENCE_PRECISION_HINT": HINTS[dtype], "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}


def compiled(core: Any, job: dict[str, Any], name: str) -> Any:
    """A network, from OpenVINO's cache where it has been compiled before."""
    cache = {"CACHE_DIR": f"{job['folder']}/openvino"}
    return core.compile_model(f"{job['folder']}/{name}.xml", "CPU", options(job["dtype"], job["threads"]) | cache)


def main(job: dict[str, Any]) -> None:
    import numpy as np
    import openvino
    from PIL import Image

    from ...text.tokenizer import tokenize

    core = openvino.Core()
    text, unet, vae = (compiled(core, job, name) for name in ("text", "unet", "vae"))
    facts = json.loads((Path(job["folder"]) / "facts.json").read_text(encoding="utf-8"))
    print("ready to draw", file=sys.stderr, flush=True)
    context = text([np.array(tokenize(["", job["prompt"]]), np.int64)])[0]
    shape, noise = list(vae.input(0).shape), np.random.default_rng(job["seed"])
    x = noise.standard_normal(shape, np.float32) * facts["sigmas"][0]
    for (sigma, following), t in zip(pairwise(facts["sigmas"]), facts["timesteps"], strict=True):
        scaled = np.repeat(x / (sigma**2 + 1) ** 0.5, 2, axis=0).astype(np.float32)
        without, with_prompt = np.split(unet([scaled, np.full(2, t, np.float32), context])[0], 2)
        x = x + (following - sigma) * (without + job["guidance"] * (with_prompt - without))
    pixels = vae([(x / facts["scale"]).astype(np.float32)])[0][0]
    rounded = (np.nan_to_num(pixels / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(rounded.transpose(1, 2, 0)).save(f"{job['folder']}/openvino.png")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

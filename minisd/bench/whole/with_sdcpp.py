"""A picture by stable-diffusion.cpp, in its Python package, from the same file."""

from __future__ import annotations

import json
import sys
from typing import Any

WEIGHTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # as it names them; it computes in float32 around them


def main(job: dict[str, Any]) -> None:
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=job["path"], n_threads=job["threads"], wtype=WEIGHTS[job["dtype"]], vae_decode_only=True, verbose=False
    )
    print("ready to draw", file=sys.stderr, flush=True)
    asked = {"width": job["width"], "height": job["height"], "seed": job["seed"], "cfg_scale": job["guidance"]}
    images = model.generate_image(prompt=job["prompt"], sample_steps=job["steps"], sample_method="euler", **asked)
    images[0].save(f"{job['folder']}/sdcpp.png")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

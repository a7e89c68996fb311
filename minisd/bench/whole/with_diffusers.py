"""A picture by diffusers, as a script of its users draws it from one file, without the network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    import diffusers
    import torch

    folder, dtype = job["folder"], getattr(torch, job["dtype"])
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    kind = diffusers.StableDiffusionXLPipeline if "XL" in index["_class_name"] else diffusers.StableDiffusionPipeline
    pipe = kind.from_single_file(job["path"], config=folder, local_files_only=True, torch_dtype=dtype).to(job["device"])
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    print("ready to draw", file=sys.stderr, flush=True)
    asked = {"num_inference_steps": job["steps"], "guidance_scale": job["guidance"]}
    generator = torch.Generator().manual_seed(job["seed"])
    result = pipe(job["prompt"], width=job["width"], height=job["height"], generator=generator, **asked)
    result.images[0].save(f"{folder}/diffusers.png")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

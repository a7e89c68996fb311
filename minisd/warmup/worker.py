"""The process that compiles: a job in JSON on standard input, a line of JSON for each variant on standard output.

It has to be one of its own: Triton learns what to compile for when it starts.  Once the variants are known it forks, for a
compiler holds Python's lock: several threads would be little faster than one.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..codec import vae_dtype
from ..fast import choice
from ..fast.lossy.float8 import to_float8
from ..files.model import NoInit, StableDiffusion
from ..models.family import FAMILIES, VAE
from ..models.shapes import Shapes
from ..system.device import DTYPES
from . import networks
from .absent import Variant, Variants, pretend


def variants(job: dict[str, Any]) -> Variants:
    """What the networks of a job launch, each once, in the order of a drawing.  Changes Triton for good: see absent.py."""
    pretend(job["capability"])
    choice.use(",".join(sorted(choice.chosen().names)) or "torch")  # by their names, or `auto` would look for a GPU
    seen = Variants()
    for wanted in job["models"]:
        model = described(wanted, job["capability"])
        networks.walk(model, tuple(wanted["latents"]), seen.begin, wanted["masked"])
    return seen


def described(wanted: dict[str, Any], capability: int) -> StableDiffusion:
    """The modules of a job's model on the meta device, each part in the dtype that it would be drawn in on this GPU."""
    family = next(each for each in FAMILIES if each.name == wanted["family"])
    dtype = DTYPES[wanted["dtype"]]
    with torch.device("meta"), NoInit():
        model = StableDiffusion(Shapes({key: tuple(shape) for key, shape in wanted["shapes"].items()}), family).to(dtype)
        if wanted["fp8"]:
            to_float8(model.unet)
    if hasattr(model, VAE):
        model.vae.to(vae_dtype(dtype, family.vector, has_bfloat16=capability >= 80))
    return model


def compiled(found: list[Variant], processes: int) -> Iterator[dict[str, Any]]:
    """Compiles them, in their order; yields what became of each as it comes."""
    if processes == 1 or len(found) == 1:
        yield from (outcome(variant) for variant in found)
        return
    shared: Callable[[int], dict[str, Any]] = Outcomes(found)
    with multiprocessing.get_context("fork").Pool(min(processes, len(found))) as pool:
        yield from pool.imap_unordered(shared, range(len(found)))


class Outcomes:
    """`outcome` by number: a forked process has the variants already, which no pipe could carry."""

    kept: list[Variant]

    def __init__(self, found: list[Variant]) -> None:
        Outcomes.kept = found

    def __call__(self, index: int) -> dict[str, Any]:
        return outcome(Outcomes.kept[index])


def outcome(variant: Variant) -> dict[str, Any]:
    from triton.runtime.cache import get_cache_manager

    start = time.perf_counter()
    said = {"kernel": variant.kernel, "part": variant.part}
    try:
        kernel = variant.compiled()
    except Exception as error:  # the others go on
        line = (str(error).splitlines() or [""])[0]
        return said | {"error_text": f"{type(error).__name__}: {line[:160]}"}
    place = Path(get_cache_manager(kernel.hash).cache_dir)
    return said | {"hash": kernel.hash, "place": str(place), "seconds": time.perf_counter() - start}


def main() -> None:
    job = json.load(sys.stdin)
    found = list(variants(job).found.values())
    print(json.dumps({"variants": len(found)}), flush=True)
    for each in compiled(found, job["processes"]):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()

"""Run as a process: what a drawing launches, and what the walk over the meta device says that it does.  Prints both as JSON.

The drawing is a real one on a CPU by the engine of a GPU: every wrapper of a kernel runs up to its launch, over tensors that lie
where they lie, and the reference's result takes its place.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import minisd
from minisd import pipeline
from minisd.bench.shapes import as_written
from minisd.fast import choice, cuda, operations
from minisd.fast import unet as fused_networks
from minisd.fast.cuda import Cuda
from minisd.fast.lossy import float8
from minisd.fast.lossy.networks import form_of
from minisd.files.checkpoint import open_checkpoint
from minisd.warmup.absent import Variants, pretend
from minisd.warmup.starting import job_of, of_checkpoint
from minisd.warmup.worker import variants

CAPABILITY = 90


class Launching:
    """In the place of minisd.kernels."""

    def __init__(self) -> None:
        self.real = choice.kernels()

    def __getattr__(self, name):
        if name not in self.real.KERNELS:
            return getattr(self.real, name)

        def call(*given, **more):
            getattr(self.real, name)(*given, **more)
            wide = [single(x) for x in given], {key: single(x) for key, x in more.items()}
            result = self.real.KERNELS[name].reference(*wide[0], **wide[1])
            if name == "linear_step":
                for target, value in zip((given[0], given[1], given[6]), result, strict=True):
                    target.copy_(value)
            if more.get("addend") is not None:  # layer_norm's stream
                given[0].add_(more["addend"])
            if isinstance(result, tuple):  # a map, and its statistics
                return as_written(result[0], given[0]), *result[1:]
            return as_written(result, given[0])

        return call


def single(x):
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def engine(model, device, fast):
    model.to(memory_format=torch.channels_last)
    return Cuda(model.unet, False, (*model.text_encoders, model.vae))


def names(seen):
    return sorted({f"{function.fn.__name__} {key}" for function, key in seen.found})


def hash_of(name, seen):
    """Where Triton's cache has it: compiled as the launch that was seen asks for it."""
    return next(variant for variant in seen.found.values() if variant.kernel.split("_")[0] == name).compiled().hash


def main(path: str, masked: bool, fp8: bool) -> None:
    file = open_checkpoint(path)
    size = (64, 64)
    foretold = []
    model = of_checkpoint(file, size, "bfloat16", fp8)
    for each in ((False,), (True,)):
        seen = variants(job_of([model | {"masked": each}], CAPABILITY, 1))
        foretold.append(names(seen))
    pretend(CAPABILITY)
    choice.kernels().checks.DEVICES = ("cpu",)
    launching, walked, seen = Launching(), seen, Variants()
    for module in (choice, operations, fused_networks, cuda, float8):
        vars(module)["kernels"] = lambda: launching
    pipeline.engine = engine
    pipe = minisd.load(path, device="cpu", dtype="bfloat16", fp8=fp8)
    if fp8:
        pipe.engine.reform(form_of(pipe.unet))  # as on a GPU
    more = {"init_image": Image.new("RGB", size), "mask": Image.new("L", size, 255)} if masked else {}
    result = pipe("a red circle", "blue", *size, steps=2, seed=1, **more)
    assert result.metadata[0]["steps"] == 2
    hashes = [hash_of("geglu", each) for each in (walked, seen)]
    print(json.dumps({"foretold": foretold, "launched": names(seen), "hashes": hashes}))


if __name__ == "__main__":
    main(str(Path(sys.argv[1])), sys.argv[2] == "masked", sys.argv[2] == "fp8")

"""bench accuracy: what number formats and shortcuts cost, in pictures and layer by layer, against float32.

Pictures are compared pixel by pixel (PSNR, 10 log10(255^2 / mean squared difference)), so another picture that is as good counts
as an error, too: of two ways the one with more decibels is nearer, and from 40 dB on nobody sees it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...fast import choice
from ...fast.cuda import Cuda
from ...fast.lossy.float8 import E4M3, fits
from ...inside.layers import numerics
from ...inside.sides import EMULATED, FLOAT8, side
from ...pipeline import Pipeline, load
from ...request import Request
from ..kernels import runs_here
from ..report import Report

PROMPTS = (
    "a red circle on a blue background",
    "a small yellow star on a black background",
    "a large green heart on a pink background",
    "a purple ring on a white background",
)
LOSSY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--cfg-until 0.7", {"cfg_until": 0.7}),
    ("--cfg-until 0.5", {"cfg_until": 0.5}),
    ("--cache 2", {"cache": 2}),
    ("--cache 3", {"cache": 3}),
    ("--cfg-until 0.7 --cache 3", {"cfg_until": 0.7, "cache": 3}),
)
Picture = tuple[np.ndarray, Tensor]


def bench(report: Report, args: Any) -> None:
    where, model = str(report.clock.device), args.checkpoint
    whole = load(model, where, "float32", fast=False)
    requests = requests_for(whole, args.full)
    shown = requests[0]
    named = whole.checkpoint.path.stem
    size = f"{named}, {len(requests)} pictures of {shown.width}x{shown.height}, {shown.steps} steps"
    wanted, seconds = drawn(whole, requests)
    columns = ("PSNR dB", "worst dB", "latents", "UNet MB", "work", "time s", "to float32")
    report.table(f"number formats, {size}, against float32", columns)
    row(report, "float32", wanted, wanted, weight_bytes(whole), seconds, seconds)
    report.note(
        "latents: the worst relative error; work: arithmetic up to the last step; dB: 10 log10(255^2 / mean squared difference)"
    )
    all_of_it = work(whole, shown)
    for label, make in formats(model, where).items():
        with report.attempt(label):
            pipe = make()
            found, taken = drawn(pipe, requests)
            row(report, label, found, wanted, weight_bytes(pipe), taken, seconds)
    kernels(report, model, where, requests, (wanted, seconds))
    report.table(f"shortcuts, {size}, float32, against all of the work", columns)
    for label, options in LOSSY:
        with report.attempt(label):
            found, taken = drawn(whole, [replace(request, **options) for request in requests])
            share = work(whole, replace(shown, **options)) / all_of_it
            row(report, label, found, wanted, weight_bytes(whole), taken, seconds, share)
    by_layer(report, model, where, shown)


def requests_for(pipe: Pipeline, full: bool) -> list[Request]:
    """In the model's own size, or half of it."""
    width, height = (side if full else max(64, side // 2 // 8 * 8) for side in pipe.recognition.size)
    prompts = PROMPTS if full else PROMPTS[:3]
    return [Request(text, "", width, height, 20, seed=i + 1) for i, text in enumerate(prompts)]


def drawn(pipe: Pipeline, requests: Sequence[Request]) -> tuple[list[Picture], float]:
    """Pixels and latents of each, and the seconds of all."""
    start, made = time.perf_counter(), list[Picture]()
    for request in requests:
        result = pipe(request)
        made.append((np.asarray(result.images[0]).astype(float), result.latents.float().cpu()))
    return made, time.perf_counter() - start


def row(
    report: Report,
    label: str,
    found: list[Picture],
    wanted: list[Picture],
    size: int,
    seconds: float,
    whole: float,
    share: float = 1.0,
) -> None:
    each = [psnr(a, b) for (a, _), (b, _) in zip(found, wanted, strict=True)]
    errors = [float((a - b).norm() / b.norm()) for (_, a), (_, b) in zip(found, wanted, strict=True)]
    same = found is wanted
    values = {} if same else {"PSNR_dB": sum(each) / len(each), "worst_dB": min(each), "latents": max(errors)}
    report.add(label, **values, UNet_MB=size / 1e6, work=share, time=seconds, to_float32=seconds / whole)


def work(pipe: Pipeline, request: Request) -> int:
    """Floating-point operations of a drawing up to its last step."""
    counted = FlopCounterMode(display=False)
    with counted:
        steps = pipe.stream(request)
        for _ in range(request.steps):
            next(steps)
    return counted.get_total_flops()


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Decibels; 99 where there is no difference at all."""
    squared = float(((found - wanted) ** 2).mean())
    return min(99.0, 10 * math.log10(255**2 / squared)) if squared else 99.0


def weight_bytes(pipe: Pipeline) -> int:
    tensors = (*pipe.unet.parameters(), *pipe.unet.buffers())
    return sum(x.numel() * x.element_size() for x in tensors)


def formats(model: str | None, where: str) -> dict[str, Callable[[], Pipeline]]:
    """By what they are called.  A CPU has no float16 of any speed: it rounds what it makes in float32."""
    half = ("float16", "float16") if where != "cpu" else (EMULATED, "float16, emulated")
    return {
        "bfloat16": lambda: load(model, where, "bfloat16", fast=False),
        half[1]: lambda: side(half[0], model, where, side("float32", model, where)).pipe,
        "float8 storage, computed in float32": lambda: stored(load(model, where, "float32", fast=False)),
        "--fp8 in float32": lambda: load(model, where, "float32", fast=False, fp8=True),
        "--fp8 in bfloat16": lambda: load(model, where, "bfloat16", fast=False, fp8=True),
    }


@torch.no_grad()
def stored(pipe: Pipeline) -> Pipeline:
    """The same layers' weights rounded to float8 as files have them, without scales."""
    for layer in pipe.unet.modules():
        if fits(layer):
            layer.weight.copy_(layer.weight.to(E4M3))  # type: ignore[union-attr, operator, arg-type]
    return pipe


def kernels(
    report: Report, model: str | None, where: str, requests: Sequence[Request], whole: tuple[list[Picture], float]
) -> None:
    """bfloat16 in the fused form of a GPU, which asks for all kernels of ours: without any, and with each alone."""
    if not runs_here(report.clock.device):
        report.note("minisd's own kernels are left out: they run on a GPU, or with TRITON_INTERPRET=1")
        return
    for name in ("torch", *sorted(choice.ALL - {"linear_step"} - choice.WAYS - choice.FLOAT8)):
        with report.attempt(name), choice.using(name):
            pipe = load(model, where, "bfloat16", fast=False)
            pipe.engine = pipe.codec.engine = Cuda(pipe.unet, False, (*pipe.text_encoders, pipe.vae))
            found, taken = drawn(pipe, requests)
            label = f"bfloat16, fused, {f'kernel {name}' if name in choice.ALL else 'no kernel'}"
            row(report, label, found, whole[0], weight_bytes(pipe), taken, whole[1])


def by_layer(report: Report, model: str | None, where: str, request: Request) -> None:
    """The error that a layer adds of itself, given what float32's was given: the worst of each kind."""
    sides = {"bfloat16": "bfloat16", "float16": "float16" if where != "cpu" else EMULATED, "fp8": FLOAT8}
    report.table("layers, the worst error of its own of each kind, against float32", ("layers", *sides))
    worst: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for label, spec in sides.items():
        with report.attempt(label):
            a = side("float32", model, where)
            layers = [layer for layer in numerics(a, side(spec, model, where, a), request)["layers"] if layer["inner"]]
            for layer in layers:
                kinds = worst.setdefault(layer["kind"], {})
                kinds[label] = max(kinds.get(label, 0.0), layer["entering"])
            counts |= {kind: sum(layer["kind"] == kind for layer in layers) for kind in worst}
    for kind in sorted(worst, key=lambda kind: -max(worst[kind].values())):
        report.add(kind, layers=counts[kind], **worst[kind])

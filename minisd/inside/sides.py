"""The two sides of a comparison of numbers: a pipeline, and how it is to compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..fast import choice
from ..fast.lossy.float8 import E4M3
from ..fast.lossy.networks import in_float8
from ..pipeline import Pipeline, load
from ..system.device import DTYPES, name_of
from .fused import Fused

EMULATED, KERNELS, FUSED, FUSED_CPU, FLOAT8 = "float16-emulated", "triton", "fast", "cpu:fast", "fp8"
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LARGEST_HALF = 65_504.0  # float16's largest number


@dataclass(frozen=True)
class Side:
    """label: what it is called.  dtype: the number format whose rounding it has, emulated or not."""

    label: str
    pipe: Pipeline
    dtype: torch.dtype
    emulated: bool = False  # computes in float32, and rounds weights and what every module makes to float16
    kernels: bool = False  # every operation by a Triton kernel that has one
    fused: Fused | None = None  # the UNet and the decoder in the form that draws on a GPU, or on a CPU

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For the length of a with block, its modules compute as they are to."""
        with choice.using("triton") if self.kernels else nullcontext():
            yield

    def unet(self, *given: Any) -> Tensor:
        return self.fused.unet(*given) if self.fused else self.pipe.unet(*given)

    def decode(self, latents: Tensor) -> Tensor:
        return self.fused.decoder(latents) if self.fused else self.pipe.vae.decode(latents)

    def form(self, name: str) -> Callable[..., Tensor]:
        """What computes the module of this name."""
        return self.fused.parts[name].run if self.fused else self.pipe.model.get_submodule(name)

    def given(self, value: Any, module: nn.Module) -> Any:
        """An input of the other side's as this side's module takes it."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        weight = next((each for each in module.parameters() if each.dtype.itemsize > 1), None)  # float8 is for weights alone
        value = value.to(self.pipe.device, self.pipe.dtype if weight is None else weight.dtype)
        return rounded(module, (), value) if self.emulated else value


def rounded(module: nn.Module, inputs: object, output: Any) -> Any:
    """To float16 and back: 10 bits of precision, and infinity beyond 65,504."""
    return output.half().to(output.dtype) if isinstance(output, Tensor) and output.is_floating_point() else output


def side(spec: str | Pipeline, model: str | os.PathLike[str] | None, device: str | None, like: Side | None = None) -> Side:
    """What a text stands for: a number format (float32, bfloat16, float16, or as fp32, bf16, fp16), a way to compute
    (float16-emulated, fp8, triton, fast, cpu:fast), or another checkpoint; or a pipeline as it is.

    like: the other side, whose number format all but a format's name take; without it only formats are known.  On a CPU, which
    has no float16 of any speed, float16 beside another side is the emulated one.  Raises UsageError, CheckpointError.
    """
    if isinstance(spec, Pipeline):
        return Side(repr(spec), spec, spec.dtype)
    spec = SHORT.get(spec, spec)
    if spec == "float16" and like is not None and like.pipe.device.type == "cpu":
        spec = EMULATED
    if spec in DTYPES:
        return Side(spec, load(model, device, spec, fast=False), DTYPES[spec])
    if like is None:
        raise UsageError(f"a: expected one of {', '.join(DTYPES)}, found {spec[:80]!r}")
    if spec in MADE:
        return MADE[spec](model, device, like)
    return Side(os.path.basename(spec), load(spec, device, name_of(like.pipe.dtype), fast=False), like.dtype)


Model = str | os.PathLike[str] | None


def emulated(model: Model, device: str | None, like: Side) -> Side:
    pipe = load(model, device, "float32", fast=False)
    for weight in pipe.model.parameters():
        weight.copy_(weight.half())
    for module in pipe.model.modules():
        module.register_forward_hook(rounded)
    return Side(EMULATED, pipe, torch.float16, emulated=True)


def by_kernels(model: Model, device: str | None, like: Side) -> Side:
    with choice.using("triton"):
        choice.wants("group_norm", like.pipe.device)  # says what is missing
    return Side(KERNELS, load(model, device, name_of(like.pipe.dtype), fast=False), like.dtype, kernels=True)


def fused(model: Model, device: str | None, like: Side) -> Side:
    pipe = load(model, device, name_of(like.pipe.dtype), fast=False)
    return Side(FUSED, pipe, like.dtype, fused=Fused(pipe.model, on_cpu=False))


def fused_on_cpu(model: Model, device: str | None, like: Side) -> Side:
    pipe = load(model, "cpu", name_of(like.pipe.dtype), fast=False)
    return Side(FUSED_CPU, pipe, like.dtype, fused=Fused(pipe.model, on_cpu=True))


def in_fp8(model: Model, device: str | None, like: Side) -> Side:
    pipe = load(model, device, name_of(like.pipe.dtype), fast=False)
    in_float8(pipe)
    return Side(FLOAT8, pipe, E4M3)


MADE = {EMULATED: emulated, KERNELS: by_kernels, FUSED: fused, FUSED_CPU: fused_on_cpu, FLOAT8: in_fp8}
Stage = tuple[str, Callable[[Side], object]]  # a name, and what runs a network on the same inputs on either side

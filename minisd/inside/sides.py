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
from ..fast.cuda import Cuda
from ..pipeline import Pipeline, load
from ..system.device import DTYPES, name_of

EMULATED, KERNELS, FUSED = "float16-emulated", "triton", "fast"
LARGEST_HALF = 65_504.0  # float16's largest number


@dataclass(frozen=True)
class Side:
    """label: what it is called.  dtype: the number format whose rounding it has, emulated or not."""

    label: str
    pipe: Pipeline
    dtype: torch.dtype
    emulated: bool = False  # computes in float32, and rounds weights and what every module makes to float16
    kernels: bool = False  # every operation by a Triton kernel that has one
    fused: Callable[..., Tensor] | None = None  # the UNet as a whole, in the form that a GPU draws with

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For the length of a with block, its modules compute as they are to."""
        with choice.using("triton") if self.kernels else nullcontext():
            yield

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
    """What a text stands for: a number format (float32, bfloat16, float16, or float16-emulated, for a CPU), triton, fast, or
    another checkpoint; or a pipeline as it is.

    like: the other side, whose number format all but a format's name take.  Raises UsageError, CheckpointError.
    """
    if isinstance(spec, Pipeline):
        return Side(repr(spec), spec, spec.dtype)
    if spec in DTYPES:
        if spec == "float16" and like is not None and like.pipe.device.type == "cpu":
            raise UsageError("b: expected float16-emulated on a CPU, found float16, which is hundreds of times slower there")
        return Side(spec, load(model, device, spec, fast=False), DTYPES[spec])
    if like is None:
        raise UsageError(f"a: expected one of {', '.join(DTYPES)}, found {spec[:80]!r}")
    dtype = name_of(like.pipe.dtype)
    if spec == EMULATED:
        pipe = load(model, device, "float32", fast=False)
        for weight in pipe.model.parameters():
            weight.copy_(weight.half())
        for module in pipe.model.modules():
            module.register_forward_hook(rounded)
        return Side(EMULATED, pipe, torch.float16, emulated=True)
    if spec == KERNELS:
        with choice.using("triton"):
            choice.wants("group_norm", like.pipe.device)  # says what is missing
        return Side(KERNELS, load(model, device, dtype, fast=False), like.dtype, kernels=True)
    if spec == FUSED:
        pipe = load(model, device, dtype, fast=False)
        return Side(FUSED, pipe, like.dtype, fused=Cuda(pipe.unet, graphs=False).network())
    return Side(os.path.basename(spec), load(spec, device, dtype, fast=False), like.dtype)


Stage = tuple[str, Callable[[Side], object]]  # a name, and what runs a network on the same inputs on either side

"""Which operations are computed by a kernel of ours (minisd.kernels), and which by PyTorch.

On a CUDA device most of them are kernels, elsewhere they are PyTorch's own.  The environment variable MINISD_KERNELS, or `use`
and `using` in Python, say otherwise:

    auto      on a GPU those in AUTO, the default
    triton    all of them; on a CPU too, where Triton's interpreter is on (TRITON_INTERPRET=1), which is for tests
    torch     none
    or some of their names, with commas between: group_norm,layer_norm

Training, empty tensors and float64 always go to PyTorch: the kernels have no backward pass and no double precision.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError

# What `auto` takes on a GPU.  By the measurements of the prototypes: PyTorch's GroupNorm reaches 2 to 7 % of an H200's bandwidth,
# LayerNorm takes 8 us where 3 would do, and no library attention that is fast takes 512 channels a head (4.0 ms for 16,384
# pixels, where two matrix products and a softmax make 1.4 by computation).  The others are by computation, and these kernels
# themselves are yet to be timed: `minisd bench kernels` and `minisd bench unet` do it.
# Not in it: `attention`, because cuDNN's, which PyTorch chooses for up to 128 channels on a Hopper GPU, was measured at 258 (40
# channels a head) and 444 TFLOP/s (64); `cross_attention`, the same kernel for a prompt's 77 keys alone, until it is timed beside
# cuDNN's; `linear_geglu`, which must keep 80 % of cuBLAS's speed to pay.
# LIBRARY are no kernels of ours, but ways of asking PyTorch's: see fast/unet.py.  WAYS are of `group_norm`: small maps in one
# launch, and large ones without the first of its two where another kernel of ours wrote the map.
LIBRARY = frozenset({"padded_conv", "residual_product"})
WAYS = frozenset({"small_norm", "statistics"})
FLOAT8 = frozenset({"quantise_rows", "dequantise"})  # for --fp8 alone
AUTO = LIBRARY | WAYS | FLOAT8 | {
    "group_norm", "layer_norm", "wide_attention", "geglu", "upsample_conv", "add_bias", "linear_step",
}  # fmt: skip
ALL = AUTO | {"attention", "cross_attention", "linear_geglu"}


class Choice(NamedTuple):
    names: frozenset[str]
    auto: bool = False  # the word, and not the same names one by one: then what cannot be is left out without a word


WORDS = {"auto": Choice(AUTO, auto=True), "triton": Choice(ALL), "torch": Choice(frozenset())}
chosen_here: ContextVar[Choice | None] = ContextVar("chosen_here", default=None)  # by `use`; else the environment is asked


@cache
def parse(choice: str, source: str) -> Choice:
    if choice in WORDS:
        return WORDS[choice]
    names = frozenset(choice.split(","))
    if not names <= ALL:
        raise UsageError(f"{source}: expected auto, triton, torch or some of {', '.join(sorted(ALL))}, found {choice!r}")
    return Choice(names)


def chosen() -> Choice:
    """The kernels that are to be used.  Raises UsageError for a wrong MINISD_KERNELS."""
    return chosen_here.get() or parse(os.environ.get("MINISD_KERNELS") or "auto", "MINISD_KERNELS")


def use(choice: str | None) -> None:
    """From now on: "auto", "triton", "torch" or names of kernels; None: what the environment says.  Raises UsageError."""
    chosen_here.set(None if choice is None else parse(choice, "kernels"))


@contextmanager
def using(choice: str) -> Iterator[None]:
    """`use` for the length of a with block."""
    before = chosen_here.set(parse(choice, "kernels"))
    try:
        yield
    finally:
        chosen_here.reset(before)


@cache
def kernels() -> ModuleType:
    """minisd.kernels, imported when it is first needed: Triton takes a while."""
    return import_module("minisd.kernels")


@cache
def has_triton() -> bool:
    return kernels().checks.triton is not None


@cache
def triton_builds() -> bool:
    """Whether a kernel can be built here, for which Triton needs a C compiler; a warning says why not."""
    if not has_triton():
        return False
    try:
        kernels().geglu(torch.zeros(1, 64, device="cuda", dtype=torch.float16))  # a variant that drawing needs, too
    except Exception as error:  # whatever it is, drawing goes on without
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton cannot build kernels here, so PyTorch's own operations take their place: {reason}", stacklevel=2)
        return False
    return True


def wants(name: str, device: torch.device) -> bool:
    """Whether operation `name` on this device is a kernel's.  Raises UsageError where a kernel is asked for and cannot be."""
    names, auto = chosen()
    if name not in names:
        return False
    if name in LIBRARY:
        return device.type == "cuda" or not auto
    if auto:
        return device.type == "cuda" and triton_builds()
    if not has_triton():
        raise UsageError("kernels: expected Triton to be installed, found none: `pip install triton`, or MINISD_KERNELS=torch")
    if device.type not in kernels().checks.DEVICES:
        raise UsageError(
            f"kernels: expected a CUDA device (or TRITON_INTERPRET=1, set before Triton is imported), found {device.type!r}: "
            "use MINISD_KERNELS=auto or torch"
        )
    return True


def takes(name: str, *tensors: Tensor | None) -> bool:
    """Whether kernel `name` is to be used, and for such tensors: it knows three number formats, no gradients, nothing empty."""
    given = [x for x in tensors if x is not None]
    if not wants(name, given[0].device):
        return False
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return not learns and all(x.numel() > 0 and x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in given)


def settle_cudnn() -> None:
    """What cuDNN does in all of this process: float32 with all of its digits, which it would convolve with three of; and with
    MINISD_CUDNN_BENCHMARK=1 the fastest of its algorithms for each new shape, timed, where its own rules choose otherwise.

    Raises UsageError for another value than 0, 1 or none.
    """
    torch.backends.cudnn.allow_tf32 = False
    said = os.environ.get("MINISD_CUDNN_BENCHMARK")
    if said not in (None, "", "0", "1"):
        raise UsageError(f"MINISD_CUDNN_BENCHMARK: expected 0 or 1, found {said!r}")
    if said:
        torch.backends.cudnn.benchmark = said == "1"

"""Classifier-free guidance and one step of the sampler in one kernel, which also writes the network's next input.

    e   = u + g (c - u)       guidance, from the predictions for [negative, positive] (Ho and Salimans 2022, arXiv 2207.12598)
    x0  = p x + q e           the estimate of the finished latents, for previews
    x   = a x + b e           the latents at the next noise level, in place, in float32
    in  = c_in x, twice       what the network reads next, in its own precision

Every sampler with one network call a step and no fresh noise has this form.  Euler and DDIM (eta = 0) go from sigma to sigma'
by x = x0 + sigma' (x - x0) / sigma, and c_in = 1 / sqrt(sigma'^2 + 1) (Karras et al. 2022, arXiv 2206.00364).  A network that
predicts the noise has p = 1, q = -sigma, hence a = 1, b = sigma' - sigma; one that predicts v has p = 1 / (sigma^2 + 1),
q = -sigma / sqrt(sigma^2 + 1).

The six numbers of a step are a row of a table on the device, chosen by a counter on the device: a CUDA graph of one step,
replayed, walks through all of them, without a word from the host.

Memory traffic.  Nothing to speak of: 4 x 64 x 64 latents are 64 kB.  What counts is the launch, about 2 us, in place of ten.
Work split.  A program takes 256 elements of one sample, the channel running fastest, as in the network's channels-last output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check, expect, jit, tl, view

COLUMNS = ("g", "a", "b", "c_in", "p", "q")


def coefficients(sigmas: Tensor, guidance_scale: float, predicts_v: bool = False) -> Tensor:
    """The table for Euler or DDIM (eta = 0) along falling noise levels (N + 1,): (N, 6), float32, made in float64."""
    sigma, following = sigmas.double()[:-1], sigmas.double()[1:]
    p, q = (1 / (sigma**2 + 1), -sigma / (sigma**2 + 1).sqrt()) if predicts_v else (torch.ones_like(sigma), -sigma)
    a = following / sigma + (1 - following / sigma) * p
    b = (1 - following / sigma) * q
    c_in = 1 / (following**2 + 1).sqrt()
    return torch.stack([torch.full_like(sigma, guidance_scale), a, b, c_in, p, q], dim=1).float()


def reference(
    x: Tensor, prediction: Tensor, table: Tensor, step: Tensor, model_input: Tensor, denoised: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The new x, model_input and, if asked for, denoised; changes nothing."""
    g, a, b, c_in, p, q = table[step].unbind(-1)
    wide = x if x.dtype == torch.float64 else x.float()
    e = prediction.to(wide.dtype)
    if len(prediction) == 2 * len(x):
        negative, positive = e.chunk(2)
        e = negative + g * (positive - negative)
    new = a * wide + b * e
    scaled = (c_in * new).repeat(len(model_input) // len(x), 1, 1, 1).to(model_input.dtype)
    return (new, scaled) if denoised is None else (new, scaled, p * wide + q * e)


SIZES = ["steps", "batch_size", "channels", "pixels"]
STRIDES = [f"{name}_{dim}" for name in ("x", "e", "in") for dim in ("batch", "channel", "pixel")]


@jit(do_not_specialize=SIZES + STRIDES)  # too little work for alignment to matter: one compilation for all
def guided_step_kernel(
    x, prediction, table, step, model_input, denoised, steps, batch_size, channels, pixels,
    x_batch, x_channel, x_pixel, e_batch, e_channel, e_pixel, in_batch, in_channel, in_pixel,
    GUIDED: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.load(step).to(tl.int32)
    # Beyond the table there are no steps: not a number, which is noticed, and not whatever lies there in memory.
    known = (row >= 0) & (row < steps)
    table += tl.where(known, row, 0) * 6
    g = tl.load(table + 0, mask=known, other=float("nan"))
    a = tl.load(table + 1, mask=known, other=float("nan"))
    b = tl.load(table + 2, mask=known, other=float("nan"))
    c_in = tl.load(table + 3, mask=known, other=float("nan"))

    sample = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < channels * pixels
    channel, pixel = element % channels, element // channels
    at_x = sample * x_batch + channel * x_channel + pixel * x_pixel
    old = tl.load(x + at_x, mask=mask, other=0.0)
    at_e = sample * e_batch + channel * e_channel + pixel * e_pixel
    e = tl.load(prediction + at_e, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        positive = tl.load(prediction + batch_size * e_batch + at_e, mask=mask, other=0.0).to(tl.float32)
        e += g * (positive - e)
    new = a * old + b * e
    tl.store(x + at_x, new, mask=mask)
    at_in = sample * in_batch + channel * in_channel + pixel * in_pixel
    for copy in tl.static_range(COPIES):
        scaled = (c_in * new).to(model_input.dtype.element_ty)
        tl.store(model_input + copy * batch_size * in_batch + at_in, scaled, mask=mask)
    if denoised is not None:
        p = tl.load(table + 4, mask=known, other=float("nan"))
        q = tl.load(table + 5, mask=known, other=float("nan"))
        tl.store(denoised + at_x, p * old + q * e, mask=mask)


def guided_step(
    x: Tensor, prediction: Tensor, table: Tensor, step: Tensor, model_input: Tensor, denoised: Tensor | None = None
) -> tuple[Tensor, ...]:
    """One step of the sampler, in place: (x, model_input) or (x, model_input, denoised), the arguments themselves.

    x (B, C, h, w), float32: the latents, replaced by those of the next noise level.
    prediction (2*B, C, h, w), negative prompts first, or (B, C, h, w) without guidance: the network's answer to model_input.
    table (N, 6), float32: see `coefficients`.  step: one int32 or int64, which row; whoever captures the graph counts it up.
    model_input (B or 2*B, C, h, w): written.  For a network with more input channels, hand in the slice of the first C.
    denoised, laid out like x: written if given.
    Any memory format whose pixels are evenly spaced.  ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None, None, None, None), dtypes=(torch.float32,))
    b, c, height, width = x.shape
    check("prediction", prediction, (None, c, height, width), like=x)
    check("model_input", model_input, (None, c, height, width), like=x)
    check("table", table, (None, len(COLUMNS)), like=x, dtypes=(torch.float32,))
    check("step", step, tuple(step.shape), like=x, dtypes=(torch.int32, torch.int64))
    expect(table.is_contiguous(), "table", "contiguous", table.stride())
    expect(step.numel() == 1, "step", "one element", tuple(step.shape))
    for name, tensor in (("prediction", prediction), ("model_input", model_input)):
        expect(len(tensor) in (b, 2 * b), name, f"a batch of {b} or {2 * b}", len(tensor))
    if denoised is not None:
        check("denoised", denoised, tuple(x.shape), like=x, dtypes=(torch.float32,))
        expect(denoised.stride() == x.stride(), "denoised", f"the strides of x {x.stride()}", denoised.stride())
    strides = [
        stride
        for name, tensor in (("x", x), ("prediction", prediction), ("model_input", model_input))
        for stride in view(name, tensor, (len(tensor), c, height * width), "evenly spaced pixels", dense=False).stride()
    ]
    grid = (-(-c * height * width // 256), b)
    guided_step_kernel[grid](
        x, prediction, table, step, model_input, denoised, len(table), b, c, height * width, *strides,
        GUIDED=len(prediction) == 2 * b, COPIES=len(model_input) // b, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return (x, model_input) if denoised is None else (x, model_input, denoised)


@dataclass(frozen=True)
class Shape:
    label: str
    batch: int
    size: int
    guided: bool = True


SHAPES = [
    Shape("SD 1.5 64x64", 1, 64),
    Shape("SD 1.5 64x64, no guidance", 1, 64, guided=False),
    Shape("SD 2.1 96x96", 1, 96),
    Shape("SDXL 128x128", 1, 128),
    Shape("SDXL 128x128, 8 pictures", 8, 128),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    copies = 2 if shape.guided else 1

    def randn(batch: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(batch, 4, shape.size, shape.size, device=device, dtype=dtype)

    def unet(batch: int) -> Tensor:
        return randn(batch, dtype).to(memory_format=torch.channels_last)

    return {
        "x": randn(shape.batch, torch.float32),
        "prediction": unet(copies * shape.batch),
        "table": coefficients(torch.linspace(14.6, 0, 21), 7.5).to(device),
        "step": torch.zeros(1, device=device, dtype=torch.int64),
        "model_input": unet(copies * shape.batch),
    }


def traffic(shape: Shape, element_size: int) -> int:
    copies = 2 if shape.guided else 1
    return 4 * shape.batch * shape.size**2 * (8 + 2 * copies * element_size)


def flops(shape: Shape) -> int:
    return 7 * 4 * shape.batch * shape.size**2


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}

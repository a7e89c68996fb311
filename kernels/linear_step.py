"""Guidance and one step of any linear sampler in one kernel, which also writes the network's next input.

    e   = pred_0 + sum_k w_k (pred_k - pred_0)     guidance: how the predictions of the prompts, the roles, are mixed
    x_0 = p asked + q e                            the estimate of the finished latents, which goes to a row of the history
    x_0 = known, where a mask is not above 1/2     of a picture that is only painted in part
    asked = sum_r c_r history_r                    the latents that the network is asked about next, in float32
    in  = c_in asked, in every copy                what it reads of them, in its own precision

With the roles negative and positive and w_1 = g, e is classifier-free guidance, u + g (c - u) (Ho and Salimans 2022, arXiv
2207.12598).  The rest is every sampler that only adds and scales.  Its history holds the starting latents, all the noise that it
will add, and one estimate for each call of the network; whatever it asks about is a sum of these, whose coefficients depend on
the noise levels alone.  So a sampler with one call a step or two, with the estimates of earlier steps or with fresh noise, is a
table of numbers, found by running it on unit vectors in place of latents, and needs no kernel of its own.  Euler from sigma to
sigma', as an example, is x = (sigma' / sigma) x + (1 - sigma' / sigma) x_0, which unrolled makes a row of start and estimates.

p and q follow from what the network predicts, with t = sigma^2 + s^2, s being the deviation of the data:

    epsilon, the noise                                     p = 1          q = -sigma
    v (Salimans and Ho 2022, arXiv 2202.00512)             p = s^2 / t    q = -sigma s / sqrt(t)
    EDM's F (Karras et al. 2022, arXiv 2206.00364)         p = s^2 / t    q = +sigma s / sqrt(t)

The numbers of a call are a row of a table on the device, chosen by a counter on the device: a CUDA graph of one call, replayed,
walks through all of them, without a word from the host.

Memory traffic.  Little: 4 x 64 x 64 latents are 64 kB, and 60 rows of them 4 MB, 1 us at 4.2 TB/s.  A row whose coefficient is 0
is not read at all, so it may hold anything, and the estimates that are still to come need no zeros.  What counts is the launch,
about 2 us, in place of twenty.
Work split.  A program takes 256 elements of one sample, the channel running fastest, as in the network's channels-last output,
and 8 rows of the history at a time, whose reads are under way together.  The row just written comes from registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check, expect, jit, launcher, tl, view

COLUMNS = ("row", "p", "q", "c_in")  # of the table; one coefficient for each row of the history comes after them


def prediction_coefficients(prediction: str, sigmas: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """p and q at these noise levels, float64, for a network that predicts "epsilon", "v" or "edm"."""
    expect(prediction in ("epsilon", "v", "edm"), "prediction", "epsilon, v or edm", prediction)
    sigma = sigmas.double()
    if prediction == "epsilon":
        return torch.ones_like(sigma), -sigma
    total = sigma**2 + sigma_data**2
    q = sigma * sigma_data / total.sqrt()
    return sigma_data**2 / total, q if prediction == "edm" else -q


def call_table(rows: Tensor, p: Tensor, q: Tensor, c_in: Tensor, coefficients: Tensor) -> Tensor:
    """The table of N calls, (N, 4 + R), float32.

    rows (N,): which row of the history a call's estimate goes to.  p, q (N,): see `prediction_coefficients`.
    coefficients (N, R): what makes the latents that are asked about next, and c_in (N,) what scales them for the network.
    """
    return torch.cat([torch.stack([rows.double(), p, q, c_in], dim=1), coefficients], dim=1).float()


def reference(
    history: Tensor, asked: Tensor, prediction: Tensor, weights: Tensor, table: Tensor, call: Tensor, model_input: Tensor,
    known: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The new history, asked and model_input; changes nothing."""
    numbers, mix = (x.index_select(0, call.reshape(1))[0] for x in (table, weights))
    (row, p, q, c_in), coefficients = numbers[:4], numbers[4:, None, None, None, None]
    wide = asked if asked.dtype == torch.float64 else asked.float()
    first, *others = prediction.to(wide.dtype).chunk(len(mix))
    e = first
    for weight, other in zip(mix[1:, :, None, None, None], others, strict=True):
        e = e + weight * (other - first)
    estimate = p * wide + q * e
    if known is not None and mask is not None:
        estimate = torch.where(mask > 0.5, estimate, known)
    here = torch.arange(len(history), device=history.device) == row
    history = torch.where(here[:, None, None, None, None], estimate, history)
    new = torch.where(coefficients != 0, coefficients * history, 0).sum(dim=0)  # 0 times what is not a number is not 0
    return history, new, (c_in * new).repeat(len(model_input) // len(new), 1, 1, 1).to(model_input.dtype)


SIZES = ["calls", "rows", "roles", "copies", "batch_size", "channels", "pixels"]
STRIDES = ["h_row"] + [f"{name}_{dim}" for name in ("h", "x", "e", "in", "k", "m") for dim in ("batch", "channel", "pixel")]


@jit(do_not_specialize=SIZES + STRIDES)  # too little work for alignment to matter: one compilation for all
def linear_step_kernel(
    history, asked, prediction, weights, table, call, model_input, known, mask,
    calls, rows, roles, copies, batch_size, channels, pixels,
    h_row, h_batch, h_channel, h_pixel, x_batch, x_channel, x_pixel, e_batch, e_channel, e_pixel,
    in_batch, in_channel, in_pixel, k_batch, k_channel, k_pixel, m_batch, m_channel, m_pixel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.load(call)
    inside = (index >= 0) & (index < calls)
    index = tl.where(inside, index, 0).to(tl.int32)
    table += index * (4 + rows)
    row = tl.load(table).to(tl.int32)
    # Beyond the table there are no calls, nor rows beyond the history: the result is not a number, which is noticed, and not
    # whatever lies there in memory; and nothing is written there.
    inside = inside & (row >= 0) & (row < rows)
    row = tl.where(inside, row, 0)
    p = tl.load(table + 1, mask=inside, other=float("nan"))
    q = tl.load(table + 2, mask=inside, other=float("nan"))
    c_in = tl.load(table + 3, mask=inside, other=float("nan"))
    table += 4
    own = tl.load(table + row, mask=inside, other=float("nan"))

    sample = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = element < channels * pixels
    channel, pixel = element % channels, element // channels

    at_e = channel * e_channel + pixel * e_pixel
    first = tl.load(prediction + sample * e_batch + at_e, mask=valid, other=0.0).to(tl.float32)
    e = first
    for role in range(1, roles):
        at_role = (role * batch_size + sample) * e_batch + at_e
        other = tl.load(prediction + at_role, mask=valid, other=0.0).to(tl.float32)
        e += tl.load(weights + (index * roles + role) * batch_size + sample) * (other - first)

    at_x = sample * x_batch + channel * x_channel + pixel * x_pixel
    estimate = p * tl.load(asked + at_x, mask=valid, other=0.0) + q * e
    if known is not None:
        wanted = tl.load(mask + sample * m_batch + channel * m_channel + pixel * m_pixel, mask=valid, other=0.0)
        given = tl.load(known + sample * k_batch + channel * k_channel + pixel * k_pixel, mask=valid, other=0.0)
        estimate = tl.where(wanted > 0.5, estimate, given)
    history += sample * h_batch + channel * h_channel + pixel * h_pixel
    tl.store(history + row.to(tl.int64) * h_row, estimate, mask=element < tl.where(inside, channels * pixels, 0))

    new = tl.where(own != 0.0, own * estimate, 0.0)
    for start in range(0, tl.where(inside, rows, 0), ROWS):
        each = start + tl.arange(0, ROWS)
        coefficient = tl.load(table + each, mask=(each < rows) & (each != row), other=0.0)
        used = (coefficient != 0.0)[:, None] & valid[None, :]
        vectors = tl.load(history[None, :] + each.to(tl.int64)[:, None] * h_row, mask=used, other=0.0)
        new += tl.sum(coefficient[:, None] * vectors, axis=0)
    tl.store(asked + at_x, new, mask=valid)
    scaled = (c_in * new).to(model_input.dtype.element_ty)
    for copy in range(copies):
        at_in = (copy * batch_size + sample) * in_batch + channel * in_channel + pixel * in_pixel
        tl.store(model_input + at_in, scaled, mask=valid)


@launcher
def linear_step(
    history: Tensor, asked: Tensor, prediction: Tensor, weights: Tensor, table: Tensor, call: Tensor, model_input: Tensor,
    known: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What follows a call of the network, in place: (history, asked, model_input), the arguments themselves.

    history (R, B, C, h, w), float32: all that the sampler combines.  Row 0 is where it starts, others are noise, filled before,
    and estimates, of which this call writes one.  Rows that are not written yet may hold anything.
    asked (B, C, h, w), float32: the latents that the network was asked about, replaced by those it is asked about next.
    prediction (K*B, C, h, w), the samples of one role after those of another: the network's answer to model_input.
    weights (N, K, B), float32: how much of each role a call takes; they sum to 1, and that of role 0 is never read.
    table (N, 4 + R), float32: see `call_table`.  call: one int32 or int64, which row of table and weights; whoever captures the
    graph counts it up.  Beyond the table asked and model_input are not numbers, and the history stays.
    model_input (a multiple of B, C, h, w): written.  For a network with more input channels, hand in the slice of the first C.
    known (B or 1, C, h, w) and mask (B or 1, 1, h, w), float32, both or neither: where the mask is not above 1/2, the estimate
    is what is known.
    Any memory format whose pixels are evenly spaced.  ValueError for other shapes, dtypes, strides or devices.
    """
    check("history", history, (None,) * 5, dtypes=(torch.float32,))
    rows, b, c, height, width = history.shape
    check("asked", asked, (b, c, height, width), like=history, dtypes=(torch.float32,))
    check("prediction", prediction, (None, c, height, width), like=history)
    check("model_input", model_input, (None, c, height, width), like=history)
    for name, tensor in (("prediction", prediction), ("model_input", model_input)):
        expect(len(tensor) % b == 0, name, f"a batch that is a multiple of {b}", len(tensor))
    roles, copies = len(prediction) // b, len(model_input) // b
    check("table", table, (None, len(COLUMNS) + rows), like=history, dtypes=(torch.float32,))
    check("weights", weights, (len(table), roles, b), like=history, dtypes=(torch.float32,))
    for name, tensor in (("table", table), ("weights", weights)):
        expect(tensor.is_contiguous(), name, "contiguous", tensor.stride())
    check("call", call, tuple(call.shape), like=history, dtypes=(torch.int32, torch.int64))
    expect(call.numel() == 1, "call", "one element", tuple(call.shape))
    expect((known is None) == (mask is None), "known and mask", "both or neither", "one of them")
    maps = [("asked", asked), ("prediction", prediction), ("model_input", model_input)]
    for name, given, depth in (("known", known, c), ("mask", mask, 1)):
        if given is not None:
            check(name, given, (None, depth, height, width), like=history, dtypes=(torch.float32,))
            expect(len(given) in (1, b), name, f"a batch of 1 or {b}", len(given))
            maps.append((name, given.expand(b, c, height, width)))
    pixels, wanted = height * width, "evenly spaced pixels"
    strides = [*view("history", history, (rows, b, c, pixels), wanted, dense=False).stride()]
    for name, tensor in maps:
        strides += view(name, tensor, (len(tensor), c, pixels), wanted, dense=False).stride()
    strides += [0] * (len(STRIDES) - len(strides))  # of what is not given
    linear_step_kernel[(-(-c * pixels // 256), b)](
        history, asked, prediction, weights, table, call, model_input, known, mask,
        len(table), rows, roles, copies, b, c, pixels, *strides, ROWS=8, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return history, asked, model_input


@dataclass(frozen=True)
class Shape:
    label: str
    batch: int
    size: int
    rows: int = 21  # of the history: Euler's 20 steps have a start and 20 estimates
    roles: int = 2
    masked: bool = False


SHAPES = [
    Shape("SD 1.5 64x64", 1, 64),
    Shape("SD 1.5 64x64, no guidance", 1, 64, roles=1),
    Shape("SD 1.5 64x64, three prompts", 1, 64, roles=3),
    Shape("SD 1.5 64x64, two calls a step and noise", 1, 64, rows=60),  # 20 steps: a start, 39 estimates, 20 times noise
    Shape("SD 1.5 64x64, masked", 1, 64, masked=True),
    Shape("SD 2.1 96x96", 1, 96),
    Shape("SDXL 128x128", 1, 128),
    Shape("SDXL 128x128, 8 pictures", 8, 128),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """A call near the end of a walk, when the sampler combines all of its history."""

    def randn(batch: int, channels: int = 4) -> Tensor:
        return torch.randn(batch, channels, shape.size, shape.size, device=device)

    def unet() -> Tensor:
        return randn(shape.roles * shape.batch).to(dtype).to(memory_format=torch.channels_last)

    calls = shape.rows - 1
    sigmas = torch.linspace(14.6, 0.1, calls, dtype=torch.float64)
    p, q = prediction_coefficients("epsilon", sigmas, 1.0)
    coefficients = torch.randn(calls, shape.rows, dtype=torch.float64) * shape.rows**-0.5
    table = call_table(1 + torch.arange(calls), p, q, (sigmas**2 + 1).rsqrt(), coefficients)
    others = torch.full((calls, shape.roles - 1, shape.batch), 7.5)
    arguments = {
        "history": torch.stack([randn(shape.batch) for _ in range(shape.rows)]),
        "asked": randn(shape.batch),
        "prediction": unet(),
        "weights": torch.cat([1 - others.sum(dim=1, keepdim=True), others], dim=1).to(device),
        "table": table.to(device),
        "call": torch.full((1,), calls - 1, device=device),
        "model_input": unet(),
    }
    return arguments | ({"known": randn(shape.batch), "mask": randn(1, 1)} if shape.masked else {})


def traffic(shape: Shape, element_size: int) -> int:
    """Where no coefficient is 0, as late in a walk: every row of the history but the new one is read, and that one written.

    Besides, asked is read and written, every role's prediction read and its input written, known and mask read.
    """
    floats = 4 * shape.batch * (shape.rows + 2) + (4 * shape.batch + 1 if shape.masked else 0)
    return shape.size**2 * (4 * floats + 2 * shape.roles * 4 * shape.batch * element_size)


def flops(shape: Shape) -> int:
    return (3 * (shape.roles - 1) + 3 + 2 * shape.rows + 1) * 4 * shape.batch * shape.size**2


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}

"""A linear layer and GEGLU on its result in one kernel: the wide intermediate never reaches memory.

    y = (x Wv^T + bv) * gelu(x Wg^T + bg),     x (M, K), weight [Wv; Wg] (2N, K), bias [bv; bg] (2N,) -> y (M, N)

Memory traffic.  Compute-bound: 4 M N K operations; the floor is that over the matrix rate.  (2048, 1280) -> 5120, as 60 times
in a step of SDXL: 53.7 GFLOP, 73 us at 740 TFLOP/s.  Fusing saves the way of the intermediate's 2 M N elements to memory and
back (42 MB each way in that case: 20 us at 4.2 TB/s), so it pays as long as the GEMM keeps 80 % of cuBLAS's speed.

Work split.  A program makes a BLOCK_M x BLOCK_N tile of y and holds two accumulators for it, value and gate, whose operands are
rows n and N + n of the weight; the tile of x is used for both, so 128 x 128 costs the shared-memory reads of a 128 x 256 GEMM.
Tiles come through Hopper's copy engine (tensor descriptors, made on the host; out of bounds they read zeros).  Programs walk
down GROUP_M tiles of x before they move on to the next weights, so that both stay in L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import capability, check, check_vector, descriptor, expect, jit, launcher, rows_of, tl
from .geglu import gated, geglu, gelu

GROUP_M = 8


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int  # tiles of x and of the weight on their way at once


TALL = Tile(128, 128, 64, 8, 3)
LOW = Tile(64, 128, 64, 4, 4)
LATER = Tile(128, 64, 32, 8, 3)  # on GPUs after Hopper: what fits all of them
SINGLE = Tile(64, 64, 32, 4, 3)  # float32


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return gated(F.linear(x, weight, bias))


@jit(do_not_specialize=["m"])
def linear_geglu_kernel(
    x, weight, bias, y, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    at_m = (group * GROUP_M + within % height) * BLOCK_M
    at_n = within // height * BLOCK_N

    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at_k in range(0, k, BLOCK_K):
        tile = x.load([at_m, at_k])
        value = tl.dot(tile, weight.load([at_n, at_k]).T, value, input_precision=PRECISION)
        gate = tl.dot(tile, weight.load([n + at_n, at_k]).T, gate, input_precision=PRECISION)

    rows, columns = at_m + tl.arange(0, BLOCK_M), at_n + tl.arange(0, BLOCK_N)
    if bias is not None:
        value += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + n + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    out = y + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out, (value * gelu(gate)).to(y.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@launcher
def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """geglu(linear(x)): x (..., K), weight (2*N, K), bias (2*N,) -> (..., N), contiguous; sums and activation in float32.

    The copy engine wants rows that start at multiples of 16 bytes.  tile: by default one that fits the shape.
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None,) * x.dim())
    k = x.shape[-1]
    check("weight", weight, (None, k), like=x, dtypes=(x.dtype,))
    expect(weight.shape[0] % 2 == 0, "weight", "an even number of rows", tuple(weight.shape))
    expect(weight.is_contiguous(), "weight", "contiguous", f"strides {weight.stride()}")
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], like=x)
    (m, x_row), n = rows_of("x", x), weight.shape[0] // 2
    for name, tensor, row in (("x", x, x_row), ("weight", weight, k)):
        aligned = row * x.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
        expect(aligned, name, "rows that start at multiples of 16 bytes", f"{row} elements apart, at {tensor.data_ptr() % 16}")

    half = x.element_size() == 2
    if tile is None:
        # The large layers make 640 or 1280 tiles of 128x128 for 132 SMs; where there are fewer, half as tall ones fit better.
        hopper = TALL if m * n >= 640 * TALL.m * TALL.n else LOW
        tile = SINGLE if not half else hopper if capability(x) == 90 else LATER
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=x.dtype)
    rows_x = descriptor(x, (m, k), (x_row, 1), (tile.m, tile.k))
    rows_w = descriptor(weight, (2 * n, k), (k, 1), (tile.n, tile.k))
    grid = (-(-m // tile.m) * -(-n // tile.n),)
    linear_geglu_kernel[grid](
        rows_x, rows_w, bias, y, m, n, k,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=GROUP_M, PRECISION="tf32" if half else "ieee",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@dataclass(frozen=True)
class Shape:
    label: str
    m: int
    k: int
    n: int


SHAPES = [
    Shape("SD 1.5 320->1280@64x64", 2 * 64 * 64, 320, 1280),
    Shape("SD 1.5 640->2560@32x32", 2 * 32 * 32, 640, 2560),
    Shape("SD 1.5 1280->5120@16x16", 2 * 16 * 16, 1280, 5120),
    Shape("SD 2.1 320->1280@96x96", 2 * 96 * 96, 320, 1280),
    Shape("SDXL 640->2560@64x64", 2 * 64 * 64, 640, 2560),
    Shape("SDXL 1280->5120@32x32", 2 * 32 * 32, 1280, 5120),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    return {"x": randn(shape.m, shape.k), "weight": randn(2 * shape.n, shape.k) * shape.k**-0.5, "bias": randn(2 * shape.n)}


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing in half precision."""
    sizes = [(128, 128, 64, 8), (128, 64, 64, 4), (128, 64, 64, 8), (64, 128, 64, 4), (256, 64, 64, 8)]
    return [Tile(*size, stages) for size in sizes for stages in (3, 4)]


def traffic(shape: Shape, element_size: int) -> int:
    return (shape.m * shape.k + 2 * shape.n * shape.k + shape.m * shape.n) * element_size


def flops(shape: Shape) -> int:
    return 4 * shape.m * shape.n * shape.k


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    return {"PyTorch": lambda: reference(x, weight, bias), "linear, then geglu.py": partial(linear_then_geglu, x, weight, bias)}


def linear_then_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return geglu(F.linear(x, weight, bias))

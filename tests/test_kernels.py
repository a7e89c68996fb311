"""Every kernel against its reference in float64: over the channels, groups and heads of the real models, and hostile shapes.

Without a GPU they run in Triton's interpreter, at reduced height, width and length.  With one the same tests are marked `gpu`
and run natively (`pytest -m gpu`); so do those at full size and in CUDA graphs.

The measure: relative L2 error against float64 on the same inputs, at most FACTOR times that of PyTorch's own operation in the
same dtype.  Where PyTorch is exact or nearly so the bound is FLOOR: rounding a result to half precision alone costs about
eps / 5; in float32 the arithmetic is no more precise than the result, and its dozen roundings come to one or two eps.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor

from minisd import kernels
from minisd.kernels import checks
from minisd.kernels.attention import SMALLER, TILES
from minisd.kernels.float8 import E4M3
from minisd.kernels.group_norm import TILE, Tile, chunk_moments
from minisd.kernels.upsample_conv import phase_weights, plain, whole_weights

DEVICE = "cpu" if checks.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = {dtype: torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 0.25) for dtype in DTYPES}
FLOOR[E4M3] = 2e-3  # one number in a thousand lies so near the middle of two that the last digit decides

# A GPU's own operations sum in another order than a CPU's, by which the bounds were chosen: no GPU was there to choose them by.
FACTOR = 1.1 if checks.INTERPRETED else 1.5

# NumPy warns where a GPU does not: of inf and NaN, which some tests make on purpose.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] if checks.INTERPRETED else [pytest.mark.gpu]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers for every test; memory that is not written shows as NaN; a truthful interpreter."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        x = empty(*size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    if checks.INTERPRETED:
        from interpreter import repair

        repair(monkeypatch)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in arguments.items()}


def compare(name: str, arguments: dict[str, Any], factor: float = FACTOR, **more: Any) -> tuple[Tensor, ...]:
    """The kernel's outputs, after holding them against float64 and against PyTorch in their own dtype; more: for it alone."""
    module = kernels.KERNELS[name]
    wanted = outputs(module.reference(**double(arguments)))
    theirs = outputs(module.library(**arguments)["PyTorch"]())
    ours = outputs(getattr(kernels, name)(**arguments, **more))
    for found, other, true in zip(ours, theirs, wanted, strict=True):
        assert found.shape == true.shape
        assert found.dtype == other.dtype
        bound = max(factor * relative_error(other, true), FLOOR[found.dtype]) if true.any() else 0.0
        error = relative_error(found, true) if true.any() else float(found.double().norm())
        assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"
    return ours


def rand(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rand(*size, dtype=dtype).to(memory_format=torch.channels_last)


# --- group_norm -----------------------------------------------------------------------------------------------------------


def group_norm_arguments(x: Tensor, groups: int = 32, skip: Tensor | None = None, **options: Any) -> dict[str, Any]:
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    weight, bias = 1 + rand(channels, dtype=x.dtype) / 4, rand(channels, dtype=x.dtype) / 4
    return {"x": x, "groups": groups, "weight": weight, "bias": bias, "eps": 1e-5, "skip": skip} | options


in_one_or_two = pytest.mark.parametrize("tile", [None, TILE], ids=["one launch", "two launches"])


@each_dtype
@in_one_or_two
@pytest.mark.parametrize("channels", [128, 256, 320, 512, 640, 960, 1280])
def test_group_norm_real_widths(channels, tile, dtype):
    x = image(2, channels, 5, 3, dtype=dtype)
    y = compare("group_norm", group_norm_arguments(x, silu=channels != 512), tile=tile)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)


@each_dtype
@in_one_or_two
@pytest.mark.parametrize(("channels", "skip"), [(320, 320), (640, 320), (1280, 640), (1280, 1280)])
def test_group_norm_over_a_skip_connection(channels, skip, tile, dtype):
    """Of 1280 + 640 channels a group is 60 wide, and the twenty-second holds 20 of the first and 40 of the second."""
    skip = image(2, skip, 3, 4, dtype=dtype) * 3 + 1
    compare("group_norm", group_norm_arguments(image(2, channels, 3, 4, dtype=dtype), skip=skip, silu=True), tile=tile)


@each_dtype
@in_one_or_two
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "groups"),
    [
        (1, 32, 1, 1, 32),
        (16, 32, 1, 3, 8),
        (1, 64, 9, 7, 32),
        (2, 6, 5, 3, 2),
        (1, 7, 11, 1, 7),
        (1, 7, 3, 3, 1),
        (1, 480, 2, 3, 3),
    ],
)
def test_group_norm_odd_shapes(batch, channels, height, width, groups, tile, dtype):
    if channels // groups * height * width == 1:
        # PyTorch refuses a group of one value; what remains of it is the bias.
        arguments = group_norm_arguments(image(batch, channels, height, width, dtype=dtype), groups)
        y = kernels.group_norm(**arguments, tile=tile)
        assert torch.equal(y.flatten(), arguments["bias"])
        return
    x = image(batch, channels, height, width, dtype=dtype)
    compare("group_norm", group_norm_arguments(x, groups, silu=True), tile=tile)


@each_dtype
def test_group_norm_of_many_chunks(dtype):
    """2100 pixels of 64 channels: 66 chunks, the last of them short; the apply kernel merges 64 at a time."""
    compare("group_norm", group_norm_arguments(image(1, 64, 70, 30, dtype=dtype) + 2, silu=True))


@each_dtype
@in_one_or_two
def test_group_norm_with_shift(tile, dtype):
    x, shift = image(2, 320, 4, 5, dtype=dtype), rand(2, 320, dtype=dtype) * 2
    compare("group_norm", group_norm_arguments(x, shift=shift, silu=True), tile=tile)
    compare("group_norm", group_norm_arguments(x, shift=shift[:1].expand(2, -1)), tile=tile)
    slices = {"shift": rand(2, 900, dtype=dtype)[:, 16:336], "skip": image(2, 64, 4, 5, dtype=dtype)}
    compare("group_norm", group_norm_arguments(x, **slices), tile=tile)


@each_dtype
@in_one_or_two
@pytest.mark.parametrize(("mean", "deviation"), [(1000, 1), (1, 1e-3), (-30, 1e-2), (0, 1e4), (0, 1e-4)])
def test_group_norm_hostile_values(mean, deviation, tile, dtype):
    x = (torch.randn(2, 64, 12, 9, device=DEVICE) * deviation + mean).to(dtype).to(memory_format=torch.channels_last)
    compare("group_norm", group_norm_arguments(x, silu=True), tile=tile)


def test_group_norm_with_a_first_pixel_far_off():
    x = image(1, 64, 16, 16)
    x[:, :, 0, 0] = 1e4
    compare("group_norm", group_norm_arguments(x))


def test_group_norm_of_a_constant_is_the_bias():
    x = torch.full((1, 64, 6, 6), 7.25, device=DEVICE).to(memory_format=torch.channels_last)
    arguments = group_norm_arguments(x)
    assert torch.equal(kernels.group_norm(**arguments)[0, :, 3, 3], arguments["bias"])


@each_dtype
def test_group_norm_of_slices(dtype):
    whole = image(5, 160, 6, 4, dtype=dtype)
    compare("group_norm", group_norm_arguments(whole[1::2, 32:96], silu=True))
    compare("group_norm", group_norm_arguments(whole[1:3, :64], skip=whole[2:4, 64:160]))


# --- layer_norm -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("channels", [320, 640, 768, 1024, 1280, 1536, 1, 33, 5000])
@pytest.mark.parametrize("rows", [(1,), (2, 7)])
def test_layer_norm(rows, channels, dtype):
    x = rand(*rows, channels, dtype=dtype)
    norm = {"weight": 1 + rand(channels, dtype=dtype) / 4, "bias": rand(channels, dtype=dtype), "eps": 1e-5}
    compare("layer_norm", {"x": x, **norm})
    compare("layer_norm", {"x": x, "shift": rand(channels, dtype=dtype), **norm})
    compare("layer_norm", {"x": x, "shift": rand(channels), **norm})  # as a sum of biases is


@each_dtype
@pytest.mark.parametrize(("mean", "deviation"), [(1000, 1), (1, 1e-3), (0, 1e4)])
def test_layer_norm_hostile_values(mean, deviation, dtype):
    x = (torch.randn(5, 320, device=DEVICE) * deviation + mean).to(dtype)
    compare("layer_norm", {"x": x, "weight": rand(320, dtype=dtype), "bias": rand(320, dtype=dtype), "eps": 1e-5})


def test_layer_norm_of_slices():
    x = rand(16, 4, 96)
    norm = {"weight": rand(64), "bias": rand(64), "eps": 1e-5}
    compare("layer_norm", {"x": x[:, 1, 16:80], **norm})
    compare("layer_norm", {"x": x[:, 1, :64], "shift": rand(64), **norm})


def in_float8(name: str, arguments: dict[str, Any]) -> None:
    """As the reference, and by e4m3 itself: three bits behind the point, down to 2^-9, and the largest of a row at 448."""
    true = kernels.KERNELS[name].reference(**double(arguments))  # before the kernel writes to any of them
    values, scale = compare(name, arguments | {"float8": True})
    apart, scale = (values.double() * scale - true).abs(), scale.double()
    assert (apart <= torch.maximum(true.abs() * (2**-4 + 1e-4), scale * (2**-10 + 1e-4))).all()
    assert (values.float().abs().amax(-1) == 448).all()


@each_dtype
@pytest.mark.parametrize("channels", [1, 33, 320, 1280, 5000])
def test_layer_norm_in_float8(channels, dtype):
    norm = {"weight": 1 + rand(channels, dtype=dtype) / 4, "bias": rand(channels, dtype=dtype), "eps": 1e-5}
    in_float8("layer_norm", {"x": rand(2, 7, channels, dtype=dtype), **norm})
    in_float8("layer_norm", {"x": rand(9, channels + 5, dtype=dtype)[:, :channels], "shift": rand(channels), **norm})


@each_dtype
@pytest.mark.parametrize("channels", [1, 33, 320, 1280, 5000])
@pytest.mark.parametrize("made", [torch.bfloat16, None], ids=["of a product in float8", "of the stream's dtype"])
def test_layer_norm_of_a_stream_that_is_added_to(channels, dtype, made):
    """x + addend takes the place of x, rounded once, and nothing beside it changes."""
    norm = {"weight": 1 + rand(channels, dtype=dtype) / 4, "bias": rand(channels, dtype=dtype), "eps": 1e-5}
    around, more = rand(9, channels + 5, dtype=dtype), rand(9, channels + 3, dtype=made or dtype)
    before, x, addend = around.clone(), around[:, :channels], more[:, 3:]
    wanted = (x.float() + addend.float()).to(dtype)
    compare("layer_norm", {"x": x, "addend": addend, "shift": rand(channels), **norm})
    assert torch.equal(x, wanted)
    assert torch.equal(around[:, channels:], before[:, channels:])
    x, addend = ((part * 8).round() / 8 for part in (before[:, :channels], addend))  # whose sum no dtype rounds
    in_float8("layer_norm", {"x": x, "addend": addend, **norm})


# --- geglu and linear_geglu -----------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 74), (2, 9, 2560), (33, 600)])
def test_geglu(shape, dtype):
    compare("geglu", {"x": rand(*shape, dtype=dtype)})
    compare("geglu", {"x": rand(*shape, dtype=dtype) * 100})
    compare("geglu", {"x": rand(shape[0], shape[-1] + 8, dtype=dtype)[:, : shape[-1]]})


@each_dtype
def test_geglu_in_float8(dtype):
    for shape in ((1, 2), (3, 5, 74), (2, 9, 2560)):
        in_float8("geglu", {"x": rand(*shape, dtype=dtype)})
    in_float8("geglu", {"x": rand(33, 608, dtype=dtype)[:, :600] * 100})
    values, scale = kernels.geglu(torch.zeros(2, 64, device=DEVICE), float8=True)
    assert not (values.float() * scale).any()


@each_dtype
@pytest.mark.parametrize(("rows", "k", "n"), [((1,), 8, 4), ((2, 35), 72, 136), ((130,), 320, 64), ((9,), 640, 40)])
def test_linear_geglu(rows, k, n, dtype):
    arguments = {"x": rand(*rows, k, dtype=dtype), "weight": rand(2 * n, k, dtype=dtype) * k**-0.5}
    compare("linear_geglu", arguments | {"bias": rand(2 * n, dtype=dtype)})
    compare("linear_geglu", arguments | {"bias": None, "x": rand(rows[0], 2 * k, dtype=dtype)[:, k:]})


# --- rows and weights in float8 -------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("channels", [1, 33, 320, 1280, 5000])
def test_rows_are_quantised(channels, dtype):
    for x in (rand(2, 7, channels, dtype=dtype) * 30, rand(9, channels + 5, dtype=dtype)[:, :channels]):
        values, scale = compare("quantise_rows", {"x": x})
        assert (values.dtype, scale.dtype) == (E4M3, torch.float32)
        assert values.float().abs().amax() == 448
    values, scale = kernels.quantise_rows(torch.zeros(2, 64, device=DEVICE, dtype=dtype))
    assert not values.float().any()


@each_dtype
def test_every_float8_number_is_dequantised(dtype):
    """To the last bit, those below the smallest power of two as well."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).to(DEVICE)
    numbers = every[~every.float().isnan()].view(2, 127)
    scale = torch.tensor([1.0, 3.7e-3], device=DEVICE)
    assert torch.equal(kernels.dequantise(numbers, scale, dtype), (numbers.float() * scale[:, None]).to(dtype))


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (32, 48, 3, 3), (6, 40, 1, 1)])
def test_weights_are_dequantised_where_they_lie(shape, dtype):
    scale = torch.rand(shape[0], device=DEVICE)
    for layout in (image, rand) if len(shape) == 4 else (rand,):
        weight = (layout(*shape) * 100).to(E4M3)
        (found,) = compare("dequantise", {"weight": weight, "scale": scale, "dtype": dtype})
        assert found.stride() == weight.stride()


# --- attention ------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 128, 160, 512])
@pytest.mark.parametrize("keys", [1, 77, 130])
def test_attention(dim, keys, dtype):
    q, (k, v) = rand(1, 2, 35, dim, dtype=dtype), rand(2, 1, 2, keys, dim, dtype=dtype)
    out = compare("attention", {"q": q, "k": k, "v": v})[0]
    assert out.transpose(1, 2).is_contiguous()


@each_dtype
@pytest.mark.parametrize("dim", [40, 80])
def test_attention_over_a_fused_projection(dim, dtype):
    """Views of (B, L, 3*H*D): what lies beyond a head is the next head, and beyond the last key the next sample."""
    q, k, v = rand(2, 67, 3, 3, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    v[1] *= 1000
    compare("attention", {"q": q[:1], "k": k[:1], "v": v[:1]})
    compare("attention", {"q": q, "k": k, "v": v})


@each_dtype
@pytest.mark.parametrize("keys", [1, 16, 77, 128, 129])
def test_attention_of_few_keys_is_one_tile(keys, dtype):
    """Of 40 channels; queries in two tiles, and what lies beyond the keys is the next prompt's."""
    q, prompt = rand(2, 70, 2, 40, dtype=dtype), rand(2, keys, 2, 2, 40, dtype=dtype)
    prompt[1] *= 100
    k, v = prompt.permute(2, 0, 3, 1, 4).unbind(0)
    compare("attention", {"q": q.transpose(1, 2), "k": k, "v": v})


@each_dtype
def test_attention_hostile_values(dtype):
    q, k, v = rand(3, 1, 2, 20, 40, dtype=dtype)
    k, v = (torch.cat([x] * 15, dim=2) for x in (k, v))  # 300 keys: three blocks
    hot = rand(1, 2, 200, 40, dtype=dtype) * 30  # all but one-hot: the error is that of a few rows, so there are many
    compare("attention", {"q": hot, "k": k, "v": v})
    ramp = torch.linspace(0, 3, 300, device=DEVICE).to(dtype)[:, None]
    compare("attention", {"q": q.abs(), "k": k.abs() * ramp, "v": v})  # the maximum grows from block to block
    compare("attention", {"q": q, "k": k, "v": v * 1000})
    compare("attention", {"q": q * 0, "k": k, "v": v})


def test_attention_of_one_query_and_sixteen_samples():
    compare("attention", {"q": rand(16, 1, 1, 64), "k": rand(16, 1, 5, 64), "v": rand(16, 1, 5, 64)})


def test_attention_scale():
    q, k, v = rand(3, 1, 2, 9, 40)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert relative_error(kernels.attention(q, k, v, scale=0.5), wanted) < 1e-6


def test_attention_keeps_samples_apart():
    """A NaN in one sample, past the end of the other's keys, stays there."""
    q, k, v = rand(3, 2, 1, 21, 40)
    v[1], k[1] = float("nan"), float("nan")
    out = kernels.attention(q, k, v)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_attention_has_a_block_size_for_every_head_dimension():
    for tiles in (TILES, SMALLER):
        assert max(tiles) == 512
        assert list(tiles) == sorted(tiles)


# --- wide_attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (35, 77), (64, 64), (20, 300)])
def test_wide_attention(queries, keys, dtype):
    """Views of one projection, as the VAE makes them, in two samples."""
    q, (k, v) = rand(2, queries, 2, 520, dtype=dtype), rand(2, 2, keys, 2, 520, dtype=dtype)
    q, k, v = (x.transpose(1, 2)[..., :512] for x in (q, k, v))
    out = compare("wide_attention", {"q": q, "k": k, "v": v})[0]
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_attention_in_pieces_and_over_long_rows(dtype, monkeypatch):
    """Seven queries at a time, and keys that a program reads in three blocks."""
    module = kernels.KERNELS["wide_attention"]
    monkeypatch.setattr(module, "SCORES", 7 * 300)
    q, (k, v) = rand(1, 1, 20, 512, dtype=dtype), rand(2, 1, 1, 300, 512, dtype=dtype)
    compare("wide_attention", {"q": q, "k": k, "v": v})
    monkeypatch.setattr(module, "WHOLE", 128)
    compare("wide_attention", {"q": q, "k": k, "v": v})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_attention_hostile_values(dtype):
    q, k, v = rand(3, 1, 1, 300, 512, dtype=dtype)
    compare("wide_attention", {"q": q * 30, "k": k, "v": v})  # all but one-hot
    compare("wide_attention", {"q": q * 0, "k": k, "v": v * 1000})  # all weights the same: p v is 300 times the result


def test_wide_attention_refuses_float32():
    q = rand(1, 1, 4, 512)
    with pytest.raises(ValueError, match=r"q: expected torch.float16 or torch.bfloat16, found torch.float32"):
        kernels.wide_attention(q, q, q)


# --- upsample_conv --------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(1, 4, 3, 1, 1), (2, 32, 24, 5, 3), (1, 160, 136, 4, 6)])  # B, C, C', H, W
@pytest.mark.parametrize("with_bias", [False, True])
def test_upsample_conv(shape, with_bias, dtype):
    """Against the plain upsampling and convolution.  Summed weights are rounded once more: hence 1.5, see the kernel's page."""
    batch, c_in, c_out, height, width = shape
    x, weight = image(batch, c_in, height, width, dtype=dtype), rand(c_out, c_in, 3, 3, dtype=dtype)
    bias = rand(c_out, dtype=dtype) if with_bias else None
    phases = phase_weights(weight)
    found = compare("upsample_conv", {"x": x, "phases": phases, "bias": bias}, factor=1.5)[0]
    true = plain(x.double(), weight.double(), None if bias is None else bias.double())
    bound = max(1.5 * relative_error(plain(x, weight, bias), true), 2 * FLOOR[dtype])
    assert relative_error(found, true) <= bound
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_phase_weights_are_exact_but_for_rounding():
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    assert relative_error(whole_weights(phase_weights(weight)), weight) < 1e-15
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    reference = kernels.KERNELS["upsample_conv"].reference(x, phase_weights(weight))
    assert relative_error(reference, plain(x, weight)) < 1e-15


# --- add_bias -------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("size", [(2, 320, 5, 3), (1, 512, 4, 4), (16, 7, 1, 3), (1, 1, 1, 1), (1, 130, 3, 11)])
def test_add_bias(size, dtype):
    arguments = {"x": image(*size, dtype=dtype), "bias": rand(size[1], dtype=dtype), "residual": image(*size, dtype=dtype)}
    y = compare("add_bias", arguments)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_add_bias_refuses_what_is_not_dense():
    x, bias = image(1, 8, 4, 4), rand(8)
    with pytest.raises(ValueError, match="residual: expected dense channels-last"):
        kernels.add_bias(x, bias, image(1, 8, 4, 8)[..., ::2])
    with pytest.raises(ValueError, match="bias: expected shape"):
        kernels.add_bias(x, rand(9), x)


# --- statistics by the kernel that writes ---------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them, each of several steps, also where a map is small."""
    monkeypatch.setattr(kernels.KERNELS["group_norm"], "TILE", Tile(4, 9, 4))


@each_dtype
@pytest.mark.parametrize(("size", "mean"), [((2, 320, 5, 7), 0), ((1, 128, 9, 5), 2), ((1, 64, 11, 3), -300)])
def test_add_bias_with_statistics(size, mean, small_chunks, dtype):
    """Of what is written, rounded, and a shift that only the norm adds; the last chunk is short."""
    x, residual, bias, shift = image(*size, dtype=dtype) + mean, image(*size, dtype=dtype), rand(size[1]), rand(size[1])
    y, *known = kernels.add_bias(x, bias, residual, groups=32, shift=shift)
    assert torch.equal(y, kernels.add_bias(x, bias, residual))
    for found, true in zip(known, chunk_moments(y.double(), 32, shift.double()), strict=True):
        assert relative_error(found, true) <= 1e-5  # a mean of 300 in float32 leaves so much of squares about 1
    compare("group_norm", group_norm_arguments(y, shift=shift.expand(len(y), -1), silu=True), known=known)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 32, 64, 5, 3), (2, 8, 320, 3, 2)])  # B, C, C', H, W
def test_upsample_conv_with_statistics(shape, small_chunks, dtype):
    batch, c_in, c_out, height, width = shape
    x, phases = image(batch, c_in, height, width, dtype=dtype), phase_weights(rand(c_out, c_in, 3, 3, dtype=dtype))
    bias = rand(c_out, dtype=dtype) * 20
    y, *known = kernels.upsample_conv(x, phases, bias, groups=32)
    assert torch.equal(y, kernels.upsample_conv(x, phases, bias))
    for found, true in zip(known, chunk_moments(y.double(), 32), strict=True):
        assert relative_error(found, true) <= 1e-5
    compare("group_norm", group_norm_arguments(y), known=known)


def test_known_statistics_must_be_of_that_map():
    _, *known = kernels.add_bias(image(1, 64, 4, 4), rand(64), image(1, 64, 4, 4), groups=16)
    arguments = group_norm_arguments(image(1, 64, 4, 4))
    with pytest.raises(ValueError, match=r"known: expected shape \(1, 1, 32\), found \(1, 1, 16\)"):
        kernels.group_norm(**arguments, known=known)
    with pytest.raises(ValueError, match="known: expected neither a skip nor a tile beside it"):
        kernels.group_norm(**arguments, known=known, tile=TILE)


# --- linear_step ----------------------------------------------------------------------------------------------------------


def step_arguments(
    batch: int, roles: int, dtype: torch.dtype, layout: Callable[..., Tensor] = image, call: int = 2, rows: int = 11
) -> dict[str, Any]:
    """Eleven rows: one more than the kernel takes at a time, and then some.  Call 2 writes to row 5, and does not use row 7."""
    to = torch.tensor([1, 3, 5, 2])
    coefficients = torch.randn(4, rows, dtype=torch.float64)
    coefficients[:, 7 % rows] = 0
    table = kernels.call_table(to, torch.randn(4).double(), torch.randn(4).double(), torch.rand(4).double(), coefficients)
    weights = torch.randn(4, roles, batch)
    return {
        "history": rand(rows, batch, 4, 5, 7),
        "asked": rand(batch, 4, 5, 7),
        "prediction": layout(roles * batch, 4, 5, 7, dtype=dtype),
        "weights": weights.to(DEVICE),
        "table": table.to(DEVICE),
        "call": torch.tensor([call], device=DEVICE),
        "model_input": layout(roles * batch, 4, 5, 7, dtype=dtype),
    }


@each_dtype
@pytest.mark.parametrize("layout", [image, rand])
@pytest.mark.parametrize("roles", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_linear_step(batch, roles, layout, dtype):
    arguments = step_arguments(batch, roles, dtype, layout)
    before = arguments["history"].clone()
    history, asked, model_input = compare("linear_step", arguments)
    assert all(a is arguments[b] for a, b in ((history, "history"), (asked, "asked"), (model_input, "model_input")))
    changed = (history != before).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [5]
    assert all(torch.equal(copy, model_input[:batch]) for copy in model_input.split(batch))


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 4, 9, 11), (1, 16, 3, 13)])
@pytest.mark.parametrize("rows", [2, 8, 9, 60])
def test_linear_step_odd_sizes(rows, size):
    """In other memory formats as well: the latents of every array lie in another order."""
    batch, channels, height, width = size
    table = torch.cat([torch.tensor([[1.0, 0.5, -2.0, 0.3]]), torch.randn(1, rows)], dim=1).to(DEVICE)
    compare(
        "linear_step",
        {
            "history": rand(batch, rows, channels, height, width).transpose(0, 1),
            "asked": image(batch, channels, height, width),
            "prediction": image(2 * batch, channels, height, width, dtype=torch.float16),
            "weights": rand(1, 2, batch),
            "table": table,
            "call": torch.zeros((), device=DEVICE, dtype=torch.int32),
            "model_input": rand(batch, channels, height, width, dtype=torch.bfloat16),
        },
    )


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_linear_step_writes_into_a_wider_input(copies):
    """As many copies as the network is asked for, which need not be the roles that it has answered with."""
    arguments = step_arguments(2, 2, torch.bfloat16)
    wide = image(2 * copies, 9, 5, 7, dtype=torch.bfloat16)
    rest = wide[:, 4:].clone()
    compare("linear_step", arguments | {"model_input": wide[:, :4]})
    assert torch.equal(wide[:, 4:], rest)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_linear_step_keeps_what_is_known(shared, batch):
    samples = 1 if shared else batch
    known, mask = rand(samples, 4, 5, 7), torch.rand(samples, 1, 5, 7, device=DEVICE)
    history, *_ = compare("linear_step", step_arguments(batch, 2, torch.float16) | {"known": known, "mask": mask})
    kept = (mask <= 0.5).expand(batch, 4, 5, 7)
    assert torch.equal(history[5][kept], known.expand(batch, -1, -1, -1)[kept])
    assert not (history[5] == known)[~kept].any()


def test_linear_step_reads_no_row_with_a_zero_coefficient():
    """Neither one that is yet to be written, nor its own."""
    arguments = step_arguments(2, 2, torch.float32)
    arguments["history"][7] = float("nan")
    arguments["table"][:, 4 + 5] = 0
    arguments["prediction"][0, 0, 0, 0] = float("nan")
    wanted = kernels.KERNELS["linear_step"].reference(**double(arguments))
    history, asked, model_input = kernels.linear_step(**arguments)
    assert relative_error(asked, wanted[1]) <= FLOOR[torch.float32]
    assert relative_error(model_input, wanted[2]) <= FLOOR[torch.float32]
    assert history[5, 0, 0, 0, 0].isnan()
    assert history[5].isnan().sum() == 1


@pytest.mark.parametrize("masked", [False, True])
def test_linear_step_beyond_the_table_is_not_a_number(masked):
    """The same goes for a row beyond the history."""
    options = {"known": rand(1, 4, 5, 7), "mask": torch.zeros(1, 1, 5, 7, device=DEVICE)} if masked else {}
    for call, row in ((-1, 0), (4, 0), (1 << 32, 0), (2, 11), (2, -1)):
        arguments = step_arguments(1, 2, torch.float32, call=call) | options
        arguments["table"][2, 0] = row
        before = arguments["history"].clone()
        history, asked, model_input = kernels.linear_step(**arguments)
        assert torch.equal(history, before)
        assert asked.isnan().all()
        assert model_input.isnan().all()


def euler(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def heun(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """Two calls a step, but for the last."""
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def multistep(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++ (2M), from the estimates of two steps (Lu et al. 2022, arXiv 2211.01095, alg. 2)."""
    before, last = None, None
    for sigma, following in pairwise(sigmas):
        estimate = denoise(x, sigma)
        mixed = estimate
        if before is not None and following > 0:
            ratio = (before / sigma).log() / (sigma / following).log()
            mixed = estimate + (estimate - last) / (2 * ratio)
        x = following / sigma * x + (1 - following / sigma) * mixed
        before, last = sigma, estimate
    return x


@pytest.mark.parametrize("predicts", ["epsilon", "v", "edm"])
@pytest.mark.parametrize("sampler", [euler, heun, multistep])
def test_linear_step_walks_as_the_samplers_do(sampler, predicts):
    """A table from a walk over unit vectors, then the walk itself with a linear network, beside a plain one in float64."""
    sigmas = torch.tensor([14.6, 8.0, 3.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    unit = torch.eye(20, dtype=torch.float64)
    rows: list[Tensor] = []
    levels: list[Tensor] = []

    def record(x: Tensor, sigma: Tensor) -> Tensor:
        rows.append(x)
        levels.append(sigma)
        return unit[len(rows)]

    last = sampler(record, unit[0], sigmas)
    calls, levels = len(rows), torch.stack(levels)
    p, q = kernels.prediction_coefficients(predicts, levels, 0.8)
    c_in = (levels**2 + 0.64).rsqrt()
    coefficients = torch.stack([*rows[1:], last])[:, : calls + 1]
    following = torch.cat([c_in[1:], torch.ones(1).double()])
    table = kernels.call_table(1 + torch.arange(calls), p, q, following, coefficients).to(DEVICE)
    weights = torch.tensor([[-6.5], [7.5]]).repeat(calls, 1, 2).to(DEVICE)

    def network(x: Tensor) -> Tensor:
        return 0.4 * x - 0.1 * x.flip(1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        at = (levels == sigma).nonzero()[0, 0]
        negative, positive = network(c_in[at] * x).flip(1), network(c_in[at] * x)
        return p[at] * x + q[at] * (negative + 7.5 * (positive - negative))

    start = torch.randn(2, 4, 6, 6, dtype=torch.float64) * 14.6
    wanted = sampler(denoise, start, sigmas)
    asked, call = start.float().to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    model_input = (c_in[0] * asked).float().repeat(2, 1, 1, 1)
    history = torch.full((calls + 1, 2, 4, 6, 6), float("nan"), device=DEVICE)
    history[0] = asked
    for _ in range(calls):
        negative, positive = network(model_input).chunk(2)
        kernels.linear_step(history, asked, torch.cat([negative.flip(1), positive]), weights, table, call, model_input)
        call += 1
    assert relative_error(asked.cpu(), wanted) < 1e-5
    assert torch.equal(model_input[:2], asked)


def test_prediction_coefficients_undo_the_definitions():
    picture, noise, sigma = (torch.randn(9, dtype=torch.float64) for _ in range(3))
    sigma = sigma.exp()
    x = picture + sigma * noise
    for s in (0.5, 1.0):
        v = (s * noise - sigma / s * picture) / (sigma**2 + s**2).sqrt()
        for name, predicted in (("epsilon", noise), ("v", v), ("edm", -v)):
            p, q = kernels.prediction_coefficients(name, sigma, s)
            assert p.dtype == q.dtype == torch.float64
            assert relative_error(p * x + q * predicted, picture) < 1e-14
    with pytest.raises(ValueError, match="prediction: expected epsilon, v or edm, found x0"):
        kernels.prediction_coefficients("x0", sigma, 1.0)


# --- all of them ----------------------------------------------------------------------------------------------------------


def reduced(name: str, shape: Any) -> Any:
    """One of the real shapes with its channels, groups and heads, and few rows, pixels or tokens."""
    small = {
        "group_norm": {"size": 3, "batch": 1},
        "layer_norm": {"rows": 3},
        "attention": {"queries": 30, "keys": 77 if "cross" in shape.label else 30, "heads": 2},
        "wide_attention": {"queries": 9, "keys": 9},
        "geglu": {"rows": 3},
        "linear_geglu": {"m": 5, "n": 40},
        "upsample_conv": {"size": 2, "channels": 64},
        "add_bias": {"size": 3},
        "quantise_rows": {"rows": 3},
        "dequantise": {"outputs": 5, "inputs": 32},
        "linear_step": {"size": 8},
    }
    return replace(shape, **small[name])


REAL = [(name, shape) for name, module in kernels.KERNELS.items() for shape in module.SHAPES]
real = pytest.mark.parametrize(("name", "shape"), REAL, ids=[f"{name} {shape.label}" for name, shape in REAL])


@real
def test_protocol(name, shape):
    """What the benchmark relies on: make, the wrapper, reference, library, traffic and flops fit together."""
    module = kernels.KERNELS[name]
    arguments = module.make(reduced(name, shape), DEVICE, torch.bfloat16)
    wanted = outputs(module.reference(**double(arguments)))
    library = module.library(**arguments)
    ours, theirs = outputs(getattr(kernels, name)(**arguments)), outputs(library["PyTorch"]())
    assert all(relative_error(found, true) < 2e-2 for found, true in zip(ours, wanted, strict=True))
    assert [x.shape for x in theirs] == [x.shape for x in wanted]
    assert 0 < module.traffic(shape, 2) < module.traffic(shape, 4)
    assert module.flops(shape) > 0


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_same_input_same_bits(name):
    arguments = kernels.KERNELS[name].make(reduced(name, kernels.KERNELS[name].SHAPES[0]), DEVICE, torch.float16)
    first, second = (
        outputs(getattr(kernels, name)(**{key: x.clone() if isinstance(x, Tensor) else x for key, x in arguments.items()}))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(checks.INTERPRETED, reason="at full size only on a GPU")
@pytest.mark.gpu
@each_dtype
@real
def test_real_shapes_at_full_size(name, shape, dtype):
    """Of attention one head, of the upsampling a few rows: in float64 all of them would take 20 GB and minutes."""
    arguments = kernels.KERNELS[name].make(shape, DEVICE, dtype)
    if name in ("attention", "wide_attention"):
        arguments = {key: x[-1:, -1:] for key, x in arguments.items()}
    if name == "upsample_conv":
        arguments["x"] = arguments["x"][:, :, :8]
    if name != "attention" or dtype != torch.float32:
        compare(name, arguments, 1.5 if name == "upsample_conv" else FACTOR)


@pytest.mark.skipif(checks.INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.gpu
@real
def test_replay_of_a_cuda_graph(name, shape):
    """Captured and replayed it gives what it gives when called, without a synchronisation."""
    arguments = kernels.KERNELS[name].make(shape, DEVICE, torch.float16)
    kept = {key: x.clone() if isinstance(x, Tensor) else x for key, x in arguments.items()}
    wanted = [x.clone() for x in outputs(getattr(kernels, name)(**kept))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outputs(getattr(kernels, name)(**arguments))
    torch.cuda.set_sync_debug_mode("error")
    graph.replay()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- refusals -------------------------------------------------------------------------------------------------------------


def vector(size: int) -> Tensor:
    return torch.zeros(size, device=DEVICE)


BASE: dict[str, Callable[[], dict[str, Any]]] = {
    "group_norm": lambda: group_norm_arguments(image(2, 64, 4, 4), shift=rand(2, 64)),
    "layer_norm": lambda: {"x": rand(3, 64), "weight": rand(64), "bias": rand(64), "eps": 1e-5, "shift": rand(64)},
    "attention": lambda: {"q": rand(1, 2, 9, 40), "k": rand(1, 2, 7, 40), "v": rand(1, 2, 7, 40)},
    "geglu": lambda: {"x": rand(3, 64)},
    "linear_geglu": lambda: {"x": rand(3, 32), "weight": rand(64, 32), "bias": rand(64)},
    "quantise_rows": lambda: {"x": rand(3, 64)},
    "dequantise": lambda: {"weight": rand(6, 8).to(E4M3), "scale": rand(6), "dtype": torch.float16},
    "upsample_conv": lambda: {"x": image(1, 8, 3, 3), "phases": phase_weights(rand(6, 8, 3, 3)), "bias": rand(6)},
    "linear_step": lambda: step_arguments(3, 2, torch.float32),
}
REFUSED: list[tuple[str, dict[str, Callable[[], Any]], str]] = [
    ("group_norm", {"x": lambda: rand(2, 64, 4, 4)}, r"x: expected channels-last memory .*, found shape .* with strides"),
    ("group_norm", {"x": lambda: rand(2, 64, 4)}, r"x: expected shape \(any, any, any, any\), found \(2, 64, 4\)"),
    ("group_norm", {"x": lambda: image(2, 64, 4, 4).double()}, r"x: expected torch.float32 or .*, found torch.float64"),
    ("group_norm", {"x": lambda: image(2, 64, 4, 4).requires_grad_()}, r"x: expected no gradient wanted"),
    ("group_norm", {"x": lambda: image(0, 64, 4, 4)}, r"x: expected at least one element, found \(0, 64, 4, 4\)"),
    ("group_norm", {"x": lambda: [1.0]}, r"x: expected a tensor, found list"),
    ("group_norm", {"groups": lambda: 7}, r"groups: expected a divisor of the 64 channels, found 7"),
    ("group_norm", {"weight": lambda: vector(63)}, r"weight: expected shape \(64\), found \(63,\)"),
    ("group_norm", {"bias": lambda: vector(128)[::2]}, r"bias: expected contiguous, found stride"),
    ("group_norm", {"bias": lambda: vector(64).to("meta")}, r"bias: expected device (cpu|cuda:0), found meta"),
    ("group_norm", {"shift": lambda: rand(2, 63)}, r"shift: expected shape \(2, 64\), found \(2, 63\)"),
    ("group_norm", {"skip": lambda: image(2, 64, 4, 5), "weight": lambda: vector(128), "bias": lambda: vector(128)},
     r"skip: expected shape \(2, any, 4, 4\), found \(2, 64, 4, 5\)"),
    ("group_norm", {"skip": lambda: image(2, 64, 4, 4).half(), "weight": lambda: vector(128), "bias": lambda: vector(128)},
     r"skip: expected torch.float32, found torch.float16"),
    ("layer_norm", {"x": lambda: rand(64, 3).T}, r"x: expected rows evenly spaced .*, found shape \(3, 64\) with strides"),
    ("layer_norm", {"shift": lambda: rand(3, 64)}, r"shift: expected shape \(64\), found \(3, 64\)"),
    ("layer_norm", {"addend": lambda: rand(4, 64)}, r"addend: expected shape \(3, 64\), found \(4, 64\)"),
    ("layer_norm", {"x": lambda: rand(1, 64).expand(3, 64), "addend": lambda: rand(3, 64)}, r"x: expected rows that do not over"),
    ("layer_norm", {"addend": lambda: rand(64, 3).T}, r"addend: expected rows evenly spaced .*, found shape"),
    ("layer_norm", {"weight": lambda: vector(65)}, r"weight: expected shape \(64\), found \(65,\)"),
    ("attention", {"k": lambda: rand(1, 3, 7, 40)}, r"k: expected shape \(1, 2, any, 40\), found \(1, 3, 7, 40\)"),
    ("attention", {"v": lambda: rand(1, 2, 8, 40)}, r"v: expected shape \(1, 2, 7, 40\), found \(1, 2, 8, 40\)"),
    ("attention", {"k": lambda: rand(1, 2, 7, 40).half()}, r"k: expected torch.float32, found torch.float16"),
    ("attention", {"q": lambda: rand(1, 2, 40, 9).mT}, r"q: expected strides that are multiples of 4, then 1, .*, found"),
    ("attention", {"q": lambda: rand(1, 2, 9, 42)[..., 1:41]}, r"q: expected strides that are multiples of 4"),
    ("attention", {"v": lambda: rand(1, 1, 7, 40).expand(1, 2, 7, 40)}, r"v: expected strides"),
    ("attention", {"scale": lambda: -1.0}, r"scale: expected a positive number, found -1.0"),
    ("attention", {name: lambda: rand(1, 2, 7, 520) for name in "qkv"}, r"q: expected a head dimension of at most 512, found"),
    ("geglu", {"x": lambda: rand(3, 63)}, r"x: expected an even last dimension, found \(3, 63\)"),
    ("geglu", {"x": lambda: rand(3, 64).long()}, r"x: expected torch.float32 or .*, found torch.int64"),
    ("linear_geglu", {"weight": lambda: rand(64, 33)}, r"weight: expected shape \(any, 32\), found \(64, 33\)"),
    ("linear_geglu", {"weight": lambda: rand(63, 32)}, r"weight: expected an even number of rows, found \(63, 32\)"),
    ("linear_geglu", {"weight": lambda: rand(32, 64).T}, r"weight: expected contiguous, found strides \(1, 64\)"),
    ("linear_geglu", {"x": lambda: rand(3, 30), "weight": lambda: rand(64, 30)}, r"x: expected rows that start at"),
    ("quantise_rows", {"x": lambda: rand(64, 3).T}, r"x: expected rows evenly spaced .*, found shape \(3, 64\) with strides"),
    ("quantise_rows", {"x": lambda: rand(1, 16385)}, r"x: expected at most 16384 channels, found 16385"),
    ("dequantise", {"weight": lambda: rand(6, 8)}, r"weight: expected torch.float8_e4m3fn, found torch.float32"),
    ("dequantise", {"weight": lambda: rand(8, 6).to(E4M3).T}, r"weight: expected contiguous or channels-last, found strides"),
    ("dequantise", {"scale": lambda: rand(6, 1)}, r"scale: expected shape \(6\), found \(6, 1\)"),
    ("dequantise", {"dtype": lambda: torch.int8}, r"dtype: expected torch.float32 or .*, found torch.int8"),
    ("upsample_conv", {"phases": lambda: rand(6, 8, 3, 3)}, r"phases: expected shape \(any, 8, 2, 2\), found \(6, 8, 3, 3\)"),
    ("upsample_conv", {"phases": lambda: rand(6, 8, 2, 2)}, r"phases: expected 4\*C' outputs"),
    ("upsample_conv", {"x": lambda: rand(1, 8, 3, 3)}, r"x: expected channels-last memory"),
    ("linear_step", {"history": lambda: rand(3, 4, 5, 7)}, r"history: expected shape \(any, .*\), found \(3, 4, 5, 7\)"),
    ("linear_step", {"history": lambda: rand(11, 3, 4, 5, 7).half()}, r"history: expected torch.float32, found torch.float16"),
    ("linear_step", {"history": lambda: rand(11, 3, 4, 7, 5).mT}, r"history: expected evenly spaced pixels"),
    ("linear_step", {"asked": lambda: rand(2, 4, 5, 7)}, r"asked: expected shape \(3, 4, 5, 7\), found \(2, 4, 5, 7\)"),
    ("linear_step", {"asked": lambda: rand(3, 4, 5, 7).half()}, r"asked: expected torch.float32, found torch.float16"),
    ("linear_step", {"prediction": lambda: rand(4, 4, 5, 7)}, r"prediction: expected a batch that is a multiple of 3, found 4"),
    ("linear_step", {"prediction": lambda: rand(9, 4, 5, 7)}, r"weights: expected shape \(4, 3, 3\), found \(4, 2, 3\)"),
    ("linear_step", {"weights": lambda: rand(4, 3, 2).mT}, r"weights: expected contiguous, found \(6, 1, 2\)"),
    ("linear_step", {"table": lambda: rand(3, 14)}, r"table: expected shape \(any, 15\), found \(3, 14\)"),
    ("linear_step", {"call": lambda: vector(2).long()}, r"call: expected one element, found \(2,\)"),
    ("linear_step", {"call": lambda: vector(1)}, r"call: expected torch.int32 or torch.int64, found torch.float32"),
    ("linear_step", {"model_input": lambda: rand(2, 4, 5, 7)}, r"model_input: expected a batch that is a multiple of 3, found 2"),
    ("linear_step", {"model_input": lambda: rand(3, 4, 7, 5).mT}, r"model_input: expected evenly spaced pixels"),
    ("linear_step", {"known": lambda: rand(1, 4, 5, 7)}, r"known and mask: expected both or neither, found one of them"),
    ("linear_step", {"known": lambda: rand(2, 4, 5, 7), "mask": lambda: rand(1, 1, 5, 7)},
     r"known: expected a batch of 1 or 3, found 2"),
    ("linear_step", {"known": lambda: rand(1, 4, 5, 7), "mask": lambda: rand(1, 4, 5, 7)},
     r"mask: expected shape \(any, 1, 5, 7\), found \(1, 4, 5, 7\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_refuses(name, changes, message):
    arguments = BASE[name]()
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(kernels, name)(**arguments | {key: value() for key, value in changes.items()})


@pytest.mark.parametrize("name", BASE)
def test_refuses_none_of_the_arguments_that_the_refusals_start_from(name):
    getattr(kernels, name)(**BASE[name]())


WITHOUT = """
import sys
if sys.argv[1] == "triton":
    sys.modules["triton"] = None
import torch
from minisd import kernels
try:
    kernels.geglu(torch.zeros(2, 4))
except (ImportError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [("triton", "ImportError minisd.kernels needs Triton"), ("cuda", "ValueError x: expected a CUDA device")],
)
def test_imports_without_triton_or_gpu_and_says_so_when_used(what, message, tmp_path):
    """From another folder: in the checkout's own, Python would take its minisd/ for the installed one, which has kernels/."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, what], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    assert run.stdout.startswith(message)

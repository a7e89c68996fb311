"""The engine of a CPU against the modules as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import SMALL
from helpers import relative_error
from live_bytes import peak_bytes
from PIL import Image

import minisd
from minisd.fast import choice
from minisd.fast.cpu import attention, operations
from minisd.fast.cpu.engine import Cpu
from minisd.fast.cpu.networks import UNet as CpuUNet
from minisd.fast.cpu.networks import decoder_layer, normed, period, unet_layer
from minisd.fast.decoder import FusedDecoder
from minisd.fast.engine import Plain
from minisd.fast.unet import FusedUNet
from minisd.models import ops
from minisd.models.layers import GroupNorm
from minisd.models.shapes import below
from minisd.models.unet import UNet
from minisd.models.vae import AutoencoderKL
from minisd.system import memory
from minisd.workbench import blueprint

LIMIT = 1e-5
SMALLEST = {"width": 64, "height": 64, "steps": 2, "seed": 1}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: small.write(folder / f"{name}.safetensors") for name, small in SMALL.items()}


@pytest.fixture
def pipe(files) -> minisd.Pipeline:
    return minisd.load(files["sd1"], device="cpu", dtype="float32")


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two that compute products, whatever this processor would take."""
    monkeypatch.setattr(operations, "onednn", lambda dtype: request.param == "oneDNN")
    return request.param


def drawn(pipe: minisd.Pipeline, kernels: str = "auto", **options: object) -> torch.Tensor:
    with choice.using(kernels):
        return pipe("a red circle", **(SMALLEST | options)).latents


def same_both_ways(pipe: minisd.Pipeline, limit: float = LIMIT, **options: object) -> torch.Tensor:
    """What is drawn, if it is the same as by the modules."""
    found = drawn(pipe, **options)
    assert relative_error(found, drawn(pipe, "torch", **options)) <= limit
    return found


# --- operations -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_their_sums(library, bias, add):
    x, weight, more = noise(2, 5, 24), noise(48, 24, seed=1), noise(2, 5, 48, seed=2) if add else None
    shift = noise(48, seed=3) if bias else None
    wanted = F.linear(x, weight, shift) + (0 if more is None else more)
    kept = None if more is None else more.clone()
    assert relative_error(operations.linear(x, weight, shift, more), wanted) <= LIMIT
    assert more is None or torch.equal(more, kept)
    wanted = ops.geglu(F.linear(x, weight, noise(48, seed=3)))
    assert relative_error(operations.geglu(x, *weight.chunk(2), noise(48, seed=3)), wanted) <= LIMIT


@pytest.mark.parametrize("rows", [4, 3])
def test_a_weight_is_put_in_order_for_many_rows(monkeypatch, rows):
    """For four and more here; a weight as it stands and one in order make the same."""
    monkeypatch.setattr(operations, "onednn", lambda dtype: True)
    monkeypatch.setattr(operations, "MANY", 4)
    x, weight, bias = noise(rows, 24), noise(48, 24, seed=1), noise(48, seed=2)
    ordered = operations.packed(weight, rows)
    assert ordered.is_mkldnn == (rows == 4)
    for given in (weight, ordered):
        assert relative_error(operations.linear(x, given, bias), F.linear(x, weight, bias)) <= LIMIT


@pytest.mark.parametrize("last", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "height", "width"), [(64, 4, 4), (64, 5, 3), (8, 5, 4), (1, 1, 1)])
def test_convolutions_of_small_and_large_maps(library, channels, height, width, stride, last):
    x = noise(2, channels, height, width).to(memory_format=last)
    weight, bias = noise(12, channels, 3, 3, seed=1).to(memory_format=torch.channels_last), noise(12, seed=2)
    wanted = F.conv2d(x, weight, bias, stride, padding=1)
    add = noise(*wanted.shape, seed=3).to(memory_format=last)
    assert relative_error(operations.conv3x3(x, weight, bias, stride), wanted) <= LIMIT
    assert relative_error(operations.conv3x3(x, weight, None, stride, add), wanted - bias[:, None, None] + add) <= LIMIT


@pytest.mark.parametrize("last", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3), (8, 8)])
def test_a_convolution_after_upsampling(library, height, width, last, monkeypatch):
    """By phases of summed weights, in pieces of two lines; against the map made large, in float64."""
    monkeypatch.setattr(operations, "PIXELS", 4 * width)
    x, weight, bias = noise(2, 8, height, width).to(memory_format=last), noise(12, 8, 3, 3, seed=1), noise(12, seed=2)
    large = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    wanted = F.conv2d(large, weight.double(), bias.double(), padding=1).float()
    assert relative_error(operations.upsample_conv(x, operations.phase_weights(weight), bias), wanted) <= LIMIT


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "side"), [(64, 8), (64, 40)])
def test_a_norm_in_bfloat16_is_rounded_once(channels, side, silu):
    """Whether a small map goes through float32 or a large one does not: the error is that of rounding, 2^-9 at most."""
    norm = GroupNorm(channels, 1e-5, silu).bfloat16().requires_grad_(False)
    norm.weight.copy_(noise(channels, seed=1))
    norm.bias.copy_(noise(channels, seed=2))
    x = noise(2, channels, side, side).bfloat16()
    wanted = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-5)
    wanted = F.silu(wanted) if silu else wanted
    found = normed(x, norm)
    assert relative_error(found.float(), wanted.float()) <= (2**-9 if side < 32 or not silu else 2**-8)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
def test_a_norm_of_channels_last_maps_far_from_zero(silu):
    """Of one colour, nearly: the mean is 1000 times the deviation."""
    x, weight, bias = noise(2, 64, 8, 8) + 1000, noise(64, seed=1), noise(64, seed=2)
    wanted = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
    wanted = F.silu(wanted) if silu else wanted
    found = ops.group_norm(x.to(memory_format=torch.channels_last), 32, weight, bias, 1e-5, silu)
    assert relative_error(found, wanted.float()) <= LIMIT
    assert found.is_contiguous(memory_format=torch.channels_last)


SIZES = [(1024, 77, 2, 40), (1030, 1030, 1, 64), (300, 260, 4, 64), (65536, 1, 2, 5), (256, 77, 2, 40), (5, 3, 1, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "heads", "d"), SIZES)
def test_attention_of_many_scores_and_of_few(monkeypatch, dtype, queries, keys, heads, d):
    """Scores of the size that networks have, against the formula in float64; in bfloat16 those of the rounded numbers."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN computes no bfloat16 here")
    monkeypatch.setattr(attention, "onednn", lambda dtype: True)
    monkeypatch.setattr(attention, "BLOCK", 1 << 16)  # more blocks than one
    monkeypatch.setattr(attention, "TOGETHER", 1 << 18)
    q = noise(2, queries, heads * d).to(dtype)
    k, v = (noise(2, keys, heads * d, seed=seed).add_(1).to(dtype) for seed in (1, 2))  # keys with a mean
    found = attention.attention(q, k, v, heads)
    assert relative_error(found.double(), by_formula(q, k, v, heads)) <= (3e-6 if dtype == torch.float32 else 6e-3)


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = ops.split_heads(heads, q.double(), k.double(), v.double())
    return ops.joined_heads((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)


@pytest.mark.parametrize("size", [2.0, 30.0, 1e4])
def test_heads_whose_scores_are_large_are_as_exact(monkeypatch, size):
    """One of two, the other near zero; a bound too large for exponentials that are numbers is PyTorch's to treat."""
    monkeypatch.setattr(attention, "onednn", lambda dtype: True)
    monkeypatch.setattr(attention, "BLOCK", 1 << 16)
    q, k, v = (noise(1, 1024, 32, seed=seed) for seed in (1, 2, 3))
    q[..., :16] *= size
    wanted = by_formula(q, k, v, 2)
    limit = max(LIMIT, 1.01 * relative_error(ops.attention(q, k, v, 2).double(), wanted))  # float32's own, of scores of 1e4
    assert relative_error(attention.attention(q, k, v, 2).double(), wanted) <= limit
    assert peak_bytes(lambda: attention.attention(q, k, v, 2)) < 2 << 20  # all scores of a head are 4 MB


@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_stays_so(monkeypatch, where):
    monkeypatch.setattr(attention, "onednn", lambda dtype: True)
    given = [noise(1, 1024, 16, seed=seed) for seed in (1, 2, 3)]
    given[where][0, 7, 3] = torch.nan
    found, wanted = attention.attention(*given, 2), ops.attention(*given, 2)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().any()


# --- networks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", ["one", "each"])
@torch.no_grad()
def test_the_unet_by_either_library_and_in_pieces(library, vectors, monkeypatch):
    """SDXL's takes a vector, so that the time embedding is not the same for each picture; odd sizes."""
    monkeypatch.setattr(operations, "ROWS", 1)
    monkeypatch.setattr("minisd.fast.cpu.networks.ROWS", 1)
    shapes = below(SMALL["sdxl"].shapes(), "model.diffusion_model")
    network = UNet(shapes).requires_grad_(False)
    network.load_state_dict(blueprint.random_weights(shapes, 3))
    x, t = noise(2, network.in_channels, 24, 20), torch.tensor([321.5, 321.5])
    context, y = noise(2, 77, network.context_channels, seed=1), noise(2, network.vector_channels, seed=2)
    y = y[:1].expand(2, -1) if vectors == "one" else y
    wanted = network(x, t, context, y)
    fused = FusedUNet(network, unet_layer)
    given = y[:1] if vectors == "one" else y
    assert relative_error(fused(x, fused.shifts(t[:1], given)[0], fused.keys_values(context)), wanted) <= LIMIT


@pytest.mark.parametrize(("order", "period_"), [([0, 0], 1), ([0, 1, 0, 1], 2), ([0, 1, 1], 3), ([0, 1, 0], 3), ([0], 1)])
@torch.no_grad()
def test_what_differs_by_the_prompt_alone_is_computed_once(order, period_):
    """As with guidance, where the same latents are asked about with several prompts."""
    shapes = below(SMALL["sd1"].shapes(), "model.diffusion_model")
    network = UNet(shapes).requires_grad_(False)
    network.load_state_dict(blueprint.random_weights(shapes, 3))
    x, t = noise(2, network.in_channels, 16, 8)[order], torch.full((len(order),), 321.5)
    context = noise(len(order), 77, network.context_channels, seed=1)
    fused = CpuUNet(network, unet_layer)
    assert period(x) == period_
    seen: list[int] = []
    first = fused.down[1][0]
    fused.down[1][0].__class__ = type("Seen", (type(first),), {"__call__": seeing(seen, type(first).__call__)})
    found = fused(x, fused.shifts(t[:1], None)[0], fused.keys_values(context))
    assert seen == [period_]
    assert relative_error(found, network(x, t, context)) <= LIMIT


def seeing(seen, call):
    def called(self, x, *given):
        seen.append(len(x))
        return call(self, x, *given)

    return called


def test_freed_memory_is_kept_while_somebody_draws(monkeypatch):
    """Two at once: the allocator is told at the first and after the last."""
    told: list[object] = []
    monkeypatch.setattr(memory, "tell_allocator", told.append)
    with memory.keeping_freed_memory():
        with pytest.raises(ValueError, match="x"), memory.keeping_freed_memory():
            raise ValueError("x")
        assert told == [memory.KEPT]
    assert told == [memory.KEPT, memory.USUAL]


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_an_allocator_that_is_not_glibcs_is_left_alone(system, monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", system)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("there is none to be loaded"))
    memory.of_glibc.cache_clear()
    try:
        with memory.keeping_freed_memory():
            memory.give_back(torch.device("cpu"))
    finally:
        memory.of_glibc.cache_clear()


@torch.no_grad()
def test_the_decoder_by_either_library(library):
    shapes = blueprint.vae((32, 64), (32, 64), (1, 1))
    network = AutoencoderKL(shapes).requires_grad_(False)
    network.load_state_dict(blueprint.random_weights(shapes, 3))
    latents = noise(2, 4, 3, 5)
    wanted = network.decode(latents)
    assert relative_error(FusedDecoder(network, decoder_layer)(latents), wanted) <= LIMIT


@torch.no_grad()
def test_no_weight_is_held_twice():
    shapes = below(SMALL["sdxl"].shapes(), "model.diffusion_model")
    weights = blueprint.random_weights(shapes, 3)
    network = UNet(shapes).requires_grad_(False)
    network.load_state_dict(weights)
    FusedUNet(network, unet_layer)
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    stores = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}
    assert sum(stores.values()) == sum(weight.nbytes for weight in weights.values())


# --- the engine -----------------------------------------------------------------------------------------------------------------


PICTURE = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
GIVEN = {"sd1-inpaint": {"init_image": PICTURE, "mask": Image.new("L", (64, 64), 255), "strength": 1.0}}
GIVEN["sd1-edit"] = {"init_image": PICTURE}
GIVEN["sdxl-inpaint"] = GIVEN["sd1-inpaint"]


@pytest.mark.parametrize("name", SMALL)
def test_every_family_is_drawn_as_by_the_modules(name, files):
    pipe = minisd.load(files[name], device="cpu", dtype="float32")
    assert isinstance(pipe.engine, Cpu)
    limit = 5 * LIMIT if name == "sdxl-v" else LIMIT  # which starts at 4096: the sampler's sums lose digits
    same_both_ways(pipe, limit, **GIVEN.get(name, {}))
    assert pipe.engine.fused is not None


def test_a_picture_does_not_depend_on_what_was_drawn_before(pipe):
    """The plain way and the encoder included, whose rounding follows the weights' order in memory."""
    options = {"init_image": PICTURE, "strength": 0.9}
    first = drawn(pipe, "torch", **options)
    assert torch.equal(drawn(pipe, **options), drawn(pipe, **options))
    assert torch.equal(drawn(pipe, "torch", **options), first)


@torch.no_grad()
def test_weights_written_to_are_in_the_next_picture(pipe):
    before = drawn(pipe)
    fused = pipe.engine.fused
    for i, weight in enumerate(pipe.unet.parameters()):
        weight.mul_(1 + 0.02 * (i % 3)).add_(0.001)
    assert relative_error(same_both_ways(pipe), before) > 1e-3
    assert pipe.engine.fused is fused  # the weights are the modules' own: nothing was made again
    for weight in pipe.model.parameters():
        weight.data.mul_(1.01)
    pipe.weights_changed()
    same_both_ways(pipe)
    pipe.unet.load_state_dict({key: value * 1.05 for key, value in pipe.unet.state_dict().items()}, assign=True)
    same_both_ways(pipe)


def test_what_is_done_to_a_module_is_in_the_picture(pipe):
    before = drawn(pipe)
    handle = pipe.unet.middle_block[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert not torch.equal(drawn(pipe), before)
    assert torch.equal(drawn(pipe), drawn(pipe, "torch"))
    handle.remove()
    assert torch.equal(drawn(pipe), before)


def test_a_picture_under_autocast_is_the_modules(pipe):
    """Also its decoding, and after weights were packed."""
    drawn(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pipe("a red circle", **SMALLEST)
        with choice.using("torch"):
            wanted = pipe("a red circle", **SMALLEST)
    assert torch.equal(found.latents, wanted.latents)
    assert found.images[0].tobytes() == wanted.images[0].tobytes()


def test_the_modules_draw_where_they_are_asked_to(files, pipe):
    plain = minisd.load(files["sd1"], device="cpu", dtype="float32", fast=False)
    assert type(plain.engine) is Plain
    assert relative_error(drawn(plain), drawn(pipe, "torch")) <= LIMIT  # whose weights lie in another order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_worse_than_the_modules_in_either_format(dtype, files):
    """Against the modules in float32; in bfloat16 by no more than the modules' own error, and what rounding is worth."""
    true = minisd.load(files["sd1"], device="cpu", dtype="float32", fast=False)
    wanted = drawn(true)
    pipe = minisd.load(files["sd1"], device="cpu", dtype=dtype)
    pipe.engine = pipe.codec.engine = Cpu(pipe.unet, (*pipe.text_encoders, pipe.vae))  # in bfloat16, too, where it is not chosen
    ours, modules = (relative_error(drawn(pipe, kernels), wanted) for kernels in ("auto", "torch"))
    assert ours <= max(LIMIT, 1.3 * modules)

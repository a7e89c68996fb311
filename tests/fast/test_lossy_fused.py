"""The UNet in float8 in the form of a GPU: what its modules compute, in half the memory, recorded, and by kernels."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from families import SMALL
from helpers import relative_error
from torch import Tensor

import minisd
from minisd.fast import choice
from minisd.fast.cuda import Cuda
from minisd.fast.lossy import float8, networks
from minisd.fast.lossy.float8 import E4M3, is_float8, to_float8
from minisd.fast.lossy.networks import ResBlock, Stream, Transformer, TransformerBlock, UNet, form_of, in_float8
from minisd.fast.unet import FusedUNet, rows
from minisd.models import unet as modules
from minisd.models.shapes import below
from minisd.workbench import blueprint

SMALLEST = {"width": 32, "height": 32, "steps": 3, "seed": 1, "guidance_scale": 4.0}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_unet(name: str) -> modules.UNet:
    shapes = below(SMALL[name].shapes(), "model.diffusion_model")
    network = modules.UNet(shapes)
    network.load_state_dict(blueprint.random_weights(shapes, 3))
    return network.requires_grad_(False)


def asked(network: modules.UNet, name: str) -> Tensor:
    x, context, y = given(name)
    return network(x, torch.tensor([981.0, 981.0]), context, y)


def answered(fused: FusedUNet, name: str) -> Tensor:
    x, context, y = given(name)
    return fused(x, fused.shifts(torch.tensor([981.0]), y)[0], fused.keys_values(context))


def given(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    small = SMALL[name]
    return noise(2, 4, 12, 10), noise(2, 7, small.context, seed=1), noise(2, small.vector, seed=2) if small.vector else None


def as_it_is(x: Tensor, over: object = None) -> tuple[Tensor, Tensor]:
    return x, torch.ones(*x.shape[:-1], 1)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_the_fused_form_computes_what_the_modules_do(name, monkeypatch):
    """But for the activations' rounding, which is of other numbers where biases are left to the norms that follow."""
    network = small_unet(name)
    exact = asked(network, name)
    to_float8(network)
    rounded = asked(network, name), answered(UNet(network), name)
    loss = [relative_error(each, exact) for each in rounded]
    assert 0.01 < loss[1] < 1.1 * loss[0]
    monkeypatch.setattr(float8, "quantised", as_it_is)
    wanted = asked(network, name)
    assert relative_error(answered(UNet(network), name), wanted) <= 1e-5
    assert relative_error(wanted, exact) > 0.01  # as the weights are rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_by_the_product_of_a_gpu_it_computes_the_same(batch, dtype, monkeypatch):
    """Which PyTorch has for a CPU, too: results in bfloat16, added to streams in other formats."""
    network = small_unet("sd1")
    to_float8(network)
    block = network.middle_block[1]
    x, keys_values = noise(batch, block.norm.weight.shape[0], 5, 3), noise(batch, 7, 2 * block.proj_in.out_features, seed=1)
    found = []
    for compute, kind in ((float8.reference, torch.float32), (float8.scaled_product, dtype)):
        for module in block.modules():  # but for what is in float8
            for name, weight in module._parameters.items():
                if weight is not None and weight.dtype != E4M3:
                    module._parameters[name] = torch.nn.Parameter(weight.to(kind), False)
        monkeypatch.setattr(networks, "product", compute)
        monkeypatch.setattr(float8, "product", compute)
        found.append(Transformer(block)(x.to(kind, copy=True), iter([keys_values.to(kind)])))
    assert found[1].dtype == dtype
    assert relative_error(found[1], found[0]) < 0.05


def storages(given: object, seen: dict[int, int], visited: set[int]) -> dict[int, int]:
    """The memory of all tensors that can be reached from an object: bytes by address."""
    if id(given) in visited or isinstance(given, type | str | bytes):
        return seen
    visited.add(id(given))
    if isinstance(given, Tensor):
        seen[given.untyped_storage().data_ptr()] = given.untyped_storage().nbytes()
        return seen
    inner = [*given.values()] if isinstance(given, dict) else [*given] if isinstance(given, list | tuple | set) else []
    for each in (*inner, *([vars(given)] if hasattr(given, "__dict__") else [])):
        storages(each, seen, visited)
    return seen


@torch.no_grad()
def test_joined_weights_take_no_memory_and_follow_the_modules():
    network = small_unet("sd1").to(memory_format=torch.channels_last)
    to_float8(network)
    before, wanted = sum(storages(network, {}, set()).values()), asked(network, "sd1")
    fused = UNet(network)
    answered(fused, "sd1")
    assert sum(storages([fused, network], {}, set()).values()) < 1.02 * before
    assert torch.equal(asked(network, "sd1"), wanted)
    block = network.middle_block[1].transformer_blocks[0]
    for layer in (block.attn1.to_v, block.attn2.to_v, network.middle_block[0].emb_layers[1]):
        layer.weight_scale.mul_(3)
    for layer in (block.attn1.to_out[0], block.ff.net[2]):
        layer.bias.add_(0.5)
    fused.refresh()
    assert relative_error(answered(fused, "sd1"), answered(UNet(network), "sd1")) <= 1e-6
    assert relative_error(asked(network, "sd1"), wanted) > 0.01


def test_rows_of_one_map_in_any_order_are_multiplied():
    """The meta device refuses what a GPU does: PyTorch's GroupNorm there makes maps whose pixels are neighbours."""
    with torch.device("meta"):
        x, weight, scale = torch.empty(1, 64, 5, 3), torch.empty(32, 64).to(E4M3), torch.empty(32, 1)
        for given in (x, x.to(memory_format=torch.channels_last)):
            assert float8.scaled_product(rows(given), weight, scale, torch.empty(32)).shape == (1, 15, 32)


def test_a_block_that_is_rescued_keeps_its_weights():
    conv = float8.StoredConv(torch.nn.Conv2d(32, 32, 3)).float()  # as system/finite.py copies it
    x = noise(1, 32, 4, 4)
    with torch.no_grad():
        assert torch.equal(conv(x), conv(x))


@torch.no_grad()
def test_by_kernels_it_computes_the_same(monkeypatch):
    from interpreter import repair

    repair(monkeypatch)
    network = small_unet("sd1")
    to_float8(network)
    block, res = network.middle_block[1].transformer_blocks[0], network.middle_block[0]
    fused, kept = TransformerBlock(block), block.attn1.to_q.in_features
    x, keys_values, shifts = noise(1, 6, kept), noise(1, 7, 2 * kept, seed=1), [None, *noise(2, kept, seed=2)]
    names = ("layer_norm", "geglu", "quantise_rows", "dequantise")
    called = list[str]()
    for name in names:
        kernel = getattr(choice.kernels(), name)
        monkeypatch.setattr(
            choice.kernels(), name, lambda *a, kernel=kernel, name=name, **b: called.append(name) or kernel(*a, **b)
        )
    found = {}
    for kernels in ("torch", ",".join(names)):
        with choice.using(kernels):
            image = noise(1, res.in_layers[2].in_channels, 3, 4).to(memory_format=torch.channels_last)
            fused_res = ResBlock(res.in_layers[0], res.in_layers[2], res.out_layers[0], res.out_layers[3], res.skip_connection)
            total, addend = fused(Stream(x.clone(), x), shifts, keys_values)
            found[kernels] = total + addend, fused_res(image, noise(1, len(res.out_layers[3].weight)))[0]
    (stream, picture), (by_kernels, drawn) = found.values()
    assert relative_error(by_kernels, stream) < 2e-3  # where the last digit decides between two of float8
    assert relative_error(drawn, picture) < 1e-6
    assert called == ["layer_norm", "quantise_rows", "layer_norm", "quantise_rows", "layer_norm", "geglu", *["dequantise"] * 2]


@pytest.fixture
def own() -> minisd.Pipeline:
    return minisd.load(device="cpu", dtype="float32", fast=False)


def test_it_is_drawn_by_its_program_as_a_gpu_does(own, monkeypatch):
    whole = own("a red circle", **SMALLEST).latents
    own.engine = own.codec.engine = Cuda(own.unet, False, (*own.text_encoders, own.vae))
    own("a red circle", **SMALLEST)
    old = [weakref.ref(layer.weight) for layer in own.unet.modules() if float8.fits(layer)], weakref.ref(own.engine.fused)
    in_float8(own)
    gc.collect()
    assert len(old[0]) > 100
    assert not any(weight() is not None for weight in old[0])
    assert old[1]() is None
    monkeypatch.setattr(float8, "quantised", as_it_is)
    plain = own("a red circle", **SMALLEST)
    assert {step.way for step in own.stream("a red circle", **SMALLEST)} == {"plain"}  # a CPU has no form for it
    own.engine.reform(form_of(own.unet))
    found = own("a red circle", **SMALLEST)
    assert {step.way for step in own.stream("a red circle", **SMALLEST)} == {"recorded"}
    assert found.metadata[0]["fp8"] is True
    assert relative_error(found.latents, plain.latents) < 1e-4
    assert 1e-4 < relative_error(found.latents, whole) < 0.2
    monkeypatch.undo()
    assert 1e-4 < relative_error(own("a red circle", **SMALLEST).latents, found.latents) < 0.2


def test_what_is_not_all_in_float8_has_no_fused_form():
    network = small_unet("sd1")
    assert form_of(network) is FusedUNet
    to_float8(network)
    assert form_of(network) is UNet
    layer = network.middle_block[1].transformer_blocks[0].attn1.to_q
    network.middle_block[1].transformer_blocks[0].attn1.to_q = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    assert is_float8(network)
    assert form_of(network) is None


def test_whether_a_gpu_multiplies_in_float8_is_tried(monkeypatch):
    here = torch.device("cpu")  # PyTorch has the product there, too
    float8.has_scaled_product.cache_clear()
    assert float8.has_scaled_product(here)
    error: list[Exception] = [RuntimeError("Rowwise scaling is not currently supported on your device\nand more")]

    def refused(*_: object, **__: object) -> Tensor:
        raise error[0]

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    assert float8.has_scaled_product(here)  # it is asked once
    float8.has_scaled_product.cache_clear()
    with pytest.warns(UserWarning, match="fp8: no products in float8 here, .*: Rowwise scaling is not .* on your device$"):
        assert not float8.has_scaled_product(here)
    float8.has_scaled_product.cache_clear()
    error[0] = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):  # which says nothing of the GPU
        float8.has_scaled_product(here)
    float8.has_scaled_product.cache_clear()

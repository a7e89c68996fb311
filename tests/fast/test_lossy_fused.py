"""The UNet in float8 in the form of a GPU: what its modules compute, in half the memory, recorded, and by kernels."""

from __future__ import annotations

import pytest
import torch
from families import SMALL
from helpers import relative_error
from torch import Tensor

import minisd
from minisd.fast import choice
from minisd.fast.cuda import Cuda
from minisd.fast.lossy import float8
from minisd.fast.lossy.float8 import E4M3, is_float8, to_float8
from minisd.fast.lossy.fused import ResBlock, TransformerBlock, UNet, form_of, in_float8
from minisd.fast.unet import FusedUNet
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


@torch.no_grad()
def test_joined_weights_take_no_memory_and_follow_the_modules():
    network = small_unet("sd1").to(memory_format=torch.channels_last)
    to_float8(network)

    def size() -> int:
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in network.parameters()}.values())

    before, wanted = size(), asked(network, "sd1")
    fused = UNet(network)
    held = sum(x.nbytes for x in vars(fused).values() if isinstance(x, Tensor) and x.dtype != E4M3)
    assert size() + held < 1.05 * before
    assert torch.equal(asked(network, "sd1"), wanted)
    block = network.middle_block[1].transformer_blocks[0]
    for layer in (block.attn1.to_out[0], block.ff.net[2]):
        layer.bias.add_(0.5)
    fused.refresh()
    assert relative_error(answered(fused, "sd1"), answered(UNet(network), "sd1")) <= 1e-6


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
            found[kernels] = fused(x.clone(), shifts, keys_values), fused_res(image, noise(1, len(res.out_layers[3].weight)))[0]
    (stream, picture), (by_kernels, drawn) = found.values()
    assert relative_error(by_kernels, stream) < 2e-3  # where the last digit decides between two of float8
    assert relative_error(drawn, picture) < 1e-6
    assert called == ["layer_norm", "quantise_rows", "layer_norm", "quantise_rows", "layer_norm", "geglu", *["dequantise"] * 2]


@pytest.fixture
def own() -> minisd.Pipeline:
    return minisd.load(device="cpu", dtype="float32", fast=False)


def test_it_is_drawn_by_its_program_as_a_gpu_does(own):
    whole = own("a red circle", **SMALLEST).latents
    own.engine = Cuda(own.unet, False, (*own.text_encoders, own.vae))
    in_float8(own)
    plain = own("a red circle", **SMALLEST)
    assert {step.way for step in own.stream("a red circle", **SMALLEST)} == {"plain"}  # a CPU has no form for it
    own.engine.reform(form_of(own.unet))
    found = own("a red circle", **SMALLEST)
    assert {step.way for step in own.stream("a red circle", **SMALLEST)} == {"recorded"}
    assert found.metadata[0]["fp8"] is True
    for each in (plain, found):
        assert 1e-4 < relative_error(each.latents, whole) < 0.2


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
    float8.multiplies.cache_clear()
    assert float8.multiplies(here)

    def refused(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Rowwise scaling is not currently supported on your device")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    assert float8.multiplies(here)  # it is asked once
    float8.multiplies.cache_clear()
    assert not float8.multiplies(here)
    float8.multiplies.cache_clear()

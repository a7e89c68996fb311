"""Weights that stay in oneDNN's order: who looks finds a tensor like any other, and what is written is multiplied with."""

import copy
import io
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from families import SMALL
from torch import nn

import minisd
from minisd.fast.cpu import operations
from minisd.fast.cpu.networks import UNet as CpuUNet
from minisd.fast.cpu.networks import unet_layer
from minisd.fast.cpu.operations import conv3x3, held, linear, ordered
from minisd.fast.cpu.packing import Held, Weight
from minisd.fast.ways import address_of
from minisd.library.places import tiny_checkpoint
from minisd.models.shapes import below
from minisd.models.unet import UNet
from minisd.workbench import blueprint

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    monkeypatch.setattr(operations, "onednn", lambda dtype: True)


def is_packed(weight):
    return isinstance(weight.form, tuple)


@pytest.fixture
def kept():
    """A layer whose weight is packed, that weight, and its numbers."""
    layer = nn.Linear(64, 48)
    numbers = layer.weight.detach().clone()
    weight = held(layer.weight, layer)
    linear(torch.ones(2, 64), weight)
    assert is_packed(weight)
    return layer, weight, numbers


def test_what_asks_for_no_numbers_leaves_it_packed(kept):
    layer, weight, numbers = kept
    parameter = layer.weight
    assert isinstance(parameter, nn.Parameter)
    assert (parameter.shape, parameter.dtype, parameter.stride(), parameter.requires_grad) == (
        (48, 64),
        torch.float32,
        (64, 1),
        True,
    )
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.state_dict(keep_vars=True)["weight"] is parameter
    assert layer.to("cpu") is layer
    assert address_of(parameter) == 0
    assert parameter.nbytes == numbers.nbytes
    assert is_packed(weight)


def through_a_file(layer, save, load):
    file = io.BytesIO()
    save(layer, file)
    file.seek(0)
    return load(file, weights_only=False).weight


READERS = {
    "state_dict": lambda layer: layer.state_dict()["weight"],
    "data": lambda layer: layer.weight.data,
    "detach": lambda layer: layer.weight.detach(),
    "index": lambda layer: layer.weight[:],
    "numpy": lambda layer: torch.from_numpy(layer.weight.requires_grad_(False).numpy()),
    "asarray": lambda layer: torch.from_numpy(np.asarray(layer.weight.requires_grad_(False))),
    "tolist": lambda layer: torch.tensor(layer.weight.tolist()),
    "deepcopy": lambda layer: copy.deepcopy(layer).weight,
    "torch.save": lambda layer: through_a_file(layer, torch.save, torch.load),
    "safetensors": lambda layer: safetensors.torch.load(safetensors.torch.save({"x": layer.weight}))["x"],
    "storage": lambda layer: (
        torch.tensor(layer.weight.untyped_storage().tolist(), dtype=torch.uint8).view(torch.float32).view(48, 64)
    ),
    "double": lambda layer: layer.double().weight.float(),
    "to float64 and back": lambda layer: layer.to(torch.float64).to(torch.float32).weight,
    "forward": lambda layer: (layer(torch.eye(64)) - layer.bias).T.contiguous(),
    "gradient": lambda layer: torch.autograd.grad(layer(x := torch.zeros(48, 64, requires_grad=True)).trace(), x)[0],
}


@pytest.mark.parametrize("name", READERS)
def test_whoever_reads_finds_the_numbers(name, kept):
    layer, _, numbers = kept
    found = READERS[name](layer).detach()
    torch.testing.assert_close(found, numbers, rtol=0, atol=1e-6 if name in ("forward", "gradient") else 0)


@torch.no_grad()
def write_in_place(layer):
    layer.weight.mul_(2)


def write_through_state_dict(layer):
    layer.state_dict()["weight"].mul_(2)


@torch.no_grad()
def write_through_a_view(layer):
    layer.weight.flatten()[:].mul_(2)


@torch.no_grad()
def write_in_a_list(layer):
    other = nn.Parameter(torch.ones(2))
    torch._foreach_mul_([other, layer.weight], 2.0)
    assert other._version == 1


def write_through_load(layer):
    layer.load_state_dict({name: 2 * value if name == "weight" else value for name, value in layer.state_dict().items()})


def write_by_an_optimizer(layer):
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    layer.weight.grad = -layer.weight.detach()
    optimizer.step()


@pytest.mark.parametrize(
    "write",
    [write_in_place, write_through_state_dict, write_through_a_view, write_in_a_list, write_through_load, write_by_an_optimizer],
)
def test_what_is_written_is_multiplied_with_and_counted(write, kept):
    layer, weight, numbers = kept
    before = layer.weight._version
    write(layer)
    assert layer.weight._version > before
    assert torch.equal(linear(torch.eye(64), weight), 2 * linear(torch.eye(64), numbers))
    assert is_packed(weight)
    assert torch.equal(layer.weight, 2 * numbers)


@torch.no_grad()
def test_a_copy_is_not_unpacked_for(kept, monkeypatch):
    """All of it is written over; but nothing is lost where what is copied does not fit, or is a part."""
    layer, weight, numbers = kept
    layer.weight.copy_(layer.weight)
    assert torch.equal(layer.weight, numbers)
    linear(torch.ones(2, 64), weight)
    for wrong in (torch.zeros(7), torch.zeros(48, 64, device="meta"), torch.zeros(2, 48, 64), torch.zeros(48, 64).to_sparse()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            layer.weight.copy_(wrong)
        assert torch.equal(layer.weight, numbers)
        linear(torch.ones(2, 64), weight)
    layer.weight.copy_(torch.ones(64))  # for each row
    assert torch.equal(layer.weight, torch.ones(48, 64))
    linear(torch.ones(2, 64), weight)
    monkeypatch.setattr(
        Weight, "plain", lambda self: self.form if isinstance(self.form, torch.Tensor) else pytest.fail("unpacked")
    )
    before = layer.weight._version
    layer.weight.copy_(2 * numbers.double())
    assert torch.equal(layer.weight, 2 * numbers)
    assert layer.weight._version > before
    monkeypatch.undo()
    one, other = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    kept_other = other.weight.detach().clone()
    both = held(torch.cat([one.weight, other.weight]), one, other)
    linear(torch.eye(8), both)
    one.weight.copy_(torch.zeros(4, 8))
    assert torch.equal(other.weight, kept_other)
    assert not one.weight.any()


def test_another_tensor_in_its_place(kept):
    layer, _, numbers = kept
    layer.weight.data = 3 * numbers
    assert torch.equal(layer.weight, 3 * numbers)
    assert address_of(layer.weight) != 0  # so that the network is fused anew
    again = held(layer.weight, layer)
    assert torch.equal(linear(torch.eye(64), again), 3 * linear(torch.eye(64), numbers))


def test_it_stays_plain_while_somebody_holds_it(kept):
    """What he writes later is the weight, too; the numbers are those of the packed one each time."""
    layer, weight, _ = kept
    x = torch.randn(5, 64)
    before = linear(x, weight)
    mine = layer.state_dict()
    assert torch.equal(linear(x, weight), before)
    assert not is_packed(weight)
    mine["weight"].zero_()
    assert not linear(x, weight).any()
    del mine
    assert not linear(x, weight).any()
    assert is_packed(weight)


def test_a_parameter_stays_the_same_object_with_what_is_noted_on_it():
    layer = nn.Linear(4, 4)
    parameter = layer.weight
    parameter.note = "mine"
    with torch.no_grad():
        parameter.add_(1)
    version = parameter._version
    held(parameter, layer)
    assert layer.weight is parameter
    assert type(parameter) is Held
    assert parameter.note == "mine"
    assert parameter._version == version


def test_a_weight_that_somebody_has_a_view_of_is_left_as_it_is():
    layer = nn.Linear(4, 4)
    view = layer.weight.flatten()
    assert not isinstance(held(layer.weight, layer), Weight)
    assert view._base is layer.weight


def test_a_gradient_and_who_waits_for_one_stay():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    layer.weight.grad = torch.ones(4, 4)
    other.weight.register_hook(lambda gradient: 2 * gradient)
    assert not isinstance(held(layer.weight, layer), Weight)
    assert not isinstance(held(other.weight, other), Weight)
    assert layer.weight.grad.all()


def test_layers_one_above_the_other_and_parts():
    one, other = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    numbers = torch.cat([one.weight, other.weight]).detach()
    weight = held(numbers.clone(), one, other)
    assert torch.equal(linear(torch.eye(8), weight), linear(torch.eye(8), numbers))
    assert is_packed(weight)
    assert torch.equal(other.weight, numbers[4:])
    layer = nn.Linear(8, 8)
    numbers = layer.weight.detach().clone()
    upper, lower = ordered(held(layer.weight, layer, parts=2), 3, parts=2)
    assert torch.equal(torch.cat([upper.to_dense(), lower.to_dense()]), numbers)
    assert torch.equal(layer.weight, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_convolution_by_its_sizes(dtype):
    """Each in the order that its map wants; the module has its numbers in the same order in memory as before."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a processor without bfloat16")
    conv = nn.Conv2d(16, 32, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
    numbers, stride = conv.weight.detach().clone(), conv.weight.stride()
    weight = held(conv.weight, conv)
    for size, step in ((1, 1), (2, 1), (5, 2), (8, 1), (33, 1), (8, 1)):
        x, added = (
            torch.randn(2, 16, size, size, dtype=dtype),
            torch.randn(2, 32, -(-size // step), -(-size // step), dtype=dtype),
        )
        found = conv3x3(x, weight, conv.bias, step, added)
        wanted = F.conv2d(x.double(), numbers.double(), conv.bias.double(), step, 1) + added
        assert is_packed(weight)
        assert (found - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * wanted.abs().max()
    assert torch.equal(conv.weight, numbers)
    assert conv.weight.detach().stride() == stride


def test_threads_that_read_and_write_while_another_multiplies(kept):
    """No write is lost: one thread adds, another multiplies, a third reads."""
    layer, weight, numbers = kept
    done = threading.Event()

    def until_done(what):
        while not done.is_set():
            what()

    others = (lambda: linear(torch.ones(1, 64), weight), lambda: layer.weight.sum())
    threads = [threading.Thread(target=until_done, args=(each,)) for each in others]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(300):
            layer.weight.add_(1)
    done.set()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(layer.weight.detach(), numbers + 300, rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_network_that_has_drawn_holds_its_weights_once():
    """In oneDNN's order, which has zeros where channels are no multiple of 16."""
    shapes = below(SMALL["sd1"].shapes(), "model.diffusion_model")
    weights = blueprint.random_weights(shapes, 3)
    network = UNet(shapes).requires_grad_(False)
    network.load_state_dict(weights)
    fused = CpuUNet(network, unet_layer)
    context = torch.randn(2, 77, fused.kv.shape[1])
    shift, keys_values = fused.shifts(torch.tensor([500.0]), None)[0], fused.keys_values(context)
    first = fused(torch.randn(2, 4, 8, 8), shift, keys_values)
    kept = {id(p.weight): p.weight for p in network.parameters() if type(p) is Held}.values()
    assert kept
    assert all(map(is_packed, kept))
    plain = sum(p.nbytes for p in network.parameters() if type(p) is not Held)
    packed = sum(torch.ops.mkldnn._nbytes(part) for weight in kept for part in weight.form)
    assert plain + packed <= 1.1 * sum(weight.nbytes for weight in weights.values())
    assert first.isfinite().all()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


def test_a_pipeline_that_lives_in_inference_mode():
    """Opened, drawn with, changed and drawn with again: as outside of it."""

    def pictures() -> list[torch.Tensor]:
        pipe = minisd.load(device="cpu", dtype="float32")
        drawn = []
        for loras in ([], [tiny_checkpoint().with_name("tiny-clay.safetensors")], []):
            pipe.set_loras(loras)
            drawn.append(pipe("a red circle", steps=2, seed=1, width=64, height=64).latents)
        return drawn

    with torch.inference_mode():
        found = pictures()
    assert all(torch.equal(one, other) for one, other in zip(found, pictures(), strict=True))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])

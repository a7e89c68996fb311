"""ControlNet-LLLite: the numbers of its formula in float64, and a UNet that is as before afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from controls import lllite_shapes, network, our_unet, vector
from families import SMALL
from helpers import relative_error

from minisd.errors import ShapeError
from minisd.models.control import LLLite
from minisd.models.control.lllite import Lent, applied, check_lllite, layers_of
from minisd.models.shapes import Shapes
from minisd.models.unet import UNet
from minisd.workbench import blueprint

SDXL = SMALL["sdxl"]
Weights = dict[str, torch.Tensor]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> Weights:
    return blueprint.random_weights(lllite_shapes(SDXL.unet()), 3)


@pytest.fixture(scope="module")
def lllite(weights) -> LLLite:
    return network(LLLite, weights)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return our_unet(blueprint.random_weights(SDXL.unet(), 4))


def inputs(height: int = 8, width: int = 12):
    y, _ = vector(SDXL, 2)
    return noise(2, 4, height, width), torch.tensor([981.0, 1.0]), noise(2, 77, SDXL.context, seed=1), y


def picture(height: int = 64, width: int = 96, seed: int = 2) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def formula(weights: Weights, name: str, x: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
    """up(relu(mid([c, relu(down(x))]))), in float64; c: convolutions of the picture in [-1, 1], a ReLU between each two."""
    own = {key.removeprefix(f"{name}."): value.double() for key, value in weights.items() if key.startswith(f"{name}.")}
    c = 2 * hint.double() - 1
    for i in (0, 2, 4):
        if f"conditioning1.{i}.weight" in own:
            kernel = own[f"conditioning1.{i}.weight"]
            c = F.conv2d(F.relu(c) if i else c, kernel, own[f"conditioning1.{i}.bias"], stride=kernel.shape[-1])
    c = c.permute(0, 2, 3, 1).reshape(1, -1, c.shape[1]).expand(len(x), -1, -1)
    down = F.relu(x.double() @ own["down.0.weight"].T + own["down.0.bias"])
    mid = F.relu(torch.cat([c, down], -1) @ own["mid.0.weight"].T + own["mid.0.bias"])
    return mid @ own["up.0.weight"].T + own["up.0.bias"]


@torch.no_grad()
def test_what_each_layer_sees(weights, lllite, unet):
    """Of every layer, its input with the change added, and nothing else of the UNet changed."""
    hint, before, inside = picture(), {}, {}
    layers = {name: layer for name, layer in layers_of(unet).items() if name in lllite.changes()}
    assert len(layers) == 4 * (1 * 2 + 2 * 2 + 2)  # to_q, to_k, to_v of attn1 and to_q of attn2 in each block down to the middle
    seen = {name: layer.weight for name, layer in layers.items()}
    with applied(unet, [Lent(lllite, lllite.seen(hint), 0.7)]):
        hooks = []
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(lambda _, given, name=name: inside.update({name: given[0]})))
            hooks.append(layer.register_forward_pre_hook(lambda _, x, name=name: before.update({name: x[0]}), prepend=True))
        unet(*inputs())
    for hook in hooks:
        hook.remove()
    for name in layers:
        wanted = before[name].double() + 0.7 * formula(weights, name, before[name], hint)
        assert relative_error(inside[name], wanted) <= 1e-6, name
        assert relative_error(inside[name], before[name]) > 1e-3
    assert all(layers[name].weight is weight for name, weight in seen.items())


@torch.no_grad()
def test_leaves_no_trace(lllite, unet):
    keys, given = {key: value.clone() for key, value in unet.state_dict().items()}, inputs()
    plain, lent = unet(*given), [Lent(lllite, lllite.seen(picture()))]
    with applied(unet, lent):
        changed = unet(*given)
    assert relative_error(changed, plain) > 1e-3
    assert torch.equal(unet(*given), plain)
    with pytest.raises(RuntimeError, match="amid"), applied(unet, lent):
        raise RuntimeError("amid")
    assert not any(module._forward_pre_hooks for module in unet.modules())
    assert unet.state_dict().keys() == keys.keys()
    assert all(torch.equal(value, keys[key]) for key, value in unet.state_dict().items())


@torch.no_grad()
def test_rows_and_sums(lllite, unet):
    """For one row the other stays as it is; strengths 0.3 and 0.5 of one are a strength of 0.8."""
    given, seen = inputs(), lllite.seen(picture())
    plain = unet(*given)

    def drawn(*lent: Lent) -> torch.Tensor:
        with applied(unet, lent):
            return unet(*given)

    second = drawn(Lent(lllite, seen, 1.0, torch.tensor([False, True])))
    assert relative_error(second[:1], plain[:1]) <= 1e-6
    assert relative_error(second[1:], drawn(Lent(lllite, seen))[1:]) <= 1e-6
    assert relative_error(drawn(Lent(lllite, seen, 0.3), Lent(lllite, seen, 0.5)), drawn(Lent(lllite, seen, 0.8))) <= 1e-5


@torch.no_grad()
def test_a_size_that_is_odd_after_halving(lllite, unet):
    """A picture of 72x104 has latents of 9x13, and 5x7 and 3x4 below: pieces that are not whole are continued."""
    hint = picture(72, 104)
    with applied(unet, [Lent(lllite, lllite.seen(hint))]):
        found = unet(*inputs(9, 13))
    wider = F.pad(hint, (0, 24, 0, 24), mode="replicate")
    first = next(iter(lllite.changes()))
    wanted = lllite.changes()[first].conditioning1(2 * wider - 1)[:, :, :5, :7].flatten(2).transpose(1, 2)
    assert relative_error(lllite.seen(hint)[first], wanted) <= 1e-6
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("end", "shape"),
    [
        ("down.0.weight", (16, 128, 1, 1)),
        ("mid.0.weight", (16, 40)),
        ("up.0.weight", (64, 16)),
        ("conditioning1.2.weight", (32, 8, 4, 4)),
    ],
)
def test_a_tensor_of_a_wrong_shape_is_named(end, shape):
    shapes = lllite_shapes(SDXL.unet())
    check_lllite(shapes)
    name = next(iter(shapes)).split(".")[0]
    with pytest.raises(ShapeError) as caught:
        check_lllite(Shapes(shapes | {f"{name}.{end}": shape}))
    assert caught.value.key == f"{name}.{end}"


def test_what_sees_the_text_has_no_places():
    shapes = lllite_shapes(SDXL.unet())
    name = next(iter(shapes)).split(".")[0]
    other = name.replace("attn1_to_q", "attn2_to_k")
    moved = {key.replace(name, other): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
    with pytest.raises(ShapeError, match="sees the text"):
        check_lllite(Shapes(moved))

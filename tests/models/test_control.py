"""ControlNet and T2I-Adapter: same weights, same numbers as diffusers, in the UNet as well."""

from __future__ import annotations

import pytest
import torch
from controls import control_shapes, network, our_unet, raw_names, their_adapter, their_control, their_unet, vector
from families import SMALL, Small
from helpers import relative_error

from minisd.errors import ShapeError, UsageError
from minisd.models.control import ControlNet, T2IAdapter
from minisd.models.control.controlnet import check_control
from minisd.models.control.t2i_adapter import check_adapter
from minisd.models.family import SD1, SDXL
from minisd.models.shapes import Shapes
from minisd.workbench import blueprint

LIMIT = 1e-5
FAMILIES = ("sd1", "sd2", "sdxl")
DEEP = Small(SD1, (1, 1, 2, 2), (1, 1, 1, 0))  # with as many input blocks as SD 1 has, which is where an adapter adds to
WIDE = Small(SDXL, (1, 2, 4), (0, 1, 2), middle=2, numbers=6)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(small: Small, height: int = 8, width: int = 12):
    """x, t, context, y, and what diffusers takes in the place of y."""
    y, theirs = vector(small, 2)
    more = {"added_cond_kwargs": theirs} if theirs else {}
    return noise(2, 4, height, width), torch.tensor([981.0, 1.0]), noise(2, 77, small.context, seed=1), y, more


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pooled", [False, True])
@torch.no_grad()
def test_residuals(name, pooled):
    small = SMALL[name]
    weights = blueprint.random_weights(control_shapes(small.unet()), 3)
    control = network(ControlNet, weights, pooled=pooled)
    x, t, context, y, more = inputs(small)
    picture = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    found = control.residuals(x, picture, t, context, y)
    theirs = their_control(weights, small, global_pool_conditions=pooled)
    down, middle = theirs(x, t, context, picture, return_dict=False, **more)
    assert len(found) == len(down) + 1
    for each, wanted in zip(found, (*down, middle), strict=True):
        assert relative_error(each, wanted.expand_as(each)) <= LIMIT
    kept = control.residuals(x, control.hint(picture), t, context, y)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@torch.no_grad()
def test_latents_four_times_smaller_than_the_picture():
    """As the tiny checkpoint has them: one halving of the hint less."""
    small = SMALL["sd1"]
    weights = blueprint.random_weights(blueprint.controlnet(small.unet(), (16, 32, 96)), 3)
    control = network(ControlNet, weights)
    x, t, context, y, _ = inputs(small)
    picture = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    assert control.downscale == 4
    down, middle = their_control(weights, small, conditioning_embedding_out_channels=(16, 32, 96))(
        x, t, context, picture, return_dict=False
    )
    for each, wanted in zip(control.residuals(x, picture, t, context, y), (*down, middle), strict=True):
        assert relative_error(each, wanted) <= LIMIT
    with pytest.raises(UsageError, match="hint: expected a picture of 48x32, 4 times the latents, found 24x16"):
        control.residuals(x, picture[..., :16, :24], t, context, y)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_unet_with_residuals(name):
    small = SMALL[name]
    weights = blueprint.random_weights(small.unet(), 4)
    unet = our_unet(weights)
    x, t, context, y, more = inputs(small)
    plain = unet(x, t, context, y)
    sizes = [h.shape for h in unet.down(x, unet.embed(t, y, x.dtype), context)]
    residuals = [noise(*size, seed=10 + i) for i, size in enumerate(sizes)]
    found = unet(x, t, context, y, residuals)
    *down, middle = residuals
    theirs = their_unet(weights, small)
    wanted = theirs(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle, **more).sample
    assert relative_error(found, wanted) <= LIMIT
    assert relative_error(found, plain) > 0.1
    assert torch.equal(unet(x, t, context, y, [torch.zeros(size) for size in sizes]), plain)
    assert torch.equal(unet(x, t, context, y, (), {}), plain)
    with pytest.raises(ValueError, match="zip"):
        unet(x, t, context, y, down)


ADAPTERS = [("full_adapter", 3), ("full_adapter", 1), ("light_adapter", 3), ("full_adapter_xl", 3), ("full_adapter_xl", 1)]


@pytest.mark.parametrize(("kind", "channels"), ADAPTERS)
@pytest.mark.parametrize("size", [(128, 192), (72, 104)])  # the second is odd after three halvings
@torch.no_grad()
def test_adapter_features(kind, channels, size):
    if kind.endswith("xl") and size == (72, 104):
        pytest.skip("diffusers takes whole patches of 16 pixels only")
    widths = (64, 128, 256) if kind == "light_adapter" else (64, 128, 256, 256)
    theirs = their_adapter(kind, channels, widths)
    adapter = network(T2IAdapter, raw_names(theirs.state_dict(), kind == "light_adapter"))
    picture = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    wanted = theirs(picture.mean(1, keepdim=True) if channels == 1 else picture)
    found = adapter.features(picture)
    assert len(found) == len(wanted) == 4
    for each, other in zip(found, wanted, strict=True):
        assert each.shape == other.shape
        assert relative_error(each, other) <= LIMIT


@pytest.mark.parametrize(("kind", "small"), [("full_adapter", DEEP), ("full_adapter_xl", WIDE)])
@torch.no_grad()
def test_unet_with_features(kind, small):
    """Sizes that are odd after halving, too: a picture of 72x104 has latents of 9x13."""
    widths = tuple(64 * multiplier for multiplier in (*small.multipliers, small.multipliers[-1])[:4])
    theirs = their_adapter(kind, 3, widths)
    adapter = network(T2IAdapter, raw_names(theirs.state_dict(), False))
    weights = blueprint.random_weights(small.unet(), 4)
    unet = our_unet(weights)
    x, t, context, y, more = inputs(small, 9, 13)
    added = adapter.added(torch.rand(1, 3, 72, 104, generator=torch.Generator().manual_seed(2)))
    assert tuple(added) == ((2, 5, 8, 11) if kind == "full_adapter" else (3, 5, 8, 9))
    found = unet(x, t, context, y, (), added)
    features = [each.expand(2, -1, -1, -1) for each in added.values()]
    wanted = their_unet(weights, small)(x, t, context, down_intrablock_additional_residuals=features, **more).sample
    assert relative_error(found, wanted) <= LIMIT
    assert relative_error(found, unet(x, t, context, y)) > 0.01


def test_hint_of_another_size():
    small = SMALL["sd1"]
    control = network(ControlNet, blueprint.random_weights(control_shapes(small.unet()), 3))
    x, t, context, y, _ = inputs(small)
    with pytest.raises(UsageError, match=r"hint: expected a picture of 96x64, 8 times the latents, found 64x64"):
        control.residuals(x, torch.zeros(1, 3, 64, 64), t, context, y)
    with pytest.raises(UsageError, match=r"hint: expected a picture \(B, 3, H, W\)"):
        network(T2IAdapter, raw_names(their_adapter("full_adapter", 3, (64,) * 4).state_dict(), False)).features(
            torch.zeros(1, 4, 64, 64)
        )


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("zero_convs.3.0.weight", (64, 32, 1, 1)),
        ("input_hint_block.8.weight", (96, 31, 3, 3)),
        ("input_hint_block.14.weight", (32, 256, 3, 3)),
        ("middle_block_out.0.weight", (64, 128, 1)),
        ("input_blocks.2.0.in_layers.2.weight", (64, 32, 3, 3)),
    ],
)
def test_a_tensor_of_a_wrong_shape_is_named(key, shape):
    shapes = control_shapes(SMALL["sd1"].unet())
    check_control(shapes)
    with pytest.raises(ShapeError) as caught:
        check_control(Shapes(shapes | {key: shape}))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "shape"),
    [("body.3.block1.weight", (128, 64, 3, 3)), ("conv_in.weight", (64, 100, 3, 3)), ("body.2.in_conv.weight", (128, 64))],
)
def test_a_tensor_of_an_adapter_of_a_wrong_shape_is_named(key, shape):
    weights = raw_names(their_adapter("full_adapter", 3, (64, 128, 128, 128)).state_dict(), False)
    shapes = Shapes({name: tuple(value.shape) for name, value in weights.items()})
    check_adapter(shapes)
    with pytest.raises(ShapeError) as caught:
        check_adapter(Shapes(shapes | {key: shape}))
    assert caught.value.key == key

"""ControlNet Union: same weights, same numbers as diffusers, for one kind of picture and for several."""

from __future__ import annotations

import pytest
import torch
from controls import network, their_union, union_shapes, vector
from families import SMALL
from helpers import relative_error

from minisd.errors import ShapeError, UsageError
from minisd.models.control import ControlNetUnion
from minisd.models.control.union import KINDS, Value, check_union
from minisd.models.shapes import Shapes
from minisd.workbench import blueprint

LIMIT = 1e-5
SDXL = SMALL["sdxl"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return blueprint.random_weights(union_shapes(SDXL.unet()), 3)


@pytest.fixture(scope="module")
def union(weights) -> ControlNetUnion:
    return network(ControlNetUnion, weights)


def inputs(batch: int):
    y, theirs = vector(SDXL, batch)
    x, context = noise(batch, 4, 8, 12), noise(batch, 77, SDXL.context, seed=1)
    return x, torch.full((batch,), 601.0), context, y, {"added_cond_kwargs": theirs}


def pictures(count: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 1, 3, 64, 96, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("kinds", "strengths"),
    [(("canny",), ()), (("openpose", "inpaint"), (0.5, 1.4)), (("hed", "depth", "tile"), ()), (("canny", "mlsd"), (1.0, 0.3))],
)
@torch.no_grad()
def test_residuals(batch, kinds, strengths, weights, union):
    """Also of two pictures with other latents and texts, which have the same hints: there diffusers attends over both of them."""
    x, t, context, y, more = inputs(batch)
    hints = pictures(len(kinds))
    found = union.residuals(x, hints if len(hints) > 1 else hints[0], t, context, y, kinds, strengths)
    numbers = [KINDS[kind] for kind in kinds]
    control_type = torch.zeros(batch, 8)
    control_type[:, numbers] = 1
    down, middle = their_union(weights, SDXL)(
        x, t, context, [hint.expand(batch, -1, -1, -1) for hint in hints], control_type, numbers,
        conditioning_scale=list(strengths or [1.0] * len(kinds)), return_dict=False, **more,
    )  # fmt: skip
    assert len(found) == len(down) + 1
    for each, wanted in zip(found, (*down, middle), strict=True):
        assert relative_error(each, wanted) <= LIMIT
    other = union.residuals(x, hints, t, context, y, ["normal"] * len(hints))
    assert relative_error(other[-1], middle) > 1e-3  # the kind counts


@torch.no_grad()
def test_a_picture_does_not_depend_on_those_beside_it(union):
    x, t, context, y, _ = inputs(2)
    hints, kinds = pictures(2), ("depth", "canny")
    both = union.residuals(x, hints, t, context, y, kinds)
    single = union.residuals(x[1:], hints, t[1:], context[1:], y[1:], kinds)
    for one, other in zip(both, single, strict=True):
        assert relative_error(one[1:], other) <= 2e-6


@pytest.mark.parametrize("copies", [1, 3])
@torch.no_grad()
def test_attention_over_copies_is_the_value(copies):
    """As nn.MultiheadAttention has it in float64, whose queries and keys then make no difference."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(64, 8).double()
    theirs.in_proj_bias.data.normal_()
    ours = network(Value, theirs.state_dict())
    token = noise(1, 64).double()
    wanted, _ = theirs(*[token.expand(copies, 1, 64)] * 3)
    assert relative_error(ours(token.expand(copies, 64)), wanted[:, 0]) <= 1e-12


def test_what_is_refused(union):
    x, t, context, y, _ = inputs(1)
    hints = pictures(2)
    six = network(ControlNetUnion, blueprint.random_weights(union_shapes(SDXL.unet(), 6), 3))
    assert "tile" in union.kinds
    assert "tile" not in six.kinds
    for net, some, kinds, why in (
        (union, hints, ("canny",), "kinds: expected one for each hint, found 1 for 2"),
        (union, hints[0], (), "kinds: expected one for each hint, found 0 for 1"),
        (union, hints[0], ("pose",), "kind: expected one of openpose, depth, .*, found 'pose'"),
        (six, hints[0], ("tile",), "kind: expected one of openpose, .*, segment, found 'tile', which takes ProMax"),
        (union, hints[0][..., :32], ("canny",), "hint: expected a picture of 96x64, 8 times the latents, found 32x64"),
    ):
        with pytest.raises(UsageError, match=why):
            net.residuals(x, some, t, context, y, kinds)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("task_embedding", (8, 32)),
        ("control_add_embedding.linear_1.weight", (256, 2044)),
        ("control_add_embedding.linear_2.weight", (128, 256)),
        ("transformer_layes.0.attn.in_proj_weight", (64, 64)),
        ("transformer_layes.0.attn.in_proj_bias", (64,)),
        ("transformer_layes.0.mlp.c_proj.weight", (32, 256)),
        ("transformer_layes.0.ln_1.weight", (32,)),
        ("spatial_ch_projs.weight", (32, 64)),
    ],
)
def test_a_tensor_of_a_wrong_shape_is_named(key, shape):
    shapes = union_shapes(SDXL.unet())
    check_union(shapes)
    with pytest.raises(ShapeError) as caught:
        check_union(Shapes(shapes | {key: shape}))
    assert caught.value.key == key

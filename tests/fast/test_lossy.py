"""What is sooner or smaller, and less exact: float8 and the reuse of deep features.  Numbers, refusals, recipes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

import minisd
from minisd.cli.main import main
from minisd.fast import choice
from minisd.fast.lossy.cached import SHALLOW, Reusing
from minisd.fast.lossy.float8 import (
    E4M3,
    FLOAT8,
    Float8Linear,
    Rows,
    StoredConv,
    is_float8,
    quantised,
    reference,
    scaled_product,
    to_float8,
    widened,
)
from minisd.fast.lossy.networks import in_float8
from minisd.library.places import tiny_checkpoint
from minisd.recipe import repeat

SMALL = {"width": 32, "height": 32, "steps": 4, "seed": 1, "guidance_scale": 4.0}
PROMPT = "a red circle on a blue background"


def test_every_row_uses_the_whole_range_of_float8():
    x = torch.randn(5, 32) * torch.logspace(-6, 3, 5)[:, None]
    values, scale = quantised(x)
    assert values.dtype == E4M3
    assert torch.equal(values.float().abs().amax(1), torch.full((5,), 448.0))
    assert relative_error(values.float() * scale, x) < 2**-4  # three bits
    assert not quantised(torch.zeros(2, 16))[0].float().any()


def test_float8_is_made_wider_by_its_bits():
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    numbers = every[~every.float().isnan()]
    assert len(numbers) == 254
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(widened(numbers, dtype), numbers.to(dtype))


def test_rows_in_float8_are_a_tensor_like_any_other():
    x = torch.randn(2, 3, 32)
    rows, (values, scale) = Rows.of(x), quantised(x)
    assert rows.shape == x.shape
    assert torch.equal(rows + 1, values.float() * scale + 1)
    assert rows.isfinite().all()
    assert type(rows.reshape(6, 32)) is torch.Tensor
    assert Rows.of(rows) is rows
    assert Rows.of(x.bfloat16()).whole().dtype == torch.bfloat16


def test_a_float8_layer_is_its_formula_and_near_its_layer():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(2, 7, 64)
    with torch.no_grad():
        made = Float8Linear(layer)
        (p, a), (q, s) = quantised(x), quantised(layer.weight)
        formula = torch.einsum("blk,nk->bln", p.double() * a.double(), q.double() * s.double()) + layer.bias.double()
        assert relative_error(made(x), formula) < 1e-6
        assert 1e-3 < relative_error(made(x), layer(x)) < 0.05
        assert made(x.bfloat16()).dtype == torch.bfloat16
        wide = F.linear(x, q.float() * s)  # with weights alone in float8, the error is less
        assert relative_error(wide + layer.bias, layer(x)) < relative_error(reference(x, q, s, layer.bias), layer(x))
    assert made.weight.element_size() == 1


def test_what_a_gpu_multiplies_is_what_the_formula_says():
    """PyTorch has the same product for a CPU, too."""
    layer, x = nn.Linear(64, 48), torch.randn(2, 7, 64).bfloat16()
    weight, scale = quantised(layer.weight.data)
    for bias in (None, layer.bias.data):
        wanted = reference(x.float(), weight, scale, bias)
        for compute in (scaled_product, reference):
            found = compute(x, weight, scale, bias)
            assert found.shape == wanted.shape
            assert relative_error(found, wanted) < 4e-3  # bfloat16's rounding


def test_a_convolution_keeps_its_weights_in_float8_and_multiplies_as_before():
    layer, x = nn.Conv2d(16, 32, 3, 2, 1), torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        made = StoredConv(layer)
        weight, scale = quantised(layer.weight, (1, 2, 3))
        wide = F.conv2d(x, weight.float() * scale, layer.bias, 2, 1)
        assert relative_error(made(x), wide) < 1e-6
        assert 1e-3 < relative_error(made(x), layer(x)) < 0.05
    assert scale.shape == (32, 1, 1, 1)


def test_a_transformer_computes_the_same_with_rows_from_the_kernels(own, monkeypatch):
    from interpreter import repair

    repair(monkeypatch)
    block = own.unet.middle_block[1].transformer_blocks[0]
    to_float8(block, inside=True)
    x, context = torch.randn(1, 6, block.norm1.weight.shape[0]), torch.randn(1, 77, own.unet.context_channels)
    with torch.no_grad():
        plain = block(x, context)
        asked = list[str]()
        real = choice.kernels().layer_norm, choice.kernels().geglu
        for kernel in real:
            name = kernel.__name__
            monkeypatch.setattr(
                choice.kernels(), name, lambda *a, kernel=kernel, name=name, **b: asked.append(name) or kernel(*a, **b)
            )
        with choice.using("layer_norm,geglu"):
            assert relative_error(block(x, context), plain) < 2e-3  # where the last digit decides between two of float8
        assert asked == ["layer_norm", "layer_norm", "layer_norm", "geglu"]
        assert relative_error(block.float()(x, context), plain) < 1e-6  # as a block is that is rescued


@pytest.fixture
def own() -> minisd.Pipeline:
    return minisd.load(device="cpu", dtype="float32")


def test_drawing_in_float8_is_near_halves_weights_and_is_drawn_again(own, tiny):
    def size():
        return sum(x.nbytes for x in (*own.unet.parameters(), *own.unet.buffers()))

    whole, before = tiny(PROMPT, **SMALL).latents, size()
    in_float8(own)
    assert sum(isinstance(module, FLOAT8) for module in own.unet.modules()) > 100
    assert size() < 0.27 * before  # of float32
    result = own(PROMPT, **SMALL)
    assert 1e-4 < relative_error(result.latents, whole) < 0.2
    recipe = result.metadata[0]
    assert recipe["fp8"] is True
    assert "changed" not in recipe
    assert "fp8" not in tiny(PROMPT, **SMALL).metadata[0]
    assert is_float8(own.unet)
    assert not is_float8(tiny.unet)


def test_float8_is_told_as_numbers_and_not_overwritten(own):
    before = own.model.state_dict()
    in_float8(own)
    found = own.model.state_dict()
    assert found.keys() == before.keys()
    for key, weight in found.items():
        assert weight.dtype == before[key].dtype
        assert relative_error(weight, before[key]) < 0.05
    held = own.model.state_dict(keep_vars=True)
    assert all(held[f"model.diffusion_model.{name}"] is weight for name, weight in own.unet.named_parameters())
    with pytest.raises(minisd.UsageError, match=r"load_state_dict: expected no weights for a UNet in float8, found .*weight"):
        own.unet.load_state_dict(own.unet.state_dict())


def test_float8_is_neither_saved_nor_layered_on(own, tmp_path):
    in_float8(own)
    with pytest.raises(minisd.UsageError, match="save: expected weights as the file has them, found float8"):
        own.save(tmp_path / "x.safetensors")
    with pytest.raises(minisd.UsageError, match="loras: expected none with fp8"):
        own.set_loras([str(tiny_checkpoint().with_name("tiny-outline.safetensors"))])
    with pytest.raises(minisd.UsageError, match="fp8: expected linear layers"):
        in_float8(own)
    with pytest.raises(minisd.UsageError, match="fp8: expected true or false, found 'yes'"):
        minisd.load(fp8="yes")


def test_where_float8_makes_no_numbers_is_said(own):
    in_float8(own)
    own(PROMPT, **(SMALL | {"steps": 1}), rescue=True)  # which asks all parts of the network for their numbers
    own.unet.time_embed[0].bias.data.fill_(torch.inf)
    with pytest.raises(minisd.NonFiniteError, match=r"time_embed\.0 \(StoredLinear\): its bias holds NaN or infinity"):
        own(PROMPT, **SMALL)


def test_a_batch_and_a_server_are_told_of_float8():
    from minisd.cli.serve import parser as serving
    from minisd.cli.work.batch import job_of, parser

    assert job_of(parser().parse_args(["-", "-o", "x", "--fp8"])).loading == {"fp8": True}
    assert job_of(parser().parse_args(["-", "-o", "x"])).loading == {}
    assert serving().parse_args(["--fp8"]).fp8


@pytest.mark.slow
def test_the_command_line_draws_in_float8_and_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--size", "32x32", "--steps", "2", "--seed", "1", "--device", "cpu", "--dtype", "float32"]
    assert main([PROMPT, *size, "--fp8", "--cache", "2", "-o", "a.png"]) == 0
    assert main(["again", "a.png", "-o", "b.png"]) == 0
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))


def counted(pipe, block, **options):
    """How often a block was computed, and the result."""
    calls = []
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    try:
        return len(calls), pipe(PROMPT, **(SMALL | {"steps": 6} | options)), calls
    finally:
        hook.remove()


def test_the_deep_part_is_computed_every_third_time(tiny):
    _, whole, calls = counted(tiny, tiny.unet.middle_block)
    assert len(calls) == 6
    _, result, calls = counted(tiny, tiny.unet.middle_block, cache=3)
    assert len(calls) == 2
    assert len(counted(tiny, tiny.unet.input_blocks[SHALLOW - 1], cache=3)[2]) == 6
    less = counted(tiny, tiny.unet.middle_block, cache=2)[1]
    assert 1e-4 < relative_error(less.latents, whole.latents) < relative_error(result.latents, whole.latents) < 1
    assert result.metadata[0]["cache"] == 3
    assert result.metadata[0]["way"] == "plain"
    again = tiny(repeat(result.metadata[0], tiny_checkpoint()))
    assert torch.equal(again.latents, result.latents)


def test_a_new_batch_is_computed_whole_and_a_whole_call_is_the_network(tiny):
    torch.manual_seed(0)
    unet = tiny.unet
    dtype = next(unet.parameters()).dtype
    x, t = torch.randn(2, unet.in_channels, 8, 8).to(dtype), torch.full((2,), 500.0)
    context = torch.randn(2, 77, unet.context_channels).to(dtype)
    reusing = Reusing(unet, 3)
    with torch.no_grad():
        true = unet(x, t, context)
        assert torch.equal(reusing(x, t, context), true)
        assert torch.equal(reusing(x, t, context), true)  # by what was kept: nothing has changed
        assert not torch.equal(reusing(2 * x, t, context), unet(2 * x, t, context))
        assert torch.equal(reusing(2 * x, t, context), unet(2 * x, t, context))  # the fourth is whole again
        assert torch.equal(reusing(x[:1], t[:1], context[:1]), unet(x[:1], t[:1], context[:1]))
    assert len(counted(tiny, unet.middle_block, cache=6, cfg_until=0.5)[2]) == 2  # guidance ends: half the batch


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": 0}, "cache: expected a whole number from 1 to 20, found 0"),
        ({"cache": 2, "rescue": True}, "cache: expected 1 beside rescue, which looks into every block of the UNet, found 2"),
    ],
)
def test_where_nothing_can_be_reused_it_is_refused(options, said, tiny):
    with pytest.raises(minisd.UsageError) as error:
        tiny(PROMPT, **(SMALL | options))
    assert str(error.value) == said

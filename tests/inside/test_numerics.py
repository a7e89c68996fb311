"""Numbers compared layer by layer: what is planted is found in its module, and healthy formats stay within their bounds."""

from __future__ import annotations

import copy
import json
import xml.dom.minidom
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minisd
from minisd.cli import main
from minisd.fast.cpu.packing import Weight
from minisd.fast.lossy.float8 import FLOAT8, Float8LayerNorm
from minisd.inside.layers import ULPS, by_part, histogram, numerics
from minisd.inside.shown.numerics import as_text, first_nonfinite, plot
from minisd.inside.sides import Side, side
from minisd.inside.sketches import parts_of
from minisd.models import unet, vae
from minisd.models.ops import attention
from minisd.models.unet import timestep_embedding

PROMPT = "a red circle on a blue background"
REQUEST = minisd.Request(PROMPT, steps=2, seed=1, width=32, height=32)
UNET, VAE, TEXT = "model.diffusion_model", "first_stage_model", "cond_stage_model.transformer.text_model"


@pytest.fixture(scope="module")
def a() -> Side:
    return side("float32", None, "cpu")


def set_weight(module: nn.Module) -> None:
    largest = np.unravel_index(int(module.weight.abs().argmax()), module.weight.shape)
    module.weight.data[largest] *= 1.01


def other_eps(module: nn.Module) -> None:
    module.eps = 1e-3


def forward(make: Callable[[nn.Module], Callable[..., torch.Tensor]]) -> Callable[[nn.Module], None]:
    def plant(module: nn.Module) -> None:
        module.forward = make(module)

    return plant


def in_bfloat16(module: nn.Module) -> Callable[..., torch.Tensor]:
    own = module.forward
    return lambda x: own(x.bfloat16().float()).bfloat16().float()


def without_silu(norm: nn.Module) -> Callable[..., torch.Tensor]:
    return lambda x: F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def unscaled(attn: nn.Module) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        return attn.to_out(attention(attn.to_q(x) * 1.1, attn.to_k(context), attn.to_v(context), attn.heads))

    return run


def swapped_sinusoids(network: nn.Module) -> None:
    def embed(t: torch.Tensor, y: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return network.time_embed(timestep_embedding(t, network.channels).roll(network.channels // 2, -1).to(dtype))

    network.embed = embed


def heads(count: int) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "heads", count)


MIDDLE = f"{UNET}.middle_block.1.transformer_blocks.0"
PLANTED: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "a weight of a convolution": (f"{UNET}.input_blocks.4.0.in_layers.2", set_weight),
    "a weight of a linear layer": (f"{MIDDLE}.ff.net.2", set_weight),
    "a bias": (f"{UNET}.out.2", lambda module: module.bias.data.add_(0.01)),
    "the epsilon of a GroupNorm": (f"{UNET}.input_blocks.1.0.out_layers.0", other_eps),
    "the epsilon of a LayerNorm": (f"{MIDDLE}.norm2", other_eps),
    "the epsilon of one in the VAE": (f"{VAE}.decoder.mid.block_1.norm1", other_eps),
    "a GroupNorm in bfloat16": (f"{UNET}.output_blocks.2.0.in_layers.0", forward(in_bfloat16)),
    "a LayerNorm in bfloat16": (f"{TEXT}.final_layer_norm", forward(in_bfloat16)),
    "a convolution in bfloat16": (f"{VAE}.decoder.conv_out", forward(in_bfloat16)),
    "a GroupNorm without its SiLU": (f"{UNET}.output_blocks.5.0.out_layers.0", forward(without_silu)),
    "a GroupNorm in 16 groups": (f"{UNET}.middle_block.1.norm", lambda module: setattr(module, "num_groups", 16)),
    "another number of heads": (f"{MIDDLE}.attn1", heads(4)),
    "attention of another scale": (f"{MIDDLE}.attn2", forward(unscaled)),
    "causal attention without its mask": (
        f"{TEXT}.encoder.layers.1.self_attn",
        forward(lambda m: lambda x: m.out_proj(attention(m.q_proj(x), m.k_proj(x), m.v_proj(x), m.heads))),
    ),
    "exact GELU for the quick one": (
        f"{TEXT}.encoder.layers.2.mlp", forward(lambda m: lambda x: m.fc2(F.gelu(m.fc1(x)))),
    ),
    "GEGLU by tanh": (
        f"{MIDDLE}.ff.net.0",
        forward(lambda m: lambda x: (lambda v, g: v * F.gelu(g, approximate="tanh"))(*m.proj(x).chunk(2, -1))),
    ),
    "a row of the vocabulary": (
        f"{TEXT}.embeddings.token_embedding", lambda module: module.weight.data[49406].add_(0.01)  # that of the start
    ),
    "a row of the positions": (
        f"{TEXT}.embeddings", lambda module: module.position_embedding.weight.data[3].add_(0.01)
    ),
    "sines and cosines the other way round": (UNET, swapped_sinusoids),
    "a bilinear upsampling": (
        f"{VAE}.decoder.up.1.upsample",
        forward(lambda m: lambda x: m.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))),
    ),
    "a downsampling that pads reflected": (
        f"{UNET}.input_blocks.3.0.op", lambda module: (
            setattr(module, "padding_mode", "reflect"), setattr(module, "_reversed_padding_repeated_twice", [1, 1, 1, 1])
        ),
    ),
    "a weight behind the latents": (f"{VAE}.post_quant_conv", set_weight),
}  # fmt: skip


DEFAULT = ("a weight of a convolution", "the epsilon of a GroupNorm", "a GroupNorm in bfloat16", "another number of heads")


@pytest.mark.parametrize("what", [each if each in DEFAULT else pytest.param(each, marks=pytest.mark.slow) for each in PLANTED])
def test_planted_errors_are_found_in_their_modules(what, a):
    """All 22 kinds, with bound 0: in the same number format nothing else differs at all."""
    name, plant = PLANTED[what]
    b = side(minisd.load(device="cpu", dtype="float32", fast=False), None, None)
    with torch.no_grad():
        plant(b.pipe.model.get_submodule(name))
    first = numerics(a, b, REQUEST)["first"]
    assert first["name"] == name
    assert first["entering"] > 0


@pytest.mark.parametrize("spec", ["bfloat16", "float16-emulated"])
def test_an_error_is_found_among_those_of_a_number_format(spec, a):
    """Beyond what the format costs: a weight of the largest size that is twice as large."""
    b, name = side(spec, None, "cpu", a), f"{UNET}.middle_block.0.out_layers.3"
    with torch.no_grad():
        b.pipe.model.get_submodule(name).weight.mul_(1.05)
    assert numerics(a, b, REQUEST)["first"]["name"] == name


@pytest.mark.parametrize(("spec", "entering", "accumulated"), [("bfloat16", 0.008, 0.02), ("float16-emulated", 0.001, 0.003)])
def test_healthy_formats_are_within_their_bounds(spec, entering, accumulated, a):
    facts = numerics(a, side(spec, None, "cpu", a), REQUEST)
    assert facts["first"] is None
    layers = facts["layers"]
    assert 0 < max(layer["entering"] for layer in layers if layer["inner"]) < entering
    assert 0 < max(layer["accumulated"] for layer in layers) < accumulated
    ulps = facts["ulps"]
    assert sum(ulps.values()) > 1e6
    assert sum(ulps[name] for name in ("0", "0.5", "1", "2")) > 0.9 * sum(ulps.values())
    assert all(layer["margin"] == pytest.approx(65_504 / layer["largest"]) for layer in layers)
    text = as_text(facts, [name for name, _ in parts_of(a.pipe.model)])
    assert f"{UNET}.middle_block " in text
    xml.dom.minidom.parseString(plot(facts))


def test_largest_numbers_are_those_of_the_drawing(a):
    name, pipe = f"{UNET}.input_blocks.5", a.pipe
    facts = numerics(a, side("float32", None, "cpu", a), REQUEST)
    with minisd.tap(pipe, name) as values:
        pipe(REQUEST)
    (layer,) = (each for each in facts["layers"] if each["name"] == name)
    assert layer["largest"] == max(float(value.output.abs().max()) for value in values)
    rows = by_part(facts, [name])
    assert rows[0]["largest"] >= layer["largest"]
    assert facts["first"] is None
    assert facts["ulps"]["0"] == sum(facts["ulps"].values())


SMALL = minisd.Request(PROMPT, steps=1, seed=1, width=16, height=16)


def joined(block):
    """The weights of q, k and v, one above the other, as a GPU or a CPU multiplies with them."""
    weights = block.qkv if hasattr(block, "qkv") else block.weights
    return weights.plain() if isinstance(weights, Weight) else weights


def layer_of(b: Side, name: str) -> Any:
    return b.fused.parts[name].layer


def add_to(name: str, attribute: str) -> Callable[[Side], None]:
    """To half of the channels: a norm behind takes off what all of them have."""
    return lambda b: getattr(layer_of(b, name), attribute)[..., ::2].add_(0.01)


def other_class(name: str, method: str, computed: Callable[..., Any]) -> Callable[[Side], None]:
    """Has a fused layer compute something else."""

    def plant(b: Side) -> None:
        layer = layer_of(b, name)
        layer.__class__ = type(type(layer).__name__, (type(layer),), {method: computed})

    return plant


def bilinear(self: Any, x: torch.Tensor, size: Any = None) -> Any:
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear")), None


def other_norm(name: str) -> Callable[[Side], None]:
    def plant(b: Side) -> None:
        layer = layer_of(b, name)
        layer.norm2 = copy.deepcopy(layer.norm2)
        layer.norm2.eps = 1e-2

    return plant


def time_off_by_one(b: Side) -> None:
    own = b.fused.network.shifts
    b.fused.network.shifts = lambda t, y: own(t + 1, y)


def blocks_in_the_wrong_order(b: Side) -> None:
    up = b.fused.network.up
    up[4], up[5] = up[5], up[4]


def middle_turned_round(b: Side) -> None:
    parts = b.fused.decoder.parts
    parts[0], parts[2] = parts[2], parts[0]


def weight_scaled(name: str) -> Callable[[Side], None]:
    return lambda b: b.pipe.model.get_submodule(name).weight.mul_(1.001)


FUSED_KINDS = (
    unet.ResBlock, unet.BasicTransformerBlock, unet.SpatialTransformer, unet.Downsample, unet.Upsample,
    vae.ResnetBlock, vae.AttnBlock, vae.Upsample,
)  # fmt: skip
BLOCK, UP = f"{UNET}.output_blocks.1.1.transformer_blocks.0", f"{UNET}.output_blocks.2.2"
BOTH, GPU = ("fast", "cpu:fast"), ("fast",)
PLANTED_FUSED: dict[str, tuple[tuple[str, ...], str, Callable[[Side], None]]] = {
    "a weight of a convolution": (BOTH, f"{UNET}.input_blocks.4.0", weight_scaled(f"{UNET}.input_blocks.4.0.out_layers.3")),
    "a weight of a downsampling": (BOTH, f"{UNET}.input_blocks.3.0", weight_scaled(f"{UNET}.input_blocks.3.0.op")),
    "a weight of the time embedding": (BOTH, f"{UNET}.time_embed", weight_scaled(f"{UNET}.time_embed.2")),
    "a weight out of a transformer": (
        BOTH, f"{UNET}.middle_block.1", weight_scaled(f"{UNET}.middle_block.1.proj_out"),
    ),
    "the joined weights of q, k and v": (BOTH, BLOCK, lambda b: joined(layer_of(b, BLOCK))[5].mul_(1.1)),
    "keys and values of the prompt": (
        BOTH, BLOCK, lambda b: b.fused.network.kv.split(b.fused.network.keys_values_sizes)[4].mul_(1.01),
    ),
    "another number of heads": (BOTH, BLOCK, lambda b: setattr(layer_of(b, BLOCK), "heads", 4)),
    "what the time embedding adds to a block": (
        BOTH, f"{UNET}.output_blocks.0.0",
        lambda b: b.fused.network.shift_bias.split(b.fused.network.shift_sizes)[6][::2].add_(0.01),
    ),
    "the epsilon of a GroupNorm": (BOTH, f"{UNET}.output_blocks.3.0", other_norm(f"{UNET}.output_blocks.3.0")),
    "an upsampling that is bilinear": (BOTH, UP, other_class(UP, "__call__", bilinear)),
    "biases that are stale": (GPU, f"{UNET}.input_blocks.1.0", add_to(f"{UNET}.input_blocks.1.0", "bias")),
    "those of a block before a transformer": (GPU, f"{UNET}.input_blocks.4.0", add_to(f"{UNET}.input_blocks.4.0", "bias")),
    "what a norm takes off again": (GPU, f"{UNET}.middle_block.1", add_to(f"{UNET}.middle_block.1", "shift")),
    "what the stream lacks": (GPU, BLOCK, lambda b: layer_of(b, BLOCK.split(".transformer")[0]).owed.add_(0.01)),
    "another end": (BOTH, f"{UNET}.out", lambda b: setattr(b.fused.network, "out", b.pipe.unet.out[2])),
    "a timestep": (BOTH, UNET, time_off_by_one),
    "two blocks that changed places": (BOTH, UNET, blocks_in_the_wrong_order),
    "a weight in the decoder": (BOTH, f"{VAE}.decoder.up.1.block.0", weight_scaled(f"{VAE}.decoder.up.1.block.0.conv2")),
    "a bias in the decoder": (BOTH, f"{VAE}.decoder.mid.block_2", lambda b: b.fused.decoder.shifts[1][::2].add_(0.01)),
    "the VAE's attention": (BOTH, f"{VAE}.decoder.mid.attn_1", add_to(f"{VAE}.decoder.mid.attn_1", "bias")),
    "an upsampling of the decoder": (
        BOTH, f"{VAE}.decoder.up.2.upsample", other_class(f"{VAE}.decoder.up.2.upsample", "__call__", bilinear),
    ),
    "the decoder's last convolution": (BOTH, f"{VAE}.decoder.conv_out", weight_scaled(f"{VAE}.decoder.conv_out")),
    "two layers of the decoder that changed places": (BOTH, VAE, middle_turned_round),
}  # fmt: skip
ALWAYS = {("keys and values of the prompt", "cpu:fast"), ("what the stream lacks", "fast"), ("a bias in the decoder", "fast")}
FUSED_CASES = [
    pytest.param(what, spec, marks=[] if (what, spec) in ALWAYS else pytest.mark.slow)
    for what, (specs, _, _) in PLANTED_FUSED.items()
    for spec in specs
]


@pytest.mark.parametrize(("what", "spec"), FUSED_CASES)
def test_planted_errors_of_a_fused_form_are_found_in_their_layers(what, spec, a):
    """All 23 kinds, as people make them: in weights, in what is kept beside them, in arithmetic, in the order of layers."""
    _, name, plant = PLANTED_FUSED[what]
    b = side(spec, None, "cpu", a)
    with torch.no_grad():
        plant(b)
    assert numerics(a, b, SMALL)["first"]["name"] == name


@pytest.mark.parametrize("spec", ["fast", "cpu:fast"])
def test_fused_forms_layer_by_layer(spec, a):
    b = side(spec, None, "cpu", a)
    facts = numerics(a, b, REQUEST)
    layers = {layer["name"]: layer for layer in facts["layers"]}
    wanted = [name for name, module in a.pipe.model.named_modules() if isinstance(module, FUSED_KINDS)]
    assert {name for name in wanted if "encoder" not in name.split(".")} | {UNET, VAE} <= layers.keys()
    assert facts["first"] is facts["first_accumulated"] is None
    assert 0 < max(max(layer["entering"], layer["accumulated"]) for layer in layers.values()) < 3e-6
    assert sum(layer["entering"] > 0 and layer["accumulated"] > 0 for layer in layers.values()) > len(layers) / 2, layers
    assert f"{UNET}.input_blocks.4 " in as_text(facts, [name for name, _ in parts_of(a.pipe.model)])
    assert all(type(part.layer).__module__ != "minisd.inside.fused" for part in b.fused.parts.values())  # nobody watches any more


def test_errors_of_a_fused_form_accumulate_from_their_layer_on(a):
    b, name = side("cpu:fast", None, "cpu", a), f"{UNET}.input_blocks.5.1"
    with torch.no_grad():
        weight_scaled(f"{name}.proj_out")(b)
    facts = numerics(a, b, SMALL)
    assert facts["first"]["name"] == facts["first_accumulated"]["name"] == name
    assert [layer["name"] for layer in facts["layers"] if layer["entering"] > 1e-5 and layer["name"] != UNET] == [name]


def test_float8_as_it_draws(a):
    """The layers with weights in float8, and the norms of the transformers, which hand their rows on in it, and no others; their
    errors are those of 4 digits of 2 (arXiv 2209.05433, e4m3)."""
    b = side("fp8", None, "cpu", a)
    facts = numerics(a, b, SMALL)
    errors = {layer["name"]: layer["entering"] for layer in facts["layers"] if layer["inner"]}
    off = {name for name, error in errors.items() if error > 0}
    kinds = (*FLOAT8, Float8LayerNorm)
    assert facts["first"] is None
    assert off == {name for name, module in b.pipe.model.named_modules() if isinstance(module, kinds)}
    # A number is rounded by up to 2^-4 or 2^-5 of itself, evenly: the root of the mean square is that over the root of 3.
    assert 2**-5 / 3**0.5 < max(errors.values()) < 2**-4
    b.pipe.model.get_submodule(f"{BLOCK}.ff.net.2").weight_scale.mul_(1.2)
    assert numerics(a, b, SMALL)["first"]["name"] == f"{BLOCK}.ff.net.2"


def test_short_names(a):
    assert [side(spec, None, "cpu", a).label for spec in ("bf16", "fp16")] == ["bfloat16", "float16-emulated"]


def test_units_in_the_last_place():
    wanted = torch.tensor([1.0, 1.0, 1.0, 3.0, 0.0, 1e4, 1.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        off = torch.tensor([0.0, 0.4 * eps, eps, 3 * 2 * eps, 0.0, 0.0, float("nan")], dtype=torch.float64)
        counts = histogram(wanted.double() + off, wanted, dtype)
        places = dict(zip([*map(str, ULPS), "more"], counts.tolist(), strict=True))
        assert {name: count for name, count in places.items() if count} == {"0.0": 3, "0.5": 1, "1.0": 1, "4.0": 1, "more": 1}


def test_what_cannot_be_compared_is_told(a, reduced_file):
    with pytest.raises(minisd.UsageError, match="b: expected the same network as a, found "):
        numerics(a, side(str(reduced_file), None, "cpu", a), REQUEST)
    with pytest.raises(minisd.UsageError, match="a: expected one of float32, bfloat16, float16, found 'fp8'"):
        side("fp8", None, "cpu")
    with pytest.raises(minisd.UsageError, match="b: expected another pipeline"):
        numerics(a, a, REQUEST)
    with pytest.raises(minisd.CheckpointError):
        side("fp9", None, "cpu", a)


def test_nan_names_the_first_module(a):
    assert first_nonfinite(a.pipe, REQUEST) is None
    weight = a.pipe.unet.output_blocks[3][0].in_layers[2].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] = np.inf
        found = first_nonfinite(a.pipe, REQUEST)
        weight.copy_(kept)
    assert found["name"] == f"{UNET}.output_blocks.3.0.in_layers.2"
    assert found["weight"] == "weight"
    assert np.isfinite(found["input_range"]).all()
    assert "holds NaN or infinity" in found["words"]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["numerics", "--steps", "1", "--size", "32x32", "--device", "cpu"]
    assert main([*line, "--plot", "n.svg"]) == 0
    assert "first layer whose own error is past 0.02: none" in capsys.readouterr().out
    assert (tmp_path / "n.svg").read_text().startswith("<svg")
    assert main([*line, "--b", "tiny-lit", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bound"] == 0
    assert facts["first"]["entering"] > 0
    assert main([*line, "--nan"]) == 0
    assert "finite" in capsys.readouterr().out
    assert main([*line, "--plot", "n.png"]) == 2
    assert main([*line, "--nan", "--layers"]) == 2

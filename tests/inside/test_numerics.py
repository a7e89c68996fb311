"""Numbers compared layer by layer: what is planted is found in its module, and healthy formats stay within their bounds."""

from __future__ import annotations

import json
import xml.dom.minidom
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minisd
from minisd.cli import main
from minisd.inside.layers import ULPS, by_part, histogram, numerics
from minisd.inside.shown.numerics import as_text, first_nonfinite, plot
from minisd.inside.sides import Side, side
from minisd.inside.sketches import parts_of
from minisd.models.ops import attention
from minisd.models.unet import timestep_embedding

PROMPT = "a red circle on a blue background"
REQUEST = minisd.Request(PROMPT, steps=2, seed=1, width=32, height=32)
UNET, VAE, TEXT = "model.diffusion_model", "first_stage_model", "cond_stage_model.transformer.text_model"


@pytest.fixture(scope="module")
def a() -> Side:
    return side("float32", None, "cpu")


def set_weight(module: nn.Module) -> None:
    module.weight.data.view(-1)[int(module.weight.abs().argmax())] *= 1.01


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


def test_fused_network_as_a_whole(a):
    facts = numerics(a, side("fast", None, "cpu", a), REQUEST)
    assert [layer["name"] for layer in facts["layers"]] == [UNET]
    assert 0 < facts["layers"][0]["entering"] < 1e-5


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
    with pytest.raises(minisd.UsageError, match="float16-emulated on a CPU"):
        side("float16", None, "cpu", a)
    with pytest.raises(minisd.CheckpointError):
        side("fp8", None, "cpu", a)


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

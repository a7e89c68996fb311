"""Files of ControlNets, Control-LoRAs and T2I-Adapters, in all the names that they have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from controls import control_shapes, our_unet, raw_names, their_adapter, their_control, vector
from families import SMALL, options_of
from helpers import manifest, relative_error, write_holes
from loras import ATTENTION, whole
from safetensors.torch import save_file

import minisd
from minisd.addons.controls.files import built
from minisd.addons.controls.names import told
from minisd.errors import CheckpointError, UsageError
from minisd.files.checkpoint import open_checkpoint
from minisd.models.control import ControlNet, T2IAdapter
from minisd.models.control.controlnet import check_control
from minisd.models.shapes import Shapes
from minisd.workbench import blueprint

LIMIT = 1e-5
SD1 = SMALL["sd1"]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A small ControlNet of SD 1.x."""
    return blueprint.random_weights(control_shapes(SD1.unet()), 3)


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return blueprint.random_weights(SD1.unet(), 4)


def same(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    found = network.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["sd15", "sd21", "sd15-diffusers", "sdxl-diffusers"])
def test_every_published_controlnet_has_its_keys(name, tmp_path):
    shapes = manifest(f"controlnet-{name}")
    checkpoint = open_checkpoint(write_holes(tmp_path / "control.safetensors", shapes))
    title, names = told(checkpoint)
    assert title == "a ControlNet"
    ours = Shapes({key: shapes[own] for key, own in names.items()})
    control = built(checkpoint, title, names, ours, ControlNet, check_control)
    assert {names[key]: tuple(value.shape) for key, value in control.state_dict().items()} == shapes
    width = 2048 if "sdxl" in name else 1024 if "sd21" in name else 768
    assert (control.context_channels, control.vector_channels) == (width, 2816 if "sdxl" in name else 0)
    heads = {block.attn1.heads for block in control.modules() if hasattr(block, "attn1")}
    assert heads == ({8} if "sd15" in name else {5, 10, 20} if "sd21" in name else {10, 20})


def test_names_and_formats(weights, tmp_path):
    """lllyasviel's names bare, with a prefix, in a whole checkpoint and in a pickle; diffusers' names."""
    prefixed = {f"control_model.{key}": value for key, value in weights.items()}
    save_file(weights, tmp_path / "bare.safetensors")
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    torch.save({"state_dict": prefixed}, tmp_path / "pickled.pth")
    whole = {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "first_stage_model.quant_conv.bias": torch.zeros(8),
        "logvar": torch.zeros(9),
    }
    save_file(prefixed | whole, tmp_path / "whole.safetensors")
    save_file(their_control(weights, SD1).state_dict(), tmp_path / "diffusers.safetensors")
    for file in sorted(tmp_path.iterdir()):
        control = minisd.load_control(file)
        assert isinstance(control, ControlNet)
        assert same(control, weights), file.name
        assert not control.training
        assert not control.pooled
    assert next(minisd.load_control(tmp_path / "bare.safetensors", dtype="bfloat16").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_diffusers_names_of_other_families(name, tmp_path):
    small = SMALL[name]
    weights = blueprint.random_weights(control_shapes(small.unet()), 3)
    save_file(their_control(weights, small).state_dict(), tmp_path / "control.safetensors")
    assert same(minisd.load_control(tmp_path / "control.safetensors"), weights)


@pytest.mark.parametrize("size", ["small", "mid"])
@torch.no_grad()
def test_reduced_controlnets_of_sdxl(size, tmp_path):
    """Without attention at all and with a middle of one block; with attention less deep than the UNet's."""
    from diffusers import ControlNetModel

    small = replace(SMALL["sdxl"], depths=(0, 0, 0) if size == "small" else (0, 1, 1), middle=1)
    middle = "UNetMidBlock2D" if size == "small" else "UNetMidBlock2DCrossAttn"
    torch.manual_seed(6)
    theirs = ControlNetModel(**options_of(small), mid_block_type=middle).eval()
    for name, weight in theirs.named_parameters():
        if "controlnet_" in name:  # which begin as zeros
            torch.nn.init.normal_(weight, std=0.1)
    save_file(theirs.state_dict(), tmp_path / "control.safetensors")
    control = minisd.load_control(tmp_path / "control.safetensors")
    assert len(control.middle_block) == (1 if size == "small" else 3)
    x, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, small.context), torch.tensor([801.0, 3.0])
    y, numbers = vector(small, 2)
    picture = torch.rand(2, 3, 64, 64)
    down, middle = theirs(x, t, context, picture, return_dict=False, added_cond_kwargs=numbers)
    for found, wanted in zip(control.residuals(x, picture, t, context, y), (*down, middle), strict=True):
        assert relative_error(found, wanted) <= LIMIT


@pytest.mark.parametrize("name", ["control_v11e_sd15_shuffle", "control_v11e_sd15_shuffle_fp16", "control_v11p_sd15_shuffled"])
def test_shuffle_is_pooled(name, weights, tmp_path):
    save_file(weights, tmp_path / f"{name}.safetensors")
    pooled = not name.endswith("shuffled")
    assert minisd.load_control(tmp_path / f"{name}.safetensors").pooled is pooled
    assert minisd.load_control(tmp_path / f"{name}.safetensors", pooled=not pooled).pooled is not pooled


def test_differences(weights, base, tmp_path):
    changes = {key: value - base[key] if key in base else value for key, value in weights.items()}
    file = tmp_path / "difference.safetensors"
    save_file({f"control_model.{key}": value for key, value in changes.items()} | {"difference": torch.tensor(1.0)}, file)
    unet = our_unet(base)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    control = minisd.load_control(file, base=unet)
    for key, value in control.state_dict().items():
        assert torch.allclose(value, weights[key], atol=1e-6), key
        assert torch.equal(value, changes[key] + base[key]) if key in base else torch.equal(value, weights[key])
    assert same(unet, before)
    with pytest.raises(UsageError, match=r"base: expected the pipeline or UNet that difference.safetensors, .*, found none"):
        minisd.load_control(file)
    other = our_unet(blueprint.random_weights(SMALL["sd1-inpaint"].unet(), 4))
    with pytest.raises(
        CheckpointError, match=r"control_model.input_blocks.0.0.weight.*expected the base's shape \(64, 9, 3, 3\)"
    ):
        minisd.load_control(file, base=other)


def control_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As published: factors of the trunk's matrices and kernels, its biases and norms whole, the rest whole."""
    found, generator = {"lora_controlnet": torch.tensor(0)}, torch.Generator().manual_seed(8)
    for key, value in weights.items():
        module, _, end = key.rpartition(".")
        trunk = module.split(".")[0] in ("time_embed", "label_emb", "input_blocks", "middle_block")
        if not trunk or end == "bias" or value.dim() == 1:
            found[key] = value
            continue
        out, *inner = value.shape
        rank = 3
        found[f"{module}.up"] = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator) / 10
        found[f"{module}.down"] = torch.randn(rank, *inner, generator=generator) / 10
    return found


def test_control_lora(weights, base, tmp_path):
    stored = control_lora(weights)
    file = tmp_path / "control-lora.safetensors"
    save_file(stored | {"lora_unet__notes": torch.zeros(1)}, file)
    control = minisd.load_control(file, base=our_unet(base))
    found = control.state_dict()
    assert found.keys() == weights.keys()
    for key, value in found.items():
        module = key.removesuffix(".weight")
        if f"{module}.up" in stored:
            up, down = stored[f"{module}.up"].double(), stored[f"{module}.down"].double()
            wanted = base[key].double() + torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(base[key].shape)
            assert relative_error(value, wanted) <= 1e-6
            assert relative_error(value, base[key]) > 1e-3
        else:
            assert torch.equal(value, stored[key])
    broken = {key: value for key, value in stored.items() if key != "input_blocks.1.0.in_layers.2.down"}
    save_file(broken, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match=r"in_layers.2.up': expected both of up and down"):
        minisd.load_control(tmp_path / "torn.safetensors", base=our_unet(base))
    with pytest.raises(CheckpointError, match=r"expected factors \(.*found"):
        minisd.load_control(file, base=our_unet(blueprint.random_weights(SMALL["sd1-inpaint"].unet(), 4)))


def test_control_lora_is_of_the_file_whatever_loras_are_on(reduced_file, tmp_path):
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    shapes = Shapes({key: tuple(value.shape) for key, value in pipe.unet.state_dict().items()})
    save_file(control_lora(blueprint.random_weights(control_shapes(shapes), 3)), tmp_path / "control.safetensors")
    save_file(whole(), tmp_path / "lora.safetensors")
    before = minisd.load_control(tmp_path / "control.safetensors", base=pipe)
    key = f"{ATTENTION.removeprefix('model.diffusion_model.')}.to_q.weight"
    unchanged = pipe.unet.state_dict()[key].clone()
    pipe.set_loras([tmp_path / "lora.safetensors"])
    assert not torch.equal(pipe.unet.state_dict()[key], unchanged)
    assert same(minisd.load_control(tmp_path / "control.safetensors", base=pipe), before.state_dict())


@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter", "full_adapter_xl"])
def test_adapters(kind, tmp_path):
    light = kind == "light_adapter"
    theirs = their_adapter(kind, 3, (64, 128, 256) if light else (64, 128, 256, 256)).state_dict()
    own = raw_names(theirs, light)
    save_file(theirs, tmp_path / "diffusers.safetensors")
    save_file(own, tmp_path / "own.safetensors")
    torch.save({"adapter": own}, tmp_path / "wrapped.pth")
    for file in sorted(tmp_path.iterdir()):
        adapter = minisd.load_control(file)
        assert isinstance(adapter, T2IAdapter)
        assert same(adapter, own), file.name


OTHERS = {
    "a LoRA": {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": (320, 4)},
    "a T2I style adapter": {"style_embedding": (1, 8, 1024), "transformer_layes.0.ln_1.weight": (1024,)},
    "a VAE alone": manifest("vae-ft-mse"),
    "no model that minisd knows": {"something": (1,)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_none_says_what_it_is(what, tmp_path):
    with pytest.raises(CheckpointError, match=what):
        minisd.load_control(write_holes(tmp_path / "other.safetensors", OTHERS[what]))


def test_a_checkpoint_and_a_file_that_is_not_there_are_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a checkpoint of Stable Diffusion XL, not a ControlNet"):
        minisd.load_control(write_holes(tmp_path / "sdxl.safetensors", manifest("sdxl-base")))
    with pytest.raises(CheckpointError, match="does not exist"):
        minisd.load_control(tmp_path / "nothing.safetensors")


def test_a_broken_file_is_named_by_its_own_names(weights, tmp_path):
    theirs = their_control(weights, SD1).state_dict()
    save_file(theirs | {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(64, 32, 3, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(CheckpointError, match=r"'down_blocks.0.resnets.0.conv1.weight': .*expected 64 channels, found 32"):
        minisd.load_control(tmp_path / "shape.safetensors")
    save_file({key: value for key, value in weights.items() if key != "zero_convs.2.0.weight"}, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match=r"zero_convs.2.0.weight.*a key is missing"):
        minisd.load_control(tmp_path / "torn.safetensors")
    save_file(weights | {"spare": torch.zeros(1)}, tmp_path / "spare.safetensors")
    with pytest.warns(UserWarning, match="1 tensor is not used.*spare"):
        minisd.load_control(tmp_path / "spare.safetensors")

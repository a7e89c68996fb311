"""Files of the LoRA family: whose names they have, what fits, and what does not is named and changes nothing."""

from __future__ import annotations

import json
import lzma
import math

import pytest
import torch
from helpers import TESTS, assert_close
from loras import ATTENTION, KNOWN, SHAPES, product, whole
from safetensors.torch import load_file, save_file

import minisd
from minisd.addons.lora_file import open_addon
from minisd.addons.lora_names import targets
from minisd.addons.wanted import Lora
from minisd.errors import CheckpointError, UsageError
from minisd.files.checkpoint import open_checkpoint
from minisd.models.family import REFINER, SD1, SD2, SDXL, UNET
from minisd.models.shapes import Shapes
from minisd.workbench import blueprint


@pytest.fixture(scope="module")
def loaded(reduced_file):
    return minisd.load(reduced_file, device="cpu", dtype="float32")


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.set_loras([])


def weights(pipe) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in pipe.model.state_dict().items()}


def same(pipe, before) -> bool:
    return all(torch.equal(value, before[key]) for key, value in pipe.model.state_dict().items())


MAPS = [("sd15", SD1, "sd15"), ("sd2", SD2, "sd21"), ("sdxl", SDXL, "sdxl"), ("sdxl_diffusers_names", SDXL, "sdxl")]


@pytest.mark.parametrize(("name", "family", "shapes"), MAPS)
def test_names_of_kohyas_scripts(name, family, shapes):
    """Every module of their files (sd-scripts networks/lora.py at 48d368f) means the weight that it was trained for."""
    text = lzma.decompress((TESTS / "checkpoints" / "lora_map.json.xz").read_bytes())
    known = targets(getattr(blueprint, shapes)(), family)
    for module, (key, rows) in json.loads(text)[name].items():
        assert (known[module].key, known[module].rows) == (key, tuple(rows) if rows else None), module


def test_names_of_the_refiner():
    known = targets(blueprint.refiner(), REFINER)
    first = "conditioner.embedders.0.model.transformer.resblocks.3.attn.in_proj_weight"
    for name in ("lora_te_", "lora_te2_"):
        target = known[f"{name}text_model_encoder_layers_3_self_attn_v_proj"]
        assert (target.key, target.rows) == (first, (2560, 3840))
    assert known["lora_unet_input_blocks_7_1_proj_in"].key == "model.diffusion_model.input_blocks.7.1.proj_in.weight"


VOCABULARIES = {
    "kohya": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", {}),
    "kohya, raw": ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", {}),
    "SimpleTuner": ("lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", {}),
    "raw": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        {"up": ".lora_B.weight", "down": ".lora_A.weight"},
    ),
    "peft": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        {"up": ".lora_B.weight", "down": ".lora_A.weight"},
    ),
    "peft, named adapter": (
        "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        {"up": ".lora_B.default.weight", "down": ".lora_A.default.weight"},
    ),
    "peft, bare": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", {"up": ".lora_B", "down": ".lora_A"}),
    "processors": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        {"up": "_lora.up.weight", "down": "_lora.down.weight"},
    ),
    "processors, no unet": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        {"up": "_lora.up.weight", "down": "_lora.down.weight"},
    ),
    "linear layer": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        {"up": ".lora_linear_layer.up.weight", "down": ".lora_linear_layer.down.weight"},
    ),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vocabularies(vocabulary, tmp_path):
    name, ends = VOCABULARIES[vocabulary]
    save_file(product(name, f"{ATTENTION}.to_q.weight", **ends), tmp_path / "x.safetensors")
    addon = open_addon(tmp_path / "x.safetensors", SHAPES, SD1)
    assert not addon.misfits
    (change,) = addon.changes
    assert (change.target.key, change.kind) == (f"{ATTENTION}.to_q.weight", "LoRA")


def test_other_spellings_of_the_output_projection_and_of_text():
    for name in ("to_out.0", "to_out", "processor.to_out", "processor.to_out.0"):
        assert KNOWN[f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}"].key == f"{ATTENTION}.to_out.0.weight"
    key = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    for name in (
        "lora_te_text_model_encoder_layers_1_mlp_fc1",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1",
    ):
        assert KNOWN[name].key == key


def test_text_projection_lies_the_other_way_round():
    known = targets(blueprint.sdxl(), SDXL)
    target = known["lora_te2_text_projection"]
    assert target.transposed
    assert target.key == "conditioner.embedders.1.model.text_projection"


def test_as_diffusers_and_peft_write_it(oracle, pipe, tmp_path):
    """Trained, saved and fused by them: the same weights."""
    import peft
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "proj_in"], init_lora_weights=False)
    torch.manual_seed(0)
    oracle.unet.add_adapter(config)
    try:
        state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(oracle.unet))
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict() | {"target_modules": ["to_q"]}
        )
        oracle.unet.fuse_lora()
        fused = {key.replace(".base_layer", ""): value.clone() for key, value in oracle.unet.state_dict().items()}
    finally:
        oracle.unet.unfuse_lora()
        oracle.unet.delete_adapters("default")
        oracle.unet.unload_lora()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert "lora_adapter_metadata" in open_checkpoint(file).metadata  # where alpha is
    before = weights(pipe)
    pipe.set_loras([file])
    for theirs, raw in (
        ("down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q", "input_blocks.5.1.transformer_blocks.0.attn2.to_q"),
        ("up_blocks.2.resnets.1.conv1", "output_blocks.7.0.in_layers.2"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
    ):
        key = f"model.diffusion_model.{raw}.weight"
        found = pipe.model.state_dict()[key]
        assert not torch.equal(found, before[key])
        assert_close(found, fused[f"{theirs}.weight"].reshape(found.shape), 1e-6)


def test_alpha_of_the_metadata(pipe, tmp_path):
    tensors = product(VOCABULARIES["peft"][0], f"{ATTENTION}.to_q.weight", **VOCABULARIES["peft"][1], alpha="")
    up, down = tensors[f"{VOCABULARIES['peft'][0]}.lora_B.weight"], tensors[f"{VOCABULARIES['peft'][0]}.lora_A.weight"]
    for settings, scale in (
        ({}, 1.0),
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / math.sqrt(4)),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
    ):
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        pipe.set_loras([])
        before = pipe.model.state_dict()[f"{ATTENTION}.to_q.weight"].clone()
        pipe.set_loras([tmp_path / "x.safetensors"])
        assert_close(pipe.model.state_dict()[f"{ATTENTION}.to_q.weight"] - before, up @ down * scale, 1e-5)
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": "[1]"})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata, which is no JSON object"):
        pipe.set_loras([tmp_path / "x.safetensors"])


def test_biases_and_norms(pipe, tmp_path):
    name, generator = "lora_unet_down_blocks_0_resnets_0_", torch.Generator().manual_seed(0)
    changes = {
        "norm1.w_norm": "in_layers.0.weight",
        "norm1.b_norm": "in_layers.0.bias",
        "conv1.diff_b": "in_layers.2.bias",
        "conv2.diff": "out_layers.3.weight",
    }
    keys = {ours: f"model.diffusion_model.input_blocks.1.0.{key}" for ours, key in changes.items()}
    tensors = {name + ours: torch.randn(SHAPES[key], generator=generator) for ours, key in keys.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    before = weights(pipe)
    pipe.set_loras([(tmp_path / "x.safetensors", 0.5)])
    for ours, key in keys.items():
        assert_close(pipe.model.state_dict()[key] - before[key], tensors[name + ours] / 2, 1e-5)


def test_an_inpainting_model_takes_what_its_first_layer_has_no_channels_for(tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    shapes = Shapes(dict(SHAPES) | {key: (32, 9, 3, 3)})
    save_file(product("lora_unet_conv_in", key), tmp_path / "x.safetensors")
    (change,) = (addon := open_addon(tmp_path / "x.safetensors", shapes, SD1)).changes
    made = addon.change_of(change, torch.zeros(32, 9, 3, 3), 1.0, "paper")
    tensors = load_file(tmp_path / "x.safetensors")
    expected = tensors["lora_unet_conv_in.lora_up.weight"].flatten(1) @ tensors["lora_unet_conv_in.lora_down.weight"].flatten(1)
    assert_close(made[:, :4], expected.reshape(32, 4, 3, 3) / 2, 1e-5)
    assert not made[:, 4:].any()


# What is wrong with a file, and what is said of it.  Each makes its tensors from a good file's.
def changed(**tensors):
    return lambda good: {**good, **tensors}


FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
WRONG = {
    "half a pair": (lambda good: {key: value for key, value in good.items() if key != f"{FIRST}.lora_up.weight"}, "is not whole"),
    "no place": (
        lambda good: good | {key.replace("blocks_0", "blocks_9", 1): each.clone() for key, each in good.items() if FIRST in key},
        "has no place in the checkpoint",
    ),
    "another shape": (changed(**{f"{FIRST}.lora_down.weight": torch.zeros(4, 99)}), "does not fit"),
    "other way round": (
        lambda good: {
            **good,
            f"{FIRST}.lora_down.weight": good[f"{FIRST}.lora_up.weight"],
            f"{FIRST}.lora_up.weight": good[f"{FIRST}.lora_down.weight"],
        },
        "does not fit",
    ),
    "NaN": (changed(**{f"{FIRST}.lora_down.weight": torch.full((4, 32), math.nan)}), "holds NaN or infinity"),
    "infinity": (changed(**{f"{FIRST}.alpha": torch.tensor(math.inf)}), "holds NaN or infinity"),
    "many alphas": (changed(**{f"{FIRST}.alpha": torch.ones(3)}), "does not fit"),
    "whole numbers": (changed(**{f"{FIRST}.lora_down.weight": torch.zeros(4, 32, dtype=torch.int32)}), "no floating-point"),
    "twice": (
        lambda good: {
            **good,
            **product("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", f"{ATTENTION}.to_q.weight"),
        },
        "changes what .* changes, too",
    ),
    "an unknown key": (changed(**{"something.else": torch.zeros(3)}), "is no part of a LoRA that minisd knows"),
    "nothing": (lambda good: {}, "expected a LoRA, found"),
    "a part of a checkpoint": (lambda good: {f"{ATTENTION}.to_q.weight": torch.zeros(32, 32)}, "expected a LoRA, found"),
    "nothing that counts": (
        lambda good: product("lora_te_text_projection", f"{ATTENTION}.to_q.weight"),
        "changes nothing in Stable Diffusion 1.x",
    ),
    "half of the pairs": (lambda good: {key: value for key, value in good.items() if "up" not in key}, "expected a LoRA, found"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(case, pipe, tmp_path):
    make, why = WRONG[case]
    save_file(make(whole()), tmp_path / "x.safetensors")
    before = weights(pipe)
    with pytest.raises(CheckpointError, match=why) as error:
        pipe.set_loras([tmp_path / "x.safetensors"])
    assert "\n" not in str(error.value)
    assert "x.safetensors" in str(error.value)
    assert same(pipe, before)
    with pytest.raises(CheckpointError, match=why):
        pipe.stream("a star", loras=[tmp_path / "x.safetensors"], steps=1)
    assert same(pipe, before)


def test_a_wrong_base_is_named(pipe, tmp_path):
    sdxl = targets(blueprint.sdxl(), SDXL)
    tensors = {}
    for name in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "lora_te2_text_model_encoder_layers_0_mlp_fc1"):
        shape = blueprint.sdxl()[sdxl[name].key]
        tensors |= {f"{name}.lora_down.weight": torch.zeros(4, shape[1]), f"{name}.lora_up.weight": torch.zeros(shape[0], 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    before = weights(pipe)
    with pytest.raises(CheckpointError, match=r"0 of its 2 modules fit Stable Diffusion 1.x, it is made for sdxl, 4 keys do not"):
        pipe.set_loras([tmp_path / "x.safetensors"])
    with pytest.raises(CheckpointError, match="0 of its 2 modules"):  # nothing of it fits, in part neither
        pipe.set_loras([tmp_path / "x.safetensors"], partial=True)
    assert same(pipe, before)


def test_in_part(pipe, tmp_path):
    good = whole()
    save_file(
        good | {"something.else": torch.zeros(3), f"{FIRST}.lora_down.weight": torch.zeros(4, 99)}, tmp_path / "x.safetensors"
    )
    pipe.set_loras([tmp_path / "x.safetensors"], partial=True)
    (facts,) = pipe("a star", steps=1, seed=1, width=64, height=64).metadata[0]["loras"]
    assert facts["left_out"] == 4  # the three of the module, and the unknown one


def test_strengths(pipe, tmp_path):
    save_file(whole(), tmp_path / "x.safetensors")
    before = weights(pipe)
    unet, text = f"{ATTENTION}.to_q.weight", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    pipe.set_loras([tmp_path / "x.safetensors"])
    once = {key: pipe.model.state_dict()[key] - before[key] for key in (unet, text)}
    for given, factors in (
        ((0.5,), (0.5, 0.5)),
        ((-1.0, 0.25), (-1.0, 0.25)),
        ((0, 1), (0, 1)),
    ):
        pipe.set_loras([(tmp_path / "x.safetensors", *given)])
        for key, factor in zip((unet, text), factors, strict=True):
            assert torch.allclose(pipe.model.state_dict()[key] - before[key], once[key] * factor, atol=1e-6)
    pipe.set_loras([Lora(tmp_path / "x.safetensors", 2.0, blocks="input=0.25, middle=0")])
    assert torch.allclose(pipe.model.state_dict()[unet] - before[unet], once[unet] / 2, atol=1e-6)
    middle = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(pipe.model.state_dict()[middle], before[middle])
    for wrong in (("x.safetensors", "1"), ("x.safetensors", math.nan), ("x.safetensors", 1, 2, 3), 5, "text"):
        with pytest.raises(UsageError, match="loras: "):
            pipe.set_loras([wrong] if wrong != "text" else wrong)
    with pytest.raises(UsageError, match="lora_rule: expected paper or comfyui, found 'x'"):
        pipe.set_loras([tmp_path / "x.safetensors"], rule="x")


@pytest.mark.parametrize("turns", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_on_and_off_again_many_times(pipe, tmp_path, turns):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.safetensors")
        save_file(whole(seed=1000 * i), files[-1])
    magnitude = torch.rand(32, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file(whole(seed=7) | {f"{FIRST}.dora_scale": magnitude}, files[0])
    before = weights(pipe)
    pipe.set_loras([(file, 0.7) for file in files])
    on, memory = weights(pipe), {key: value.data_ptr() for key, value in pipe.stack.base.items()}
    assert not same(pipe, before)
    for turn in range(turns):
        pipe.set_loras([(file, turn / 50) for file in files[: turn % 4]])
        pipe.set_loras([])
        assert same(pipe, before)
    pipe.set_loras([(file, 0.7) for file in files])
    assert same(pipe, on)
    assert memory == {key: value.data_ptr() for key, value in pipe.stack.base.items()}


def test_changes_of_several_add_up_in_any_order(pipe, tmp_path):
    """Each changes the file's weight; by ComfyUI's rule each changes what those before it left."""
    magnitude = torch.rand(32, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file(whole(1) | {f"{FIRST}.dora_scale": magnitude}, tmp_path / "a.safetensors")
    save_file(whole(2), tmp_path / "b.safetensors")
    a, b, key = tmp_path / "a.safetensors", tmp_path / "b.safetensors", f"{ATTENTION}.to_q.weight"
    before, found = weights(pipe)[key], {}
    for name, files in {"a": [a], "b": [b], "ab": [a, b], "ba": [b, a]}.items():
        pipe.set_loras(files)
        found[name] = pipe.model.state_dict()[key] - before
        pipe.set_loras(files, rule="comfyui")
        found[f"{name} comfyui"] = pipe.model.state_dict()[key] - before
    assert torch.allclose(found["ab"], found["a"] + found["b"], atol=1e-5)
    assert torch.allclose(found["ab"], found["ba"], atol=1e-5)
    assert not torch.allclose(found["ab comfyui"], found["ba comfyui"], atol=1e-4)
    assert torch.allclose(found["b comfyui"], found["b"], atol=1e-6)


def test_a_model_in_bfloat16_is_rounded_once(reduced_file, tmp_path):
    save_file(whole(), tmp_path / "x.safetensors")
    pipe = minisd.load(reduced_file, device="cpu", dtype="bfloat16")
    key = f"{ATTENTION}.to_q.weight"
    base = pipe.model.state_dict()[key].clone()
    pipe.set_loras([(tmp_path / "x.safetensors", 0.3)])
    tensors = load_file(tmp_path / "x.safetensors")
    change = tensors[f"{FIRST}.lora_up.weight"] @ tensors[f"{FIRST}.lora_down.weight"] / 2
    expected = (base.double() + 0.3 * change.double()).float().bfloat16()
    assert (pipe.model.state_dict()[key] != expected).float().mean() < 0.01  # where two neighbours are equally near


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_convolution_some_rows_at_a_time(reduced_file, tmp_path, monkeypatch, dtype, drawn):
    """Whose weight lies with its channels last, and the factor in the order of the file; once as a matrix."""
    monkeypatch.setattr("minisd.addons.stack.NUMBERS", 1000)  # three rows of 32 channels
    pipe = minisd.load(reduced_file, device="cpu", dtype=dtype)
    if drawn:  # then a weight may be packed
        pipe("a star", steps=1, width=32, height=32, seed=1)
    key, name = f"{UNET}.input_blocks.1.0.in_layers.2.weight", "lora_unet_down_blocks_0_resnets_0_conv1"
    base = pipe.model.state_dict()[key].clone()
    up, down = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((len(base), 2), (2, *base.shape[1:]))
    )
    expected = (base.double() + torch.einsum("nr,rchw->nchw", up.double(), down.double())).to(base.dtype)
    for each in (down, down.flatten(1)):
        save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": each.contiguous()}, tmp_path / "x.safetensors")
        pipe.set_loras([tmp_path / "x.safetensors"])
        found = pipe.model.state_dict()[key]
        assert torch.allclose(found.float(), expected.float(), rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-5)
        pipe.set_loras([])
        assert torch.equal(pipe.model.state_dict()[key], base)


def test_weights_that_were_trained_meanwhile_are_the_base(reduced_file, tmp_path):
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    save_file(whole(), tmp_path / "x.safetensors")
    key = f"{ATTENTION}.to_q.weight"
    pipe.set_loras([tmp_path / "x.safetensors"])
    pipe.set_loras([])
    with torch.no_grad():
        pipe.model.state_dict()[key].add_(1)
    before = weights(pipe)
    pipe.set_loras([tmp_path / "x.safetensors"])
    pipe.set_loras([])
    assert same(pipe, before)

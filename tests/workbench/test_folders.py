"""Raw checkpoints and diffusers folders: there and back without a changed bit, and diffusers itself draws the same picture."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import SMALL
from helpers import assert_close, manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd.cli import main
from minisd.files.recognition import ranking
from minisd.files.writers import is_unneeded
from minisd.library.places import tiny_checkpoint
from minisd.models.family import SD2, VAE
from minisd.models.naming import is_open, names_of, places
from minisd.models.shapes import Shapes
from minisd.workbench import blueprint
from minisd.workbench.converting import convert
from minisd.workbench.folders import folder as diffusers_folder
from minisd.workbench.folders.folder import REST, from_folder, to_folder
from minisd.workbench.inspecting import inspect

POSITIONS = "text_model.embeddings.position_ids"


def same(a, b) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize("name", ["sd1", "sd1-inpaint", "sd2", "sdxl-v", "sdxl-refiner"])
def test_there_and_back_changes_no_bit(name, tmp_path):
    source = SMALL[name].write(tmp_path / "a.safetensors")
    spare = {"alphas_cumprod": torch.rand(7)}
    if not is_open(SMALL[name].family.towers[0]):
        spare[f"{SMALL[name].family.towers[0].name}.{POSITIONS}"] = torch.arange(77)[None]
    save_file(load_file(source) | spare, tmp_path / "plain.safetensors", {"format": "pt", "note": "kept"})
    convert(tmp_path / "plain.safetensors", source)  # which adds the hash of all tensors
    (tmp_path / "plain.safetensors").unlink()
    folder = to_folder(source, tmp_path / "folder")
    back = from_folder(folder, tmp_path / "b.safetensors")
    assert same(source, back)
    with safe_open(source, framework="pt") as before, safe_open(back, framework="pt") as after:
        assert before.metadata() == after.metadata()
        assert after.metadata()["note"] == "kept"
    assert inspect(back, with_hash=True)["content"] is True
    coarse = inspect(from_folder(folder, tmp_path / "b.safetensors", torch.float8_e4m3fn), with_hash=True)
    assert coarse["content"] is True
    assert {"F8_E4M3", "F16"} <= {dtype for part in coarse["parts"].values() for dtype in part["dtypes"]}
    with pytest.raises(minisd.UsageError, match="found float8"):
        to_folder(source, tmp_path / "coarse", torch.float8_e4m3fn)
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("name", ["sd15", "sd15-inpainting", "instruct-pix2pix", "sd21-base", "sdxl-base", "sdxl-refiner"])
def test_every_key_of_the_published_files_has_a_place(name, tmp_path):
    """And its way back is its own."""
    shapes = Shapes(manifest(name))
    family = ranking(shapes)[0]
    for place in places(family):
        keys = [key.removeprefix(place.prefix) for key in shapes if key.startswith(place.prefix) and not is_unneeded(key)]
        links = names_of(place, keys, raw=True).forward(keys)
        theirs = {name for link in links for name in link.theirs}
        assert len(theirs) == sum(len(link.theirs) for link in links)
        lost = set(keys) - {link.raw for link in links}
        assert all(place.tower in SD2.towers and ".resblocks.23." in key for key in lost), lost
        back = {link.raw: link for link in names_of(place, theirs, raw=False).backward(theirs)}
        assert {link.raw: link for link in links} == back


PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-v": "StableDiffusionXLPipeline",
    "playground": "StableDiffusionXLPipeline",
    "cosxl": "StableDiffusionXLPipeline",
}


@pytest.mark.parametrize("name", SMALL)
def test_diffusers_opens_it_and_draws_the_same(name, tmp_path):
    import diffusers

    source = SMALL[name].write(tmp_path / "a.safetensors")
    folder = to_folder(source, tmp_path / "folder")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert type(theirs).__name__ == json.loads((folder / "model_index.json").read_text())["_class_name"]
    for place in places(SMALL[name].family):  # every weight of theirs came from the file, and none was left over
        loaded = getattr(theirs, place.folder).state_dict()
        (path,) = (folder / place.folder).glob("*.safetensors")
        written = {key.removeprefix("text_model."): value for key, value in load_file(path).items()}
        loaded = {key.removeprefix("text_model."): value for key, value in loaded.items() if "position_ids" not in key}
        assert loaded.keys() == written.keys(), place.folder
        assert all(torch.equal(loaded[key], written[key]) for key in written), place.folder
    if name not in PIPELINES:
        return
    assert type(theirs).__name__ == PIPELINES[name]
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    common = {"guidance_scale": 5.0, "negative_prompt": "blurry", "width": 64, "height": 64, "latents": latents}
    prompt = "a photograph of an astronaut riding a horse"
    wanted = theirs(prompt, num_inference_steps=4, output_type="latent", **common).images
    found = minisd.load(source, device="cpu", dtype="float32")(prompt, steps=4, **common).latents
    assert_close(found, wanted, 1e-3)


def test_the_tokenizer_is_clips(tmp_path):
    from transformers import CLIPTokenizer

    from minisd.text.tokenizer import tokenize

    folder = to_folder(SMALL["sdxl"].write(tmp_path / "a.safetensors"), tmp_path / "folder")
    prompts = ["a photograph of an astronaut riding a horse", "", "Ärger's 日本 🎨  x" * 3]
    for name, pad in (("tokenizer", 49_407), ("tokenizer_2", 0)):
        theirs = CLIPTokenizer.from_pretrained(folder / name)
        ids = theirs(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        assert ids == tokenize(prompts, pad)


def test_without_the_rest_only_the_rest_is_lost(tmp_path):
    source = SMALL["sdxl-v"].write(tmp_path / "a.safetensors")
    folder = to_folder(source, tmp_path / "folder")
    (folder / REST).unlink()
    pipe = minisd.load(from_folder(folder, tmp_path / "b.safetensors"), device="cpu")
    assert (pipe.training.prediction, pipe.training.zero_terminal) == ("v", True)
    wanted, found = load_file(source), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted if not is_unneeded(key))


def test_shards_old_names_and_half_precision(tmp_path):
    """What older folders look like."""
    source = SMALL["sd1"].write(tmp_path / "a.safetensors")
    folder = to_folder(source, tmp_path / "folder")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    names, shards = sorted(weights), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shards |= dict.fromkeys(part, f"diffusion_pytorch_model-{i:05}-of-00002.safetensors")
        save_file({key: weights[key] for key in part}, unet.with_name(shards[part[0]]))
    unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    unet.unlink()
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(vae)
    for new, name in old.items():
        weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in weights.items()}
    save_file(weights, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    vae.unlink()
    assert same(source, from_folder(folder, tmp_path / "b.safetensors"))


def test_the_command_line_and_dtypes(tmp_path, capsys):
    source, folder = SMALL["sd1"].write(tmp_path / "a.safetensors"), tmp_path / "folder"
    assert main(["convert", str(source), "-o", str(folder), "--diffusers", "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    assert main(["convert", str(folder), "-o", str(tmp_path / "b.safetensors"), "--dtype", "bfloat16"]) == 0
    found, wanted = load_file(tmp_path / "b.safetensors"), load_file(source)
    assert all(torch.equal(found[key], wanted[key].half().bfloat16()) for key in wanted)
    capsys.readouterr()
    for options in (["--prune"], ["--vae", str(source)]):
        assert main(["convert", str(folder), "-o", str(tmp_path / "c.safetensors"), *options]) == 2
        assert main(["convert", str(source), "-o", str(tmp_path / "c"), "--diffusers", *options]) == 2
    assert main([str(folder), "-m", str(folder)]) == 3
    assert f"minisd convert {folder} -o NAME.safetensors" in capsys.readouterr().err


def test_what_is_no_such_folder_is_told(tmp_path):
    source = SMALL["sd1"].write(tmp_path / "a.safetensors")
    folder = to_folder(source, tmp_path / "folder")

    def changed(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(minisd.CheckpointError) as caught:
            from_folder(copy, tmp_path / "b.safetensors")
        assert not (tmp_path / "b.safetensors").exists()
        return str(caught.value)

    weights = "unet/diffusion_pytorch_model.safetensors"
    assert "expected model_index.json" in changed(lambda f: (f / "model_index.json").unlink())
    assert "expected diffusion_pytorch_model.safetensors, found none (is it complete?)" in changed(
        lambda f: (f / weights).unlink()
    )
    assert "are programs" in changed(lambda f: (f / weights).rename(f / "unet/diffusion_pytorch_model.bin"))
    assert "cannot be read as JSON" in changed(lambda f: (f / "text_encoder/config.json").write_text("{"))
    assert "expected a JSON object" in changed(lambda f: (f / "text_encoder/config.json").write_text("[]"))
    assert "no place for: strange" in changed(
        lambda f: save_file(load_file(f / weights) | {"strange": torch.ones(1)}, f / weights)
    )
    index = "unet/diffusion_pytorch_model.safetensors.index.json"

    def outside(f):
        (f / weights).unlink()
        (f / index).write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))

    assert "names files outside of its folder" in changed(outside)
    spoilt = load_file(folder / weights)
    spoilt["conv_in.bias"][0] = float("nan")
    assert "holds NaN" in changed(lambda f: save_file(spoilt, f / weights))


SPOTS = {  # tensors of every kind: plain, a matrix, stacked, turned round, and what names the blocks
    "unet": ["conv_in.weight", "time_embedding.linear_1.bias", "down_blocks.0.resnets.0.norm1.weight"],
    "vae": ["encoder.mid_block.attentions.0.to_q.weight", "decoder.conv_out.bias", "quant_conv.weight"],
    "text_encoder": ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"],
}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_scalars_and_strange_numbers_in_a_folder_are_told(name, tmp_path):
    folder = to_folder(SMALL[name].write(tmp_path / "a.safetensors"), tmp_path / "folder")

    def refused(part, change):
        path = next((folder / part).glob("*.safetensors"))
        whole = path.read_bytes()
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        with pytest.raises(minisd.CheckpointError):
            from_folder(folder, tmp_path / "b.safetensors")
        path.write_bytes(whole)

    for part, keys in SPOTS.items():
        for key in keys:
            refused(part, lambda weights, key=key: weights.update({key: torch.tensor(1.0)}))
    for number in ("²", "x", "", "99999999999", "-1"):
        refused("unet", lambda weights, number=number: weights.update({f"down_blocks.{number}.resnets.0.x": torch.ones(1)}))
    if name == "sd2":
        refused("text_encoder", lambda weights: weights.pop("text_model.encoder.layers.0.self_attn.k_proj.bias"))
    from_folder(folder, tmp_path / "b.safetensors")


def test_scalars_in_a_raw_file_are_told(tmp_path):
    whole = load_file(SMALL["sd1"].write(tmp_path / "a.safetensors"))
    for key in sorted(whole)[::20]:
        save_file(whole | {key: torch.tensor(1.0)}, tmp_path / "b.safetensors")
        with pytest.raises(minisd.CheckpointError):
            to_folder(tmp_path / "b.safetensors", tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    source = SMALL["sd1"].write(tmp_path / "a.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(minisd.OutputError, match="full: exists already; choose another name"):
        to_folder(source, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    to_folder(source, tmp_path / "empty")
    with monkeypatch.context() as patch:
        patch.setattr(diffusers_folder, "sync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(minisd.OutputError, match="No space left on device"):
            to_folder(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "empty", "full"]


def test_sd2_without_its_last_text_layer_keeps_all_others(tmp_path, monkeypatch):
    """Some merges dropped the 24th, which nobody needs; what is then the last is needed."""
    from minisd.models import family

    weights = load_file(SMALL["sd2"].write(tmp_path / "a.safetensors"))
    save_file({key: value for key, value in weights.items() if ".resblocks.2." not in key}, tmp_path / "b.safetensors")
    monkeypatch.setattr(
        "minisd.models.naming.text_skip", lambda tower, layers: 0 if layers == 2 else family.text_skip(tower, layers)
    )
    folders = [to_folder(tmp_path / f"{name}.safetensors", tmp_path / name) for name in "ab"]
    first, second = (load_file(folder / "text_encoder" / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    configs = [json.loads((folder / "text_encoder" / "config.json").read_text())["num_hidden_layers"] for folder in folders]
    assert configs == [2, 2]


def test_integers_are_refused_both_ways(tmp_path):
    source = SMALL["sd1"].write(tmp_path / "a.safetensors")
    folder = to_folder(source, tmp_path / "folder")
    for path, key, call in (
        (
            folder / "unet" / "diffusion_pytorch_model.safetensors",
            "conv_in.bias",
            lambda: from_folder(folder, tmp_path / "b.safetensors"),
        ),
        (source, "model.diffusion_model.out.2.bias", lambda: to_folder(source, tmp_path / "other")),
    ):
        weights = load_file(path)
        save_file(weights | {key: weights[key].int()}, path)
        with pytest.raises(minisd.CheckpointError, match="found I32"):
            call()


def test_distilled_unets_have_no_plain_config(tmp_path):
    """SSD-1B has other depths on the way up than on the way down."""
    weights = load_file(SMALL["sdxl"].write(tmp_path / "a.safetensors"))
    fewer = {key: value for key, value in weights.items() if ".output_blocks.2.1.transformer_blocks.1." not in key}
    assert len(fewer) < len(weights)
    save_file(fewer, tmp_path / "b.safetensors")
    with pytest.raises(minisd.CheckpointError, match="has a UNet that diffusers' plain config cannot describe"):
        to_folder(tmp_path / "b.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_vae_that_diffusers_cannot_have_is_refused(tmp_path, capsys):
    """Its decoder is wider than its encoder."""
    file, uneven = tmp_path / "uneven.safetensors", blueprint.under(VAE, blueprint.vae((32, 64), (64, 64), (1, 2)))
    kept = {key: value for key, value in load_file(tiny_checkpoint()).items() if not key.startswith(VAE)}
    save_file(kept | {key: torch.zeros(shape) for key, shape in uneven.items()}, file)
    assert main(["convert", str(file), "--diffusers", "-o", str(tmp_path / "folder")]) == 3
    message = capsys.readouterr().err
    assert "has a VAE that diffusers cannot have: its encoder and decoder would have the same widths" in message
    assert "minisd convert FILE --vae OTHER" in message
    assert list(tmp_path.iterdir()) == [file]


def test_diffusers_has_the_tiny_checkpoints_vae(tmp_path):
    from diffusers import AutoencoderKL

    assert main(["convert", "tiny", "--diffusers", "-o", str(tmp_path / "folder")]) == 0
    theirs = AutoencoderKL.from_pretrained(tmp_path / "folder", subfolder="vae")
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert_close(minisd.load(device="cpu", dtype="float32").vae.decode(latents), theirs.decode(latents).sample, 1e-5)

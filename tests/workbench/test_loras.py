"""LoRAs as files: into a checkpoint, out of two, smaller, several as one, with other names; and what is said of one."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_close, write_checkpoint
from loras import ATTENTION, product, whole
from safetensors.torch import load_file, save_file

import minisd
from minisd.addons.wanted import Lora
from minisd.cli import main
from minisd.errors import CheckpointError, UsageError
from minisd.files.checkpoint import data_sha256, open_checkpoint
from minisd.workbench.loras.baking import bake
from minisd.workbench.loras.doctor import examined
from minisd.workbench.loras.extracting import extract
from minisd.workbench.loras.reshaping import merge, rename, resize

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def lora(tmp_path):
    save_file(
        whole(), tmp_path / "x.safetensors", {"ss_base_model_version": "sd_v1", "ss_tag_frequency": '{"a": {"clay, toy": 3}}'}
    )
    return tmp_path / "x.safetensors"


@pytest.fixture(scope="module")
def tuned(reduced_file, tmp_path_factory):
    """The reduced checkpoint after a training of everything but its VAE."""
    generator, changed = torch.Generator().manual_seed(3), {}
    for key, value in load_file(reduced_file).items():
        moved = value.is_floating_point() and not key.startswith("first_stage") and "embedding" not in key
        changed[key] = (
            value + 0.1 * value.std() * torch.randn(value.shape, generator=generator) if moved and value.numel() > 1 else value
        )
    path = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    save_file(changed, path)
    return path


def change(first, second) -> dict[str, torch.Tensor]:
    ours, theirs = load_file(first), load_file(second)
    return {key: theirs[key].float() - ours[key].float() for key in ours if not torch.equal(ours[key], theirs[key])}


def norm(tensors) -> float:
    return float(sum(each.double().square().sum() for each in tensors.values()) ** 0.5)


def test_into_a_checkpoint_as_onto_a_pipeline(reduced_file, lora, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["merge", str(reduced_file), "--lora", f"{lora}:0.8:0.5", "--lora", str(lora), "-o", str(out), "--dtype", "float32"]
    assert main([*words, "--lora-blocks", "middle=0"]) == 0
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    pipe.set_loras([Lora(lora, 0.8, 0.5, "middle=0"), Lora(lora, blocks="middle=0")])
    written, expected = load_file(out), pipe.model.state_dict()
    assert written.keys() == load_file(reduced_file).keys()
    assert all(torch.allclose(written[key], expected[key], atol=1e-6) for key in expected)
    said = json.loads(open_checkpoint(out).metadata["minisd.loras"])
    assert [each["strength"] for each in said["loras"]] == [0.8, 1.0]
    result = minisd.load(out, device="cpu", dtype="float32")("a star", steps=1, seed=1, width=64, height=64)
    assert torch.allclose(result.latents, pipe("a star", steps=1, seed=1, width=64, height=64).latents, atol=1e-4)


def test_into_a_checkpoint_is_refused_where_it_makes_no_sense(reduced_file, lora, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    for words, why in (
        ([str(reduced_file), str(reduced_file), "--lora", str(lora)], "--lora: expected one model"),
        ([str(reduced_file), "--lora", str(lora), "--ratio", "1"], "--lora: expected one model"),
        ([str(reduced_file), "--lora", str(reduced_file)], "expected a LoRA, found"),
        ([str(reduced_file), "--lora", f"{lora}:1000"], "strength: expected a number from -100 to 100"),
    ):
        assert main(["merge", *words, "-o", str(out)]) in (2, 3)
        assert why in capsys.readouterr().err
        assert not out.exists()
    tensors = whole() | {
        f"{QUERY}.lora_up.weight": torch.full((32, 4), 1e6),
        f"{QUERY}.lora_down.weight": torch.full((4, 32), 1e6),
    }
    save_file(tensors, lora)
    with pytest.raises(UsageError, match="becomes too large for F16"):
        bake(reduced_file, [Lora(lora)], out, torch.float16)
    assert not out.exists()


def test_extract_at_full_rank_gives_the_tuned_checkpoint_back(reduced_file, tuned, tmp_path):
    made = extract(reduced_file, tuned, tmp_path / "x.safetensors", rank=4096, dtype=torch.float32)
    assert made.kept > 0.999999
    assert made.left_out == ()
    bake(reduced_file, [Lora(made.path)], tmp_path / "again.safetensors", torch.float32)
    assert norm(change(tuned, tmp_path / "again.safetensors")) < 1e-3 * norm(change(reduced_file, tuned))


def test_extract_cuts_to_the_best_of_a_rank(reduced_file, tuned, tmp_path):
    """Eckart-Young: what is left out are the small singular values."""
    made = extract(reduced_file, tuned, tmp_path / "x.safetensors", rank=8, dtype=torch.float32)
    tensors, key = load_file(made.path), f"{ATTENTION}.to_q.weight"
    values = torch.linalg.svdvals(change(reduced_file, tuned)[key])
    found = tensors[f"{QUERY}.lora_up.weight"] @ tensors[f"{QUERY}.lora_down.weight"]
    lost = change(reduced_file, tuned)[key] - found
    assert float(lost.norm()) == pytest.approx(float(values[8:].norm()), rel=1e-4)
    half = extract(reduced_file, tuned, tmp_path / "y.safetensors", rank=4096, energy=0.5, dtype=torch.float32)
    ranks = {len(value) for name, value in load_file(half.path).items() if name.endswith("lora_down.weight")}
    assert half.kept >= 0.5
    assert len(ranks) > 1


def test_a_lora_goes_in_and_comes_out_again(reduced_file, tmp_path):
    original = product(QUERY, f"{ATTENTION}.to_q.weight")
    save_file(original, tmp_path / "x.safetensors")
    bake(reduced_file, [Lora(tmp_path / "x.safetensors")], tmp_path / "b.safetensors", torch.float32)
    for names in ("kohya", "peft"):
        made = extract(
            reduced_file, tmp_path / "b.safetensors", tmp_path / "y.safetensors", rank=4, dtype=torch.float32, names=names
        )
        assert (made.modules, made.kept) == (1, pytest.approx(1))
        pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
        pipe.set_loras([made.path])
        assert_close(
            pipe.model.state_dict()[f"{ATTENTION}.to_q.weight"],
            load_file(tmp_path / "b.safetensors")[f"{ATTENTION}.to_q.weight"],
            1e-5,
        )
    metadata = open_checkpoint(made.path).metadata
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["sshs_model_hash"] == data_sha256(made.path)


def test_extract_refuses(reduced_file, tuned, tmp_path):
    out = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match=r"differs from .* in nothing that a LoRA can hold"):
        extract(reduced_file, reduced_file, out)
    for options, why in (({"rank": 0}, "rank"), ({"energy": 2.0}, "energy"), ({"names": "x"}, "names")):
        with pytest.raises(UsageError, match=f"{why}: expected"):
            extract(reduced_file, tuned, out, **options)
    assert not out.exists()


def test_resize(lora, tmp_path):
    made = resize(lora, tmp_path / "same.safetensors", 4, dtype=torch.float32)
    assert made.kept == pytest.approx(1)
    assert all(torch.allclose(found, wanted, atol=1e-6) for found, wanted in zip(deltas(made.path), deltas(lora), strict=True))
    made = resize(lora, tmp_path / "two.safetensors", 2, dtype=torch.float32)
    lost = sum(float((a - b).square().sum()) for a, b in zip(deltas(made.path), deltas(lora), strict=True))
    all_of_it = sum(float(each.square().sum()) for each in deltas(lora))
    assert made.kept == pytest.approx(1 - lost / all_of_it, abs=1e-4)
    assert open_checkpoint(made.path).metadata["ss_network_dim"] == "2"
    assert open_checkpoint(made.path).metadata["ss_tag_frequency"]


def deltas(path) -> list[torch.Tensor]:
    tensors = load_file(path)
    names = sorted(key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight"))
    found = []
    for name in names:
        up, down = tensors[f"{name}.lora_up.weight"].float(), tensors[f"{name}.lora_down.weight"].float()
        found.append(up.flatten(1) @ down.flatten(1) * float(tensors[f"{name}.alpha"]) / len(down))
    return found


def test_merge_is_exact_whatever_they_call_it(reduced_file, lora, tmp_path):
    save_file(whole(seed=500), tmp_path / "y.safetensors")
    other = rename(tmp_path / "y.safetensors", tmp_path / "peft.safetensors", "peft", torch.float32, reduced_file).path
    assert not [key for key in load_file(other) if "alpha" in key]
    made = merge([lora, other], [0.5, -1.0], tmp_path / "both.safetensors", dtype=torch.float32, model=reduced_file)
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    pipe.set_loras([(lora, 0.5), (tmp_path / "y.safetensors", -1.0)])
    expected = {key: value.clone() for key, value in pipe.model.state_dict().items()}
    pipe.set_loras([made.path])
    assert all(torch.allclose(value, expected[key], atol=1e-5) for key, value in pipe.model.state_dict().items())
    cut = merge([lora, other], [0.5, -1.0], tmp_path / "cut.safetensors", rank=2, dtype=torch.float32, model=reduced_file)
    assert {len(value) for key, value in load_file(cut.path).items() if key.endswith("lora_down.weight")} == {2}


def test_merge_and_rename_refuse(lora, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="model: the LoRAs tell no family"):
        merge([lora, lora], [1.0, 1.0], out)
    with pytest.raises(UsageError, match="expected two LoRAs or more"):
        merge([lora], [1.0], out)
    save_file({f"{QUERY}.lokr_w1": torch.zeros(4, 4), f"{QUERY}.lokr_w2": torch.zeros(8, 8)}, lora)
    with pytest.raises(CheckpointError, match="expected a LoRA of products"):
        resize(lora, out, 2)
    assert not out.exists()


def test_the_doctor(reduced_file, lora, capsys):
    facts = examined(lora, reduced_file)
    assert facts["kinds"] == {"LoRA": facts["modules"]}
    assert facts["ranks"] == {4: facts["modules"]}
    assert facts["alphas"] == {2.0: facts["modules"]}
    assert (facts["family"], facts["fitting"], facts["misfits"], facts["dead"]) == ("sd1", facts["modules"], {}, [])
    assert facts["about"] == {"base": "sd_v1", "words": {"clay, toy": 3}}
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    key = f"{ATTENTION}.to_q.weight"
    before = pipe.model.state_dict()[key].clone()
    pipe.set_loras([lora])
    relative = float((pipe.model.state_dict()[key] - before).norm() / before.norm())
    assert 0.2 * relative < facts["change"]["input.1"] < 5 * relative
    assert facts["strongest"]["change"] >= max(facts["change"].values())
    assert main(["inspect", str(lora), "-m", str(reduced_file)]) == 0
    said = capsys.readouterr().out
    assert f"{facts['modules']} of {facts['modules']} modules fit" in said
    assert main(["inspect", str(lora), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora"]["ranks"] == {"4": facts["modules"]}


def test_the_doctor_finds_what_is_wrong(reduced_file, lora):
    tensors = whole()
    tensors[f"{QUERY}.lora_up.weight"].zero_()
    tensors |= {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 1), "lora_unet_nowhere.lora_down.weight": torch.ones(1, 2)}
    tensors |= {"strange": torch.ones(1), "bundle_emb.clay.clip_l": torch.ones(1, 64)}
    save_file(tensors, lora)
    facts = examined(lora, reduced_file)
    assert facts["dead"] == [QUERY]
    assert facts["strange"] == ["strange"]
    assert facts["embeddings"] == ["clay"]
    assert set(facts["misfits"]) == {"strange", "lora_unet_nowhere.lora_up.weight", "lora_unet_nowhere.lora_down.weight"}
    tensors[f"{QUERY}.lora_up.weight"].fill_(float("nan"))
    save_file(tensors, lora)
    assert examined(lora, reduced_file)["broken"] == [f"{QUERY}.lora_up.weight"]


def test_the_doctor_counts_what_fits_which_family(tmp_path):
    """Of a LoRA for SDXL's second text encoder and of one for SD 1.x at their real widths."""
    name = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{name}.lora_up.weight": torch.ones(5120, 1), f"{name}.lora_down.weight": torch.ones(1, 1280)},
        tmp_path / "a.safetensors",
    )
    assert examined(tmp_path / "a.safetensors")["fits"] == {"sd1": 0, "sd2": 0, "sdxl": 1, "sdxl-refiner": 1}
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{name}.lora_up.weight": torch.ones(3072, 1), f"{name}.lora_down.weight": torch.ones(1, 768)},
        tmp_path / "a.safetensors",
    )
    assert examined(tmp_path / "a.safetensors")["fits"] == {"sd1": 1, "sd2": 0, "sdxl": 0, "sdxl-refiner": 0}


def test_commands(reduced_file, tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lora", "extract", str(reduced_file), str(tuned), "-o", "x.safetensors", "--rank", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] > 100
    assert main(["lora", "resize", "x.safetensors", "-o", "y.safetensors", "--rank", "2"]) == 0
    assert main(["lora", "merge", "x.safetensors:0.5", "y.safetensors", "-o", "z.safetensors", "-m", str(reduced_file)]) == 3
    assert "has more than products" in capsys.readouterr().err  # biases and norms
    save_file(product(QUERY, f"{ATTENTION}.to_q.weight"), "p.safetensors")
    assert main(["lora", "merge", "p.safetensors:0.5", "p.safetensors", "-o", "z.safetensors", "-m", str(reduced_file)]) == 0
    assert main(["lora", "rename", "p.safetensors", "-o", "z.safetensors", "--names", "peft", "-m", str(reduced_file)]) == 0
    for words, why in (
        (["extract", "x.safetensors"], "expected two checkpoints"),
        (["merge", "x.safetensors"], "expected two LoRAs or more"),
        (["merge", "x.safetensors:1:2", "y.safetensors"], "expected NAME"),
        (["resize", "x.safetensors"], "expected --rank R"),
        (["resize", "x.safetensors", "--rank", "2", "--dtype", "float8_e4m3fn"], "dtype: expected float32"),
        (["resize", str(reduced_file), "--rank", "2"], "expected a LoRA of products"),
    ):
        assert main(["lora", *words, "-o", "out.safetensors"]) in (2, 3)
        assert why in capsys.readouterr().err


@pytest.mark.slow
def test_at_the_width_of_sd_15(tmp_path):
    """Every module of kohya's 350, at rank 32: as the formula says, in float64."""
    from helpers import FULL

    from minisd.addons.lora_names import targets, written_names
    from minisd.models.family import SD1

    shapes = FULL.shapes()
    names = written_names(targets(shapes, SD1), SD1, "kohya")
    path, generator = write_checkpoint(tmp_path / "full.safetensors", FULL), torch.Generator().manual_seed(0)
    tensors = {}
    for target, name in names.items():
        shape = shapes[target.key]
        if len(shape) > 1 and "embed" not in name:
            tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 32, *(1 for _ in shape[2:]), generator=generator) * 0.02
            tensors[f"{name}.lora_down.weight"] = torch.randn(32, *shape[1:], generator=generator) * 0.02
            tensors[f"{name}.alpha"] = torch.tensor(16.0)
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = minisd.load(path, device="cpu", dtype="float32")
    base = {key: value.clone() for key, value in pipe.model.state_dict().items()}
    pipe.set_loras([(tmp_path / "x.safetensors", 0.7)])
    for target, name in names.items():
        if f"{name}.alpha" in tensors:
            up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
            wanted = base[target.key].double() + 0.35 * (up.flatten(1) @ down.flatten(1)).reshape(base[target.key].shape)
            assert_close(pipe.model.state_dict()[target.key], wanted, 1e-6)
    pipe.set_loras([])
    assert all(torch.equal(value, base[key]) for key, value in pipe.model.state_dict().items())

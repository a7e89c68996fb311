"""Files that are whole, files that are not, and files that are something else."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import FULL, REDUCED, manifest, write_checkpoint
from safetensors.torch import load_file, save_file

import minisd
from minisd.files import checkpoint as checkpoints
from minisd.files.checkpoint import Checkpoint, file_sha256, hashed_ahead, open_checkpoint
from minisd.files.entry import Entry
from minisd.files.model import build
from minisd.files.recognition import recognise
from minisd.files.tensors import convert, load_tensors
from minisd.files.writers import is_unneeded
from minisd.models.family import SD1
from minisd.workbench.inspecting import as_text, inspect
from minisd.workbench.tree import arithmetic, part_in_words


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A whole checkpoint that is quick to copy: the reduced one with nothing but zeros."""
    weights = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in REDUCED.shapes().items()}
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(weights, path)
    return path


def variant(small: Path, folder: Path, change) -> Path:
    weights = load_file(small)
    change(weights)
    save_file(weights, folder / "variant.safetensors")
    return folder / "variant.safetensors"


def refused(path: Path, dtype: str | None = None) -> str:
    with pytest.raises(minisd.CheckpointError) as caught:
        minisd.load(path, device="cpu", dtype=dtype)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_opens(tmp_path, dtype):
    path = write_checkpoint(tmp_path / "x.safetensors", dtype=dtype)
    pipe = minisd.load(path, device="cpu", dtype="float32")
    wanted = load_file(path)
    for key, value in pipe.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[key].float()), key


def test_spare_buffers_are_ignored(small, tmp_path):
    spare = {key: torch.zeros(shape) for key, shape in manifest("sd15").items() if is_unneeded(key)}
    spare["model_ema.diffusion_modelout0bias"] = torch.zeros(3)
    spare["first_stage_model.loss.logvar"] = torch.zeros(())
    assert len(spare) == 17
    path = variant(small, tmp_path, lambda weights: weights.update(spare))
    model = build(open_checkpoint(path), SD1)
    assert set(model.state_dict()) == set(load_file(small))
    assert inspect(path)["parts"]["unused"]["tensors"] == 17


def test_missing_and_unknown_keys_are_counted(small, tmp_path):
    def change(weights):
        for i in range(20):
            weights[f"model.diffusion_model.extra.{i:02}"] = torch.zeros(1)
        del weights["first_stage_model.quant_conv.bias"]

    message = refused(variant(small, tmp_path, change))
    assert "1 key is missing: first_stage_model.quant_conv.bias" in message
    assert "20 keys are unknown: model.diffusion_model.extra.00, " in message
    assert "extra.09, … (20 in all)" in message


def test_integer_weights_are_refused(small, tmp_path):
    path = variant(small, tmp_path, lambda w: w.update({"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int32)}))
    assert "'model.diffusion_model.out.2.bias': expected F64, F32, F16, BF16, F8_E4M3, F8_E5M2, found I32" in refused(path)


UNET = "model.diffusion_model.input_blocks.0.0.weight"
OTHERS = {
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_x.alpha"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a VAE alone": ["first_stage_model.decoder.conv_in.weight"],
    "a VAE": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "a VAE in diffusers' naming": ["decoder.up_blocks.0.resnets.0.conv1.weight"],
    "a tiny autoencoder (TAESD)": ["1.weight", "3.conv.0.weight"],
    "a UNet alone": [UNET],
    "a UNet or ControlNet in diffusers' naming": ["down_blocks.0.resnets.0.conv1.weight"],
    "a text encoder alone": ["text_model.final_layer_norm.weight"],
    "a UNet and a text encoder alone": ["cond_stage_model.model.ln_final.weight", UNET],
    "a Flux model": ["double_blocks.0.img_attn.qkv.weight"],
    "a Stable Diffusion 3 model": ["model.diffusion_model.joint_blocks.0.x.weight"],
    "a depth-to-image model": ["depth_model.model.x", UNET],
    "an unCLIP model": ["embedder.model.visual.proj"],
    "the x4 upscaler": ["low_scale_model.betas"],
    "a textual inversion embedding": ["emb_params"],
    "no model that minisd knows": ["weight"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_named_for_what_they_are(what, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 4, 1, 1) for key in OTHERS[what]}, path)
    message = refused(path)
    assert f"this {'is' if what.startswith('no ') else 'looks like'} {what}" in message
    assert OTHERS[what][0] in message
    facts = inspect(path)
    assert facts["family"] is None
    assert facts["looks_like"] in message
    assert what.rstrip(",") in as_text(facts)


def test_other_numbers_of_input_channels_are_named(small, tmp_path):
    def change(weights):
        weights[UNET] = torch.zeros(32, 7, 3, 3)

    assert "Stable Diffusion 1.x with 7 input channels" in refused(variant(small, tmp_path, change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am a text\n", "is a text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"PK\x03\x04" + bytes(100), "is not a whole torch.save file"),
        (b"\x80\x02}q\x00." + bytes(50), "is a Python pickle, but not one of torch.save"),
        (b"PK\x05\x06" + bytes(18), "zip archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(30), "7z archive"),
        (b"GGUF" + bytes(50), "GGUF"),
        (b'{"a": 1}', "JSON"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG picture"),
        (bytes(range(200, 256)), "is not a .safetensors or .ckpt file"),
        (struct.pack("<Q", 1000) + b"{" + b" " * 20, "inside its header"),
        (struct.pack("<Q", 20) + b'{"a":1}             ', "is not a whole"),
        (struct.pack("<Q", 2**63) + b"{}" + bytes(20), "is not a .safetensors or .ckpt file"),
        (struct.pack("<Q", 9 << 20) + b"{" + bytes(9 << 20), "header of 9,437,184 bytes"),
    ],
)
def test_what_is_no_safetensors_file_is_told_apart(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert message in refused(path)


def test_missing_files_and_folders(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.safetensors")
    assert "is a folder" in refused(tmp_path)


def test_a_file_cut_anywhere_is_refused(small, tmp_path):
    whole = small.read_bytes()
    for i in range(64):
        (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) * i // 64])
        refused(tmp_path / "cut.safetensors")


def test_names_that_lead_elsewhere_are_refused(tmp_path):
    for name in ("../../etc/passwd", "a\0b", "/root"):
        save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
        assert "is not an honest tensor name" in refused(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(reduced_file, tmp_path, monkeypatch):
    """Not a SIGBUS, which would be the end of a process that had mapped it."""
    path = tmp_path / "shrinks.safetensors"
    path.write_bytes(reduced_file.read_bytes())
    monkeypatch.setattr("minisd.files.model.compare", lambda *_: path.open("r+b").truncate(path.stat().st_size // 2))
    assert "changed while it was being opened" in refused(path)


def test_a_file_that_ends_while_it_is_read_is_an_error(reduced_file, tmp_path, monkeypatch):
    path = tmp_path / "shrinks.safetensors"
    path.write_bytes(reduced_file.read_bytes())

    def cut(*_):
        if path.stat().st_size > 100_000:
            path.open("r+b").truncate(100_000)

    monkeypatch.setattr("minisd.files.tensors.convert", cut)
    assert "could not be read to its end: it ends at byte" in refused(path, "bfloat16")


def test_a_tensor_longer_than_the_buffer_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("minisd.files.tensors.PIECE", 64)
    monkeypatch.setattr("minisd.files.tensors.NUMBERS", 64)
    weights = {
        "a": torch.randn(7, 11),
        "b": torch.zeros(0, 3),
        "c": torch.randn(33).half(),
        "d": torch.randn(()),
        "e": torch.randn(5),
        "f": torch.randn(7, 3, 3, 3).half(),
        "g": torch.randn(2, 9, 3, 3),
        "h": torch.zeros(2, 0, 3, 3),
    }
    save_file(weights, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        found = load_tensors(checkpoint, weights, dtype)
        assert all(torch.equal(found[key], weights[key].to(dtype)) for key in weights)
        assert all(found[key].is_contiguous(memory_format=torch.channels_last) for key in "fgh")


def test_inspect(tiny):
    facts = inspect(tiny.checkpoint.path, with_hash=True)
    assert facts["family"] == "sd1"
    assert facts["native_size"] == (64, 64)
    assert {name: part["parameters"] for name, part in facts["parts"].items()} == {
        "UNet": sum(p.numel() for p in tiny.unet.parameters()),
        "VAE": sum(p.numel() for p in tiny.vae.parameters()),
        "text: CLIP ViT-L": sum(p.numel() for p in tiny.text_encoders[0].parameters()),
    }
    assert facts["parts"]["UNet"]["dtypes"].keys() == {"F16"}
    assert facts["model_hash"] == facts["sha256"][:10]
    assert "Stable Diffusion 1.x (sd1), task draw, predicts epsilon, 64x64" in as_text(facts)
    json.dumps(facts)


def test_inspect_shows_hostile_metadata_escaped_and_short(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors", {"a\x1b[31m": "b\n" * 100_000, "thumbnail": "data:" * 1000})
    text = as_text(inspect(tmp_path / "x.safetensors"))
    assert "\x1b" not in text
    assert "a\\x1b[31m = b\\nb\\n" in text
    assert "(200,000 characters)" in text
    assert len(text) < 1500


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_check_finds_every_broken_number(small, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("minisd.files.tensors.PIECE", 4096)
    weights = {key: value.to(dtype) for key, value in load_file(small).items()}
    weights["large"] = torch.full((3000,), float(torch.finfo(dtype).max) / 2, dtype=dtype)  # its sum overflows, no number does
    save_file(weights, tmp_path / "whole.safetensors")
    assert inspect(tmp_path / "whole.safetensors", check=True)["broken"] == []
    keys = list(weights)[:: len(weights) // 20]
    for i, key in enumerate(keys):
        weights[key].view(-1)[-1 if i % 2 else 0] = float("nan") if i % 3 else float("-inf")
    save_file(weights, tmp_path / "poisoned.safetensors")
    facts = inspect(tmp_path / "poisoned.safetensors", check=True)
    assert facts["broken"] == sorted(keys)
    assert f"NaN or infinity in {len(keys)} tensors" in as_text(facts)


def test_conversion_rounds_as_torch_does():
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)  # every float16 that there is
    values = values[values.isfinite()].repeat(33)
    target = torch.empty_like(values, dtype=torch.bfloat16)
    convert(values, target, torch.empty(values.numel()))
    assert torch.equal(target, values.to(torch.bfloat16))


def test_hash_is_remembered_until_the_file_changes(tmp_path):
    import hashlib
    import os

    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert file_sha256(path) == file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "is not a regular file" in refused(tmp_path / "pipe.safetensors")


def test_the_tree_of_a_checkpoint_accounts_for_all_of_it(reduced_file):
    facts = inspect(reduced_file, check=True, with_tree=True, size=(64, 128))
    blocks = facts["blocks"].values()
    known = [key for key in facts["parts"] if key != "unused"]
    for what in ("tensors", "parameters", "bytes"):
        assert sum(block[what] for block in blocks) == sum(facts["parts"][part][what] for part in known)
    weights = load_file(reduced_file)
    middle = torch.cat([value.double().flatten() for key, value in weights.items() if ".middle_block." in key])
    assert facts["blocks"]["middle"]["rms"] == pytest.approx(float(middle.square().mean().sqrt()), rel=1e-5)
    assert facts["blocks"]["middle"]["max"] == float(middle.abs().max())
    assert facts["flops"]["picture"] == sum(block["flops"] for block in blocks)
    assert "a picture of 64x128 in 20 steps with guidance" in as_text(facts)


def test_arithmetic_of_sd15():
    """803 GFLOPs for a picture's pass through the UNet at 64x64 latents, twice a step; two texts of 77 tokens through 85 million
    weights of matrices; the first convolution by hand."""
    checkpoint = Checkpoint(Path("x"), {key: Entry("F16", shape, 0) for key, shape in FULL.shapes().items()}, {}, 0, 0)
    counted = arithmetic(checkpoint, recognise(checkpoint), (512, 512))
    assert counted["input.0"] == 20 * 2 * 2 * 64 * 64 * 9 * 4 * 320
    unet = sum(flops for group, flops in counted.items() if part_in_words(group) == "UNet" and group)
    assert unet / 20 / 2 == pytest.approx(803e9, rel=0.001)
    text = sum(flops for group, flops in counted.items() if group.startswith("text"))
    assert text == pytest.approx(2 * 2 * 77 * 85e6, rel=0.03)


def test_hashes_of_the_tensors_alone(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "b.safetensors", {"note": "another header"})
    a, b = (inspect(tmp_path / f"{name}.safetensors", with_hash=True) for name in "ab")
    assert a["data_sha256"] == b["data_sha256"] == hashlib.sha256(torch.ones(3).numpy().tobytes()).hexdigest()
    assert a["sha256"] != b["sha256"]
    assert (a["autov3"], a["content"]) == (a["data_sha256"][:12], None)
    for promise, kept in ((f"0x{a['data_sha256']}", True), ("0x00", False)):
        save_file({"w": torch.ones(3)}, tmp_path / "c.safetensors", {"modelspec.hash_sha256": promise})
        facts = inspect(tmp_path / "c.safetensors", with_hash=True)
        assert facts["content"] is kept
        assert ("NOT what the metadata says" in as_text(facts)) is not kept


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A .safetensors file with this header, a JSON value or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


PLAIN_FACTS = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "facts",
    [["F32", [1], [0, 4]], PLAIN_FACTS | {"dtype": {"F32": None}}, PLAIN_FACTS | {"data_offsets": {"0": 0, "1": 4}}, 7, None],
)
def test_headers_in_other_spellings_are_refused(facts, tmp_path):
    """The library takes some that nobody writes."""
    path = raw_file(tmp_path / "x.safetensors", {"w": facts}, b"abcd")
    with pytest.raises(minisd.CheckpointError, match=r"x\.safetensors: "):
        open_checkpoint(path)
    assert open_checkpoint(raw_file(path, {"w": PLAIN_FACTS | {"more": 1}}, b"abcd")).entries["w"].shape == (1,)


@pytest.mark.parametrize("name", ["a.²", "down.٣.weight", "①"])
def test_digits_that_number_nothing_are_refused(name, tmp_path):
    path = raw_file(tmp_path / "x.safetensors", {name: PLAIN_FACTS}, b"abcd")
    with pytest.raises(minisd.CheckpointError, match="is not an honest tensor name"):
        open_checkpoint(path)


@pytest.mark.parametrize("spelling", [PLAIN_FACTS | {"shape": [0], "data_offsets": [0, 0]}, ["F32", [0], [0, 0]]])
def test_a_hundred_thousand_empty_tensors_are_counted_and_not_listed(spelling, tmp_path):
    header = json.dumps({f"t{i}": spelling for i in range(100_000)}, separators=(",", ":")).encode()
    path = raw_file(tmp_path / "x.safetensors", header)
    begin = time.process_time()
    with pytest.raises(minisd.CheckpointError, match="more than 10,000 tensors"):
        open_checkpoint(path)
    assert time.process_time() - begin < 2  # seconds; listed, they took minutes


def test_ten_thousand_tensors_are_taken(tmp_path):
    empty = PLAIN_FACTS | {"shape": [0], "data_offsets": [0, 0]}
    path = raw_file(tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}} | {f"t{i}": empty for i in range(10_000)})
    assert len(open_checkpoint(path).entries) == 10_000


CUTTING = """
import os, sys, threading
from pathlib import Path
from minisd.errors import CheckpointError
from minisd.files.checkpoint import open_checkpoint

path = Path(sys.argv[1])
whole, refused = path.read_bytes(), 0
done = threading.Event()

def cut():
    while not done.is_set():
        with path.open("r+b") as file:
            file.truncate(100)
            file.write(whole)

thread = threading.Thread(target=cut)
thread.start()
for _ in range(2000):
    try:
        open_checkpoint(path)
    except CheckpointError:
        refused += 1
done.set()
thread.join()
print(refused)
"""


def test_a_file_that_is_cut_while_it_is_opened_is_an_error(tmp_path):
    """Not a SIGBUS: the header is read, never mapped."""
    header = {f"t{i:04}": PLAIN_FACTS | {"data_offsets": [4 * i, 4 * i + 4]} for i in range(1000)}
    path = raw_file(tmp_path / "x.safetensors", header, bytes(4000))
    done = subprocess.run([sys.executable, "-c", CUTTING, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_what_nobody_thought_of_is_an_error_of_the_file(tmp_path, monkeypatch):
    path = raw_file(tmp_path / "x.safetensors", {"w": PLAIN_FACTS}, b"abcd")
    monkeypatch.setattr("minisd.files.checkpoint.read_safetensors", lambda *_: {}["\x1b[2J"])
    with pytest.raises(minisd.CheckpointError, match=r"x\.safetensors: .*KeyError: '\\x1b\[2J'"):
        open_checkpoint(path)


def test_a_hash_that_a_thread_is_at_is_waited_for_and_found_out_once(tmp_path, monkeypatch):
    """Loading begins it, the recipe of a picture asks for it."""
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    begun, go, usual, count = threading.Event(), threading.Event(), checkpoints.hashed, []

    def slow(path, *stopped):
        count.append(path)
        begun.set()
        assert go.wait(60)
        return usual(path, *stopped)

    monkeypatch.setattr(checkpoints, "hashed", slow)
    opened = hashed_ahead(open_checkpoint(tmp_path / "a.safetensors"))
    assert begun.wait(60)
    with pytest.raises(InterruptedError):  # whoever no longer wants to know it does not wait
        file_sha256(opened.path, lambda: True)
    threading.Timer(0.05, go.set).start()
    assert opened.sha256() == hashlib.sha256(opened.path.read_bytes()).hexdigest()
    hashed_ahead(opened)
    assert file_sha256(opened.path) == opened.sha256()
    assert len(count) == 1


def test_the_hash_of_a_file_that_is_replaced_meanwhile_is_not_that_of_the_new_one(tmp_path):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w": torch.ones(3)}, file)
    save_file({"w": torch.ones(4)}, other)
    wanted = hashlib.sha256(other.read_bytes()).hexdigest()
    checkpoints.hashed(file, lambda: bool(other.exists() and other.replace(file)) and False)  # asked after the first piece
    assert file_sha256(file) == wanted


def test_a_file_that_is_gone_is_hashed_for_nobody(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    opened = open_checkpoint(tmp_path / "a.safetensors")
    opened.path.unlink()
    assert hashed_ahead(opened).sha256() is None

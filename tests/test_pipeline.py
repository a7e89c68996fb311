from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import minisd
from minisd.pictures.init import to_mask, to_pixels
from minisd.pictures.metadata import parameters_text, read_recipe
from minisd.plan import planned
from minisd.request import Request
from minisd.result import finish

FAST = {"steps": 2, "width": 64, "height": 64}


def pixels(result: minisd.Result) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def test_module_has_the_keys_of_the_file(reduced):
    assert set(reduced.model.state_dict()) == set(reduced.checkpoint.entries)


def test_same_seed_same_bytes_in_two_processes(tmp_path):
    code = "import minisd, sys; minisd.load(device='cpu')('a red circle', seed=7, steps=3).save(sys.argv[1])"
    for name in ("a.png", "b.png"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, cwd=tmp_path)
    a, b = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert hashlib.sha256(a).hexdigest() == hashlib.sha256(b).hexdigest()


@pytest.mark.parametrize("options", [{"sampler": "euler"}, {"sampler": "ddim", "eta": 0.8}, {"guidance_scale": 1}])
def test_picture_i_of_a_batch_equals_the_single_run(tiny, options):
    together = tiny("a star", seed=10, num_images=3, steps=5, **options)
    assert together.seeds == [10, 11, 12]
    alone = [tiny("a star", seed=seed, steps=5, **options) for seed in together.seeds]
    assert pixels(together) == [pixels(result)[0] for result in alone]
    assert len(set(pixels(together))) == 3


def test_batch_in_one_go_equals_the_single_run_within_rounding(reduced, monkeypatch):
    """What a GPU does, done here: the network runs on all pictures at once."""
    plan = planned(Request("a star", seed=3, num_images=2, **FAST), reduced.capabilities())
    monkeypatch.setattr("minisd.pipeline.in_parts", lambda plan, device: [slice(0, 2)])
    both = finish(reduced.draw(plan)).latents
    monkeypatch.undo()
    alone = reduced("a star", seed=4, **FAST).latents
    assert torch.allclose(both[1:], alone, atol=1e-4 * float(alone.abs().max()))


def test_batch_size_is_how_many_pictures_a_step_has_on_a_cpu(reduced, monkeypatch):
    monkeypatch.setattr(reduced, "batch_size", 2)
    steps = list(reduced.stream("a star", seed=3, num_images=3, **FAST))
    assert {len(step.latents) for step in steps if step.picture == 0} == {2}
    assert {len(step.latents) for step in steps if step.picture == 2} == {1}
    monkeypatch.setattr(reduced, "batch_size", 0)
    with pytest.raises(minisd.UsageError, match=r"batch_size: expected a whole number from 1 to .*, found 0"):
        reduced("a star", **FAST)


def test_list_of_prompts(tiny):
    result = tiny(["a red circle", "a blue star"], num_images=2, seed=1, **FAST)
    assert [recipe["prompt"] for recipe in result.metadata] == ["a red circle"] * 2 + ["a blue star"] * 2
    assert result.seeds == [1, 2, 3, 4]
    assert pixels(tiny("a blue star", seed=3, **FAST))[0] == pixels(result)[2]


def test_no_seed_draws_one_and_reports_it(tiny):
    first, second = tiny("a star", **FAST), tiny("a star", seed=-1, **FAST)
    assert first.seeds != second.seeds
    assert pixels(tiny("a star", seed=first.seeds[0], **FAST)) == pixels(first)


def test_guidance_scale_1_runs_no_unconditional_pass(tiny, monkeypatch):
    batches = []
    forward = type(tiny.unet).forward
    monkeypatch.setattr(type(tiny.unet), "forward", lambda self, x, *rest: batches.append(len(x)) or forward(self, x, *rest))
    tiny("a star", seed=0, guidance_scale=1, **FAST)
    tiny("a star", seed=0, guidance_scale=2, **FAST)
    assert batches == [1, 1, 2, 2]


def test_negative_prompt_matters(tiny):
    assert pixels(tiny("a star", seed=0, **FAST)) != pixels(tiny("a star", negative_prompt="a red star", seed=0, **FAST))


def test_default_size_is_that_of_the_checkpoint(tiny, reduced):
    assert tiny("", seed=0, steps=1).images[0].size == (64, 64)
    assert reduced.recognition.size == (512, 512)
    assert tiny("", seed=0, steps=1, width=96, height=72).images[0].size == (96, 72)


def test_steps_can_be_watched(tiny):
    seen = list(tiny.stream(Request("a star", seed=0, num_images=2, steps=3)))
    assert [step.index for step in seen] == list(range(6))
    assert {step.total for step in seen} == {6}
    assert seen[0].latents.shape == seen[0].denoised.shape == (1, 4, 16, 16)
    assert torch.is_grad_enabled()


def test_latents_instead_of_a_seed(tiny):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    assert pixels(tiny("a star", latents=noise, **FAST)) == pixels(tiny("a star", seed=5, **FAST))
    assert tiny("a star", latents=noise, **FAST).seeds == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number from 1 to 999, found 0"),
        ({"steps": 1000}, "steps: .* found 1000"),
        ({"steps": 2.5}, r"steps: .* found 2\.5"),
        ({"width": 70}, "width: expected a multiple of 8, found 70; the nearest are 64 and 72"),
        ({"height": 8000}, "height: .* found 8000"),
        ({"sampler": "dpn2"}, "sampler: 'dpn2' is unknown; did you mean dpm_2"),
        ({"spacing": "cosine"}, "spacing: 'cosine' is unknown; did you mean simple"),
        ({"guidance_scale": float("nan")}, "guidance_scale: .* found nan"),
        ({"eta": 0.5}, "eta: sampler 'Euler' has no such option, found 0.5"),
        ({"eta": 2.0, "sampler": "ddim"}, "eta: expected a number from 0 to 1"),
        ({"num_images": 0}, "num_images: .* found 0"),
        ({"seed": -5}, "seed: .* found -5"),
        ({"seed": True}, "seed: .* found True"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents: expected a tensor of shape \(1, 4, 16, 16\), found \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 16, 16), "seed": 1}, "latents and seed"),
        ({"prompt": "x" * 100_000}, "prompt: expected at most 10,000 characters, found 100,000"),
        ({"prompt": []}, "prompt: expected at least one"),
        ({"prompt": [3]}, "prompt: expected a text .* found int"),
        ({"prompt": "a\0b"}, "prompt: .* NUL"),
        ({"prompt": "\ud800"}, "prompt: expected text in UTF-8"),
    ],
)
def test_bad_arguments_are_named(tiny, arguments, message):
    with pytest.raises(minisd.UsageError, match=message):
        tiny(**({"prompt": "a star"} | arguments))


def test_bad_device_and_dtype():
    with pytest.raises(minisd.UsageError, match="device: expected one that this machine has, found 'warp'"):
        minisd.load(device="warp")
    with pytest.raises(minisd.UsageError, match="dtype: expected one of float32"):
        minisd.load(device="cpu", dtype="int8")
    with pytest.raises(minisd.UsageError, match="found float16"):
        minisd.load(device="cpu", dtype="float16")


def test_nan_in_the_unet_is_told_and_not_drawn(reduced_file):
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    pipe.unet.out[2].bias[0] = float("nan")
    with pytest.raises(minisd.NonFiniteError, match="the UNet produced NaN or infinity in float32"):
        pipe("a star", **FAST)


def test_vae_that_overflows_is_run_again_in_float32(reduced_file, monkeypatch):
    pipe = minisd.load(reduced_file, device="cpu", dtype="bfloat16")
    plain = pipe("a star", seed=0, **FAST)
    kind, decode = type(pipe.vae), type(pipe.vae).decode

    def overflow(vae, latents):
        image = decode(vae, latents)
        return image if latents.dtype == torch.float32 else image.fill_(float("inf"))

    monkeypatch.setattr(kind, "decode", overflow)
    with pytest.warns(UserWarning, match="running it again in float32"):
        again = pipe("a star", seed=0, **FAST)
    difference = np.asarray(plain.images[0], dtype=int) - np.asarray(again.images[0], dtype=int)
    assert np.abs(difference).mean() < 5
    assert next(pipe.vae.parameters()).dtype == torch.bfloat16
    monkeypatch.setattr(kind, "decode", lambda vae, latents: decode(vae, latents) * float("nan"))
    with pytest.raises(minisd.NonFiniteError, match="the VAE"), pytest.warns(UserWarning, match="float32"):
        pipe("a star", seed=0, **FAST)


def test_png_carries_what_made_it(tiny, tmp_path):
    prompt = "a “red” circle:\nsecond line, Steps: 3 ü 日本"
    result = tiny(prompt, negative_prompt="blue", seed=9, **FAST)
    (path,) = result.save(tmp_path / "out.png")
    with Image.open(path) as image:
        text, recipe = image.info["parameters"], json.loads(image.info["minisd"])
    lines = text.split("\n")
    assert "\n".join(lines[:2]) == prompt
    assert lines[2] == "Negative prompt: blue"
    assert lines[3].startswith("Steps: 2, Sampler: Euler, CFG scale: 6, Seed: 9, Size: 64x64, Model hash: ")
    assert f"Model hash: {recipe['model_sha256'][:10]}, Model: tiny, RNG: CPU, Version: minisd {minisd.__version__}" in lines[3]
    assert recipe == result.metadata[0] == read_recipe(path)


def test_parameters_text_quotes_what_would_end_a_value(tiny):
    recipe = tiny("a", seed=0, **FAST).metadata[0] | {"version": "1, 2"}
    assert parameters_text(recipe).endswith('Version: "minisd 1, 2"')


def test_saving_many(tiny, tmp_path):
    paths = tiny("a star", seed=0, num_images=3, **FAST).save(tmp_path / "x.png")
    assert [path.name for path in paths] == ["x.png", "x-2.png", "x-3.png"]
    assert [read_recipe(path)["seed"] for path in paths] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-2.png", "x-3.png", "x.png"]


def test_a_failed_save_leaves_the_old_file_and_no_draft(tiny, tmp_path, monkeypatch):
    result = tiny("a star", seed=0, **FAST)
    (path,) = result.save(tmp_path / "x.png")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(minisd.OutputError, match=r"x\.png: could not be written: No space left on device"):
        result.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_through_a_link_keeps_the_link(tiny, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "x.png")
    tiny("a star", seed=0, **FAST).save(tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert read_recipe(tmp_path / "real" / "x.png")["seed"] == 0


def test_a_checkpoint_that_went_away_or_changed_costs_the_hash_not_the_picture(reduced_file, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(reduced_file.read_bytes())
    pipe = minisd.load(path, device="cpu", dtype="bfloat16")
    assert pipe("a star", seed=0, **FAST).metadata[0]["model_sha256"] is not None
    path.write_bytes(b"something else")
    changed = pipe("a star", seed=0, **FAST)
    path.unlink()
    gone = pipe("a star", seed=0, **FAST)
    for result in (changed, gone):
        (picture,) = result.save(tmp_path / "x.png")
        assert read_recipe(picture)["model_sha256"] is None
        with Image.open(picture) as image:
            assert "Model hash" not in image.info["parameters"]


def test_recipe_says_no_more_about_this_machine_than_the_user_did(tiny, reduced_file, tmp_path, monkeypatch):
    assert tiny("a star", seed=0, **FAST).metadata[0]["model_path"] is None  # the box is everywhere
    monkeypatch.chdir(reduced_file.parent)
    assert minisd.load(reduced_file.name, device="cpu")("a star", seed=0, **FAST).metadata[0]["model_path"] == reduced_file.name


def test_a_visitor_goes_home_even_after_an_error():
    from minisd.system.device import on_device

    places: list[str] = []
    part = torch.nn.Linear(1, 1)
    part.to = lambda place: places.append(str(place))

    def fail() -> None:
        with on_device(part, torch.device("cuda")):
            assert places == ["cuda"]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert places == ["cuda", "cpu"]


def test_every_part_visits_the_device_only_while_it_works(monkeypatch):
    """What --offload rests on: text encoder, UNet and VAE one after the other, never two at a time."""
    from contextlib import contextmanager

    order, inside = [], []

    @contextmanager
    def recorded(module, device):
        assert not inside
        inside.append(module)
        order.append(type(module).__name__)
        yield
        inside.remove(module)

    for name in ("fast.engine", "pipeline", "codec"):
        monkeypatch.setattr(f"minisd.{name}.on_device", recorded)
    tiny = minisd.load(device="cpu")
    tiny("a star", seed=0, **FAST)
    assert order == ["CLIPTextModel", "UNet", "AutoencoderKL"]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("<lora:style:0.8> a star", "'<lora:style:0.8>' is read as plain words"),
        ("a clock at 10:30", "':30' at its end is no word but a weight of guidance"),
    ],
)
def test_what_may_be_meant_otherwise_in_a_prompt_is_told(tiny, prompt, told):
    with pytest.warns(UserWarning, match=told):
        planned(minisd.Request(prompt), tiny.capabilities())


@pytest.mark.parametrize("prompt", ["a star (16:9)", "a clock (at 10:30)", "a <star>", "(red:1.2) star: big", "a AND b:2"])
def test_nothing_is_said_of_the_usual(tiny, prompt, recwarn):
    planned(minisd.Request(prompt), tiny.capabilities())
    planned(minisd.Request("a star", negative_prompt="at 10:30"), tiny.capabilities())
    planned(minisd.Request("at 10:30", plain_prompt=True), tiny.capabilities())
    assert not list(recwarn)


def test_sixteen_bits_of_grey_are_scaled():
    grey = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    assert abs(float(to_pixels(grey, 8, 8).mean())) < 0.01
    assert not to_mask(Image.fromarray(np.full((8, 8), 300, dtype=np.uint16)), 8, 8).any()
    assert to_mask(Image.fromarray(np.full((8, 8), 60000, dtype=np.uint16)), 8, 8).all()


def test_a_transparent_mask_keeps():
    assert not to_mask(Image.new("RGBA", (8, 8), (255, 255, 255, 0)), 8, 8).any()
    assert to_mask(Image.new("RGBA", (8, 8), (255, 255, 255, 255)), 8, 8).all()


NONSENSE = [("prompt", 5), ("sampler", []), ("guidance_scale", 10**400), ("original_size", 3), ("device", {}), ("vae_path", True),
            ("crop", [1, "x"]), ("ema", "yes"), ("model_path", 1), ("guidance_rescale", True)]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_a_recipe_of_a_stranger_is_checked(name, value, tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("minisd", json.dumps({"prompt": "x", "seed": 1, name: value}))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=chunks)
    with pytest.raises(minisd.UsageError, match=rf"x\.png: its minisd chunk: {name}: expected"):
        read_recipe(tmp_path / "x.png")


def test_stream_takes_what_the_call_takes_and_checks_it_at_once(tiny):
    steps = list(tiny.stream("a star", seed=1, **FAST))
    again = list(tiny.stream(Request("a star", seed=3, **FAST), seed=1))
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(steps, again, strict=True))
    with pytest.raises(minisd.UsageError, match="steps: expected a whole number"):
        tiny.stream("a star", steps=0)

"""Drawing with ControlNets and T2I-Adapters: the same latents as diffusers, when they act, and what the recipe says of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from controls import control_shapes, their_adapter, their_control
from families import EULER, SMALL, Parts, Small, pipeline
from helpers import assert_close
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd.errors import CheckpointError, MinisdError, UsageError
from minisd.fast.cuda import Cuda
from minisd.models.family import SD1
from minisd.models.shapes import Shapes
from minisd.pictures.metadata import check_kinds
from minisd.plan import planned
from minisd.recipe import repeat
from minisd.request import Request
from minisd.walks import Progress, course, start, walk
from minisd.workbench import blueprint

PROMPT = "a photograph of an astronaut riding a horse"
DEEP = Small(SD1, (1, 1, 2, 2), (1, 1, 1, 0))
CALL = {"width": 96, "height": 64, "guidance_scale": 5.0, "negative_prompt": "blurry"}


def picture(seed: int = 0, width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def euler():
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**EULER)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> (our pipeline, the same weights in diffusers, two files of ControlNets, the same there), each made once."""
    made: dict[str, tuple] = {}

    def get(name: str):
        if name not in made:
            small, folder = SMALL[name], tmp_path_factory.mktemp(name)
            path = small.write(folder / f"{name}.safetensors")
            files, theirs = [], []
            for seed in (3, 4):
                weights = blueprint.random_weights(control_shapes(small.unet()), seed)
                save_file(weights, folder / f"control{seed}.safetensors")
                files.append(folder / f"control{seed}.safetensors")
                theirs.append(their_control(weights, small))
            made[name] = minisd.load(path, device="cpu", dtype="float32"), Parts(path, small), files, theirs
        return made[name]

    return get


def latents(seed: int = 5) -> torch.Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_picture_of_one_and_of_two(name, opened, tmp_path):
    """One picture has to be scaled; the two have strengths and ranges of their own."""
    pipe, parts, files, theirs = opened(name)
    kind = "StableDiffusionXLControlNetPipeline" if name == "sdxl" else "StableDiffusionControlNetPipeline"
    common = {"latents": latents(), **CALL}
    plain = pipe(PROMPT, steps=4, **common).latents
    hints, strengths, starts, ends = [picture(1, 50, 70), picture(2)], [0.7, 1.3], [0.0, 0.25], [0.75, 1.0]
    for count in (1, 2) if name == "sd1" else (1,):
        controls = [minisd.Control(*each) for each in zip(files, hints, strengths, starts, ends, strict=True)][:count]
        found = pipe(PROMPT, steps=4, controls=controls, **common)
        one = count == 1
        reference = pipeline(kind, parts, SMALL[name], tmp_path, euler(), controlnet=theirs[0] if one else theirs)
        wanted = reference(
            PROMPT, image=hints[0] if one else hints, num_inference_steps=4, output_type="latent",
            controlnet_conditioning_scale=strengths[0] if one else strengths,
            control_guidance_start=starts[0] if one else starts, control_guidance_end=ends[0] if one else ends, **common,
        ).images  # fmt: skip
        assert_close(found.latents, wanted, 1e-3)
        assert (found.latents - plain).norm() / plain.norm() > 0.02
        assert found.metadata[0]["way"] == "plain"


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_the_steps_at_which_one_acts(sampler, opened, monkeypatch):
    """By share of the steps, also where a step asks twice: i / N >= start and (i + 1) / N <= end."""
    pipe, _, files, _ = opened("sd1")
    control = minisd.load_control(files[0])
    asked = []
    plain = type(control).residuals
    monkeypatch.setattr(
        type(control), "residuals", lambda self, x, hint, t, *rest: asked.append(float(t[0])) or plain(self, x, hint, t, *rest)
    )
    calls = []
    pipe(
        PROMPT, steps=10, seed=1, sampler=sampler, observe=lambda call, *_: calls.append(call),
        controls=[minisd.Control(control, picture(), start=0.2, end=0.65)], **CALL,
    )  # fmt: skip
    inside = [call for call in calls if call.step in (2, 3, 4, 5)]
    assert len(asked) == len(inside) == (8 if sampler == "heun" else 4)
    wanted = pipe.network.schedule.timestep(torch.tensor([call.sigma for call in inside], dtype=torch.float64))
    assert torch.allclose(torch.tensor(asked), wanted.float(), atol=1e-3)


@pytest.mark.parametrize("how", ["guess", "guess, no guidance", "pooled"])
def test_guess_mode_and_means_as_in_diffusers(how, opened, tmp_path):
    """The prompt alone is asked with it; in guess mode what it adds grows by tenths of a power of ten, means are as they are."""
    pipe, parts, files, theirs = opened("sd1")
    scale = 1.0 if "no guidance" in how else 5.0
    common = {"latents": latents(), **CALL, "guidance_scale": scale}
    if how == "pooled":
        weights = dict(minisd.load_control(files[0]).state_dict())
        own = [their_control(weights, SMALL["sd1"], global_pool_conditions=True)]
        controls = [minisd.Control(minisd.load_control(files[0], pooled=True), picture(), 0.9)]
    else:
        own, controls = theirs, [minisd.Control(file, picture(i), 0.9, guess=True) for i, file in enumerate(files)]
    found = pipe(PROMPT, steps=3, controls=controls, **common)
    pictures = [picture(i) for i in range(len(own))]
    one = len(own) == 1
    reference = pipeline(
        "StableDiffusionControlNetPipeline", parts, SMALL["sd1"], tmp_path, euler(), controlnet=own[0] if one else own
    )
    wanted = reference(
        PROMPT, image=pictures[0] if one else pictures, num_inference_steps=3, output_type="latent", guess_mode="guess" in how,
        controlnet_conditioning_scale=0.9 if one else [0.9] * 2, **common,
    ).images  # fmt: skip
    assert_close(found.latents, wanted, 1e-3)
    both = pipe(PROMPT, steps=3, controls=[replace(each, guess=False, where="both") for each in controls], **common)
    assert (found.latents - both.latents).norm() / wanted.norm() > 5e-3


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_each_side_of_guidance(kind, opened, tmp_path):
    """Of one step the latents are linear in what each side answers, so the changes of the sides add up to that of both."""
    if kind == "adapter":
        pipe = minisd.load(DEEP.write(tmp_path / "deep.safetensors"), device="cpu", dtype="float32")
        file = tmp_path / "adapter.safetensors"
        save_file(their_adapter("full_adapter", 3, (64, 64, 128, 128)).state_dict(), file)
    else:
        pipe, _, (file, _), _ = opened("sd1")

    def drawn(*where: str, **more: object) -> torch.Tensor:
        controls = [minisd.Control(file, picture(), where=each) for each in where]
        return pipe(PROMPT, steps=1, latents=latents(), controls=controls, **(CALL | more)).latents

    plain, both, positive, negative = drawn(), drawn("both"), drawn("positive"), drawn("negative")
    assert min(float((each - plain).norm() / plain.norm()) for each in (positive, negative)) > 1e-3
    assert_close(positive + negative - plain, both, 1e-5)
    assert_close(drawn("positive", "negative"), both, 1e-5)
    assert_close(drawn("positive", guidance_scale=1.0), drawn("both", guidance_scale=1.0), 1e-6)
    assert_close(drawn("negative", guidance_scale=1.0), drawn(guidance_scale=1.0), 1e-5)  # nobody asks for that side
    if kind == "adapter":
        return
    joined = f"{PROMPT} AND a red star"
    apart = [pipe(joined, steps=1, latents=latents(), controls=[minisd.Control(file, picture(), where=each)], **CALL) for each in
             ("both", "positive", "negative")]  # fmt: skip
    bare = pipe(joined, steps=1, latents=latents(), **CALL).latents
    assert_close(apart[1].latents + apart[2].latents - bare, apart[0].latents, 1e-5)


def test_strength_zero_changes_nothing_and_strength_is_linear_in_what_is_added(opened):
    pipe, _, files, _ = opened("sd1")
    control = minisd.load_control(files[0])

    def one_step(*strengths: float) -> torch.Tensor:
        controls = [minisd.Control(control, picture(), strength) for strength in strengths]
        return pipe(PROMPT, steps=1, latents=latents(), controls=controls, **CALL).latents

    assert_close(one_step(0.0), one_step(), 1e-5)
    assert_close(one_step(0.3, 0.5), one_step(0.8), 1e-5)


@torch.no_grad()
def test_an_adapter_draws_as_in_diffusers(tmp_path):
    path = DEEP.write(tmp_path / "deep.safetensors")
    pipe, parts = minisd.load(path, device="cpu", dtype="float32"), Parts(path, DEEP)
    theirs = their_adapter("full_adapter", 3, (64, 64, 128, 128))
    narrow = their_adapter("full_adapter", 3, (64, 64, 64, 64))
    save_file(narrow.state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(UsageError, match=r"it adds to \[64, 64, 64, 64\] channels"):
        pipe(PROMPT, steps=1, controls=[minisd.Control(tmp_path / "narrow.safetensors", picture())], **CALL)
    save_file(theirs.state_dict(), tmp_path / "adapter.safetensors")
    common = {"latents": torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(5)), **CALL, "width": 128}
    hint = picture(1, 128, 64)
    found = pipe(PROMPT, steps=4, controls=[minisd.Control(tmp_path / "adapter.safetensors", hint, 0.8)], **common)
    reference = pipeline("StableDiffusionAdapterPipeline", parts, DEEP, tmp_path, euler(), adapter=theirs)
    wanted = reference(
        PROMPT, image=hint, num_inference_steps=4, output_type="latent", adapter_conditioning_scale=0.8, **common
    ).images
    assert_close(found.latents, wanted, 1e-3)


def test_a_batch_is_its_pictures(opened):
    pipe, _, files, _ = opened("sd1")
    controls = [minisd.Control(files[0], picture())]
    both = pipe(PROMPT, steps=2, seed=7, num_images=2, controls=controls, **CALL)
    single = pipe(PROMPT, steps=2, seed=8, controls=controls, **CALL)
    assert torch.equal(both.latents[1], single.latents[0])


def test_a_recipe_makes_it_again(opened, tmp_path):
    pipe, _, files, _ = opened("sd1")
    picture().save(tmp_path / "hint.png")
    result = pipe(PROMPT, steps=2, seed=7, controls=[minisd.Control(files[0], tmp_path / "hint.png", 0.7, 0.0, 0.9)], **CALL)
    recipe = json.loads(json.dumps(result.metadata[0]))
    (told,) = recipe["controls"]
    assert (told["source"], told["image"]) == (str(files[0]), str(tmp_path / "hint.png"))
    assert (told["strength"], told["start"], told["end"]) == (0.7, 0.0, 0.9)
    again = pipe(repeat(recipe, pipe.checkpoint.path))
    assert torch.equal(again.latents, result.latents)
    picture(9).save(tmp_path / "hint.png")
    with pytest.warns(UserWarning, match="is not the picture that this one was made from"):
        repeat(recipe, pipe.checkpoint.path)
    own = pipe(PROMPT, steps=1, seed=7, controls=[minisd.Control(minisd.load_control(files[0]), picture())], **CALL)
    with pytest.raises(UsageError, match="controls: source: the picture was made with one that had no file"):
        pipe(repeat(own.metadata[0], pipe.checkpoint.path))


@pytest.mark.parametrize(
    "facts",
    [
        "canny",
        [1],
        [{}],
        [{"source": 1, "image": "x.png"}],
        [{"source": "x", "image": []}],
        [{"source": "x", "image": "x", "strength": {}}],
    ],
)
def test_a_recipe_may_say_anything_of_controls(opened, facts):
    pipe, *_ = opened("sd1")
    recipe = pipe(PROMPT, steps=1, seed=7, **CALL).metadata[0] | {"controls": facts}

    def again() -> None:
        check_kinds("a.png", recipe)
        pipe(repeat(recipe, pipe.checkpoint.path))

    with pytest.raises(MinisdError, match="controls"):
        again()


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_what_is_fast_leaves_it_to_the_modules(opened, sampler):
    """A walk with controls is not taken for one without by what computes the network in another form."""
    pipe, _, files, _ = opened("sd1")
    request = Request(PROMPT, steps=2, latents=latents(), sampler=sampler, controls=[minisd.Control(files[0], picture())], **CALL)
    plan = planned(request, pipe.capabilities())
    legs = course(plan, pipe)
    x, draws = start(plan, slice(0, 1), legs[0], None)
    one = walk(plan, slice(0, 1), legs[0], None, Progress(plan, legs, 1))
    engine = Cuda(pipe.unet, graphs=False)
    assert engine.way(one, x) == ("plain", "a ControlNet or T2I-Adapter adds to the network")
    assert engine.way(replace(one, control=None), x)[0] == "recorded"
    with pytest.warns(UserWarning, match="drawing slower than this device can: a ControlNet"):
        *_, last = engine.walk(one, x, draws)
    wanted = pipe(request)
    assert torch.equal(last.latents / legs[-1].levels.end_scale, wanted.latents)


def test_what_does_not_fit_is_refused(opened, tmp_path):
    pipe, _, files, _ = opened("sd1")
    wide, *_ = opened("sdxl")
    with pytest.raises(
        UsageError, match=r"controls: expected a ControlNet for .* 128 channels of text and .*, found one for .* 64 channels"
    ):
        wide(PROMPT, steps=1, controls=[minisd.Control(files[0], picture())], **CALL)
    save_file(their_adapter("full_adapter", 3, (64, 64, 64, 128)).state_dict(), tmp_path / "adapter.safetensors")
    with pytest.raises(UsageError, match=r"controls: expected a T2I-Adapter for .*, found one for Stable Diffusion 1.x"):
        pipe(PROMPT, steps=1, controls=[minisd.Control(tmp_path / "adapter.safetensors", picture())], **CALL)
    with pytest.raises(UsageError, match=r"expected minisd.Control"):
        pipe(PROMPT, controls=[str(files[0])], **CALL)
    with pytest.raises(UsageError, match="controls: expected a list"):
        pipe(PROMPT, controls="canny", **CALL)
    with pytest.raises(UsageError, match=r"controls: image .*does not exist"):
        pipe.stream(PROMPT, controls=[minisd.Control(files[0], tmp_path / "none.png")], **CALL)
    with pytest.raises(CheckpointError, match="does not exist"):
        pipe.stream(PROMPT, controls=[minisd.Control(tmp_path / "none.safetensors", picture())], **CALL)
    with pytest.raises(CheckpointError, match=r"is a checkpoint of Stable Diffusion 1.x, not a ControlNet"):
        pipe.stream(PROMPT, controls=[minisd.Control(pipe.checkpoint.path, picture())], **CALL)
    with pytest.raises(UsageError, match="controls: start: expected less than end"):
        minisd.Control(files[0], picture(), start=0.5, end=0.5)
    for options, why in (
        ({"where": "left"}, "controls: where: expected one of both, positive, negative, found 'left'"),
        ({"range": "time"}, "controls: range: expected one of steps, noise, found 'time'"),
        ({"guess": 1}, "controls: guess: expected true or false, found 1"),
        ({"guess": True, "where": "both"}, "controls: where: expected positive or nothing in guess mode, found 'both'"),
    ):
        with pytest.raises(UsageError, match=why):
            minisd.Control(files[0], picture(), **options)
    guessing = minisd.Control(tmp_path / "adapter.safetensors", picture(), guess=True)
    with pytest.raises(UsageError, match=r"controls: guess: expected a ControlNet, found adapter.safetensors, a T2I-Adapter"):
        wide.stream(PROMPT, controls=[guessing], **CALL)
    with pytest.raises(UsageError, match="controls: strength: expected a number"):
        minisd.Control(files[0], picture(), strength=float("nan"))


def test_one_for_other_latents_is_refused(opened, tiny, tmp_path):
    pipe, _, _, _ = opened("sd1")
    shapes = Shapes({name: tuple(value.shape) for name, value in pipe.unet.state_dict().items()})
    save_file(blueprint.random_weights(blueprint.controlnet(shapes, (16, 32, 96))), tmp_path / "four.safetensors")
    control = minisd.Control(tmp_path / "four.safetensors", picture())
    with pytest.raises(UsageError, match="ControlNet for latents 8 times smaller than the picture, found one for 4 times"):
        pipe(PROMPT, controls=[control], steps=1, **CALL)

"""What a call may be given, and in which forms: lists, numbers of NumPy, pictures as arrays, conditionings, functions."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.cli import main
from minisd.diffusion.denoiser import ClassifierFree, Conditioning, Timeline
from minisd.diffusion.program import program
from minisd.errors import UsageError
from minisd.fast.engine import Plain
from minisd.options import AXES, OPTIONS, RECIPE, RECORDED
from minisd.pictures.metadata import parameters_text
from minisd.plan import planned
from minisd.recipe import repeat
from minisd.request import Request
from minisd.result import Step

FAST = {"steps": 2, "width": 32, "height": 32}


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True))


def plan(pipe, prompt="a star", **options):
    return planned(Request(prompt, **(FAST | options)), pipe.capabilities())


def test_the_table_and_the_request_are_one():
    declared = {each.name: each.default for each in fields(Request)}
    del declared["prompt"]
    assert declared == {name: option.default for name, option in OPTIONS.items()}
    assert list(AXES) == ["steps", "sampler", "cfg", "seed", "lora"]
    assert set(RECORDED) <= set(RECIPE)


def test_every_option_is_in_the_signatures(tiny):
    names = [each.name for each in fields(Request)]
    for method in (tiny.__call__, tiny.stream):
        assert list(inspect.signature(method).parameters) == names
    assert list(inspect.signature(minisd.Pipeline.stream).parameters) == ["self", *names]


def test_numbers_of_numpy_are_numbers(tiny):
    given = {
        "steps": np.int64(2),
        "width": np.int16(32),
        "height": np.uint8(32),
        "seed": np.int32(3),
        "guidance_scale": np.float32(3),
    }
    result = tiny("a star", strength=None, **given)
    assert same(result, tiny("a star", seed=3, guidance_scale=3.0, **FAST))
    assert json.loads(json.dumps(result.metadata[0]))["seed"] == 3
    with pytest.raises(UsageError, match="steps: expected a whole number from 1 to 999, found"):
        tiny("a star", steps=np.float64(2.5))


def test_seeds(tiny):
    assert plan(tiny, seed=[5, 9]).seeds == [5, 9]
    assert plan(tiny, seeds=[5, 9]).seeds == [5, 9]
    assert plan(tiny, seed=np.arange(3)).seeds == [0, 1, 2]
    assert plan(tiny, seed=torch.tensor([4, 2])).seeds == [4, 2]
    assert plan(tiny, ["a", "b"], seed=3, num_images=2).seeds == [3, 4, 5, 6]
    assert plan(tiny, ["a", "b"], seed=3, num_images=2, seeds="same").seeds == [3, 4, 3, 4]
    assert plan(tiny, ["a", "b"], seed=[3, 8], num_images=2).seeds == [3, 4, 8, 9]
    assert plan(tiny, ["a", "b"], seed=[3, 8], num_images=2, seeds="same").seeds == [3, 8, 3, 8]
    random = plan(tiny, ["a", "b"], seeds="same").seeds
    assert random[0] == random[1]
    with pytest.raises(UsageError, match="seed: expected one, or 2, one for each prompt, or 6, one for each picture, found 4"):
        plan(tiny, ["a", "b"], num_images=3, seed=[1, 2, 3, 4])
    with pytest.raises(UsageError, match="seed and seeds: expected a list in one of the two"):
        plan(tiny, seed=1, seeds=[1, 2])
    with pytest.raises(UsageError, match="seed: expected a whole number"):
        plan(tiny, seed=[1, "x"])


def test_each_picture_of_lists_is_that_of_the_single_run(tiny):
    prompts, negatives, scales = ["a red star", "a blue star"], ["blue", "red"], [3.0, 7.5]
    both = tiny(prompts, negative_prompt=negatives, guidance_scale=scales, seed=[4, 7], **FAST)
    for i in range(2):
        alone = tiny(prompts[i], negative_prompt=negatives[i], guidance_scale=scales[i], seed=both.seeds[i], **FAST)
        assert np.array_equal(alone.images[0], both.images[i])
        assert alone.metadata[0] == both.metadata[i]
    one = tiny("a star", guidance_scale=[1, 5, 9], seed=2, seeds="same", **FAST)
    assert [facts["guidance_scale"] for facts in one.metadata] == [1, 5, 9]
    assert one.seeds == [2, 3, 4]


@pytest.mark.parametrize("name", ["init_image", "mask"])
def test_pictures_in_every_form_are_the_same_picture(name, tiny, tmp_path):
    numbers = (np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251).astype(np.uint8)
    as_tensor = torch.from_numpy(numbers).permute(2, 0, 1)
    Image.fromarray(numbers).save(tmp_path / "x.png")
    forms = [Image.fromarray(numbers), tmp_path / "x.png", numbers, numbers / 255, numbers / 127.5 - 1]
    forms += [as_tensor, as_tensor[None], as_tensor / 255, as_tensor.half() / 255, (as_tensor / 127.5 - 1)[None]]
    options = {"seed": 1, "strength": 0.5, "init_image": Image.new("RGB", (32, 32), "red")} | FAST
    wanted = tiny("a star", **(options | {name: forms[0]}))
    for form in forms[1:]:
        assert same(tiny("a star", **(options | {name: form})), wanted)


def test_a_mask_may_be_true_and_false(tiny):
    mask = np.zeros((32, 32), bool)
    mask[:, 16:] = True
    picture = Image.new("RGB", (32, 32), "red")
    found = tiny("a star", init_image=picture, mask=mask, seed=1, **FAST)
    assert (np.asarray(found.images[0])[:, :16] == (255, 0, 0)).all()
    assert same(found, tiny("a star", init_image=picture, mask=Image.fromarray((mask * 255).astype(np.uint8)), seed=1, **FAST))


def test_a_picture_on_its_side_is_put_upright_in_every_form(tiny, tmp_path):
    turned = Image.fromarray((np.arange(32 * 64 * 3).reshape(32, 64, 3) % 251).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: 90 degrees
    turned.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        results = [tiny("a star", init_image=each, seed=1, steps=2, strength=0.5) for each in (opened, tmp_path / "x.png")]
    assert results[0].images[0].size == (32, 64)
    assert same(*results)


@pytest.mark.parametrize(
    ("width", "height", "turned", "size"),
    [
        (4032, 3024, False, (144, 104)),
        (4624, 3468, True, (104, 144)),
        (6000, 4000, True, (104, 152)),
        (4200, 8, False, (2928, 8)),
    ],
)
def test_a_photograph_is_scaled_to_what_the_model_can_draw(width, height, turned, size, tiny, tmp_path):
    """At most four times the 64x64 that this one was trained at, in the photograph's proportions, as it stands upright."""
    photo = Image.new("RGB", (width, height), "grey")
    exif = photo.getexif()
    exif[0x0112] = 6 if turned else 1
    photo.save(tmp_path / "phone.jpg", exif=exif)
    request = Request("a star", init_image=tmp_path / "phone.jpg", seed=1)
    seen = f"{height}x{width}" if turned else f"{width}x{height}"
    with pytest.warns(UserWarning, match=rf"^init_image phone.jpg: {seen} is more .* drawing {size[0]}x{size[1]}") as told:
        found = planned(request, tiny.capabilities())
    assert (found.width, found.height) == size
    assert tuple(found.init.pixels.shape) == (1, 3, size[1], size[0])
    assert len(told) == 1
    given = planned(replace(request, width=64, height=48), tiny.capabilities())
    assert (given.width, given.height) == (64, 48)


def test_a_single_step_over_a_picture_is_told_and_no_error_about_a_strength_that_nobody_gave(tiny):
    request = Request("a star", init_image=Image.new("RGB", (32, 32)), steps=1)
    with pytest.warns(UserWarning, match=r"^init_image: a single step leaves nothing of it; give more steps$"):
        assert planned(request, tiny.capabilities()).init.strength == 1
    with pytest.raises(UsageError, match=r"^strength: 0\.5 of 1 steps is less than one"):
        planned(replace(request, strength=0.5), tiny.capabilities())


def test_a_picture_within_four_times_the_models_size_keeps_its_own(tiny):
    found = planned(Request("a star", init_image=Image.new("RGB", (131, 121))), tiny.capabilities())
    assert (found.width, found.height) == (128, 120)


def test_a_size_that_came_from_a_photograph_is_not_told_as_an_option(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4624, 3468), "grey").save("large.jpg")
    assert main(["a red star", "--init", "large.jpg", "--steps", "2", "--seed", "1", "-o", "x.png"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("minisd: warning: --init large.jpg: 4624x3468 is more than this model can draw well: drawing 144x104")
    assert said.count("\n") == 1
    assert Image.open("x.png").size == (144, 104)
    Image.new("RGB", (7100, 7100)).save("huge.png")
    assert main(["a red star", "--init", "huge.png"]) == 2
    assert "--init huge.png: expected at most 50 million pixels, found 7100x7100; scale it down" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((3, 3, 7)), r"init_image: expected an array \(H, W, C\) with 1, 3 or 4 channels, found shape \(3, 3, 7\)"),
        (torch.zeros(2, 3, 8, 8), r"init_image: expected a tensor \(C, H, W\) .* found shape \(2, 3, 8, 8\)"),
        (np.full((8, 8, 3), 300), "init_image: expected numbers from 0 to 1, .* found numbers from 300 to 300"),
        (np.full((8, 8, 3), np.nan), "init_image: expected numbers from 0 to 1, .* found numbers from nan to nan"),
        (np.zeros((0, 8, 3)), "init_image: expected an array"),
    ],
)
def test_what_is_no_picture_is_named(picture, message, tiny):
    with pytest.raises(UsageError, match=message):
        tiny("a star", init_image=picture, **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps: unknown; here it is steps"),
        ({"generator": None}, "generator: unknown; here it is seed"),
        ({"callback_on_step_end": None}, "callback_on_step_end: unknown; here it is transform, or the steps of pipe.stream"),
        ({"stepz": 3}, r"stepz: unknown; did you mean steps\? expected some of negative_prompt, "),
        ({"sigmas": [1.0, 2.0]}, r"sigmas: expected two or more numbers \(N \+ 1,\), falling, not below 0, found \[1.0, 2.0\]"),
        ({"sigmas": torch.zeros(2, 2)}, r"sigmas: .* found shape \(2, 2\)"),
        ({"progress": "yes"}, "progress: expected true or false, found 'yes'"),
        ({"original_size": (3,)}, "original_size: expected two whole numbers"),
        ({"negative_prompt": [3]}, "negative_prompt: expected a text or a list of texts, .* found int"),
    ],
)
def test_wrong_options_are_named_at_the_call(options, message, tiny):
    for call in (tiny, tiny.stream):
        with pytest.raises(UsageError, match=message):
            call("a star", **options)


def one_tensor(denoise, x, sigmas, noise):
    yield denoise(x, sigmas[0])


class Halves(ClassifierFree):
    def weights(self, call):
        return super().weights(call) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": {5: 6}}, "seed: expected a whole number"),
        ({"seed": torch.tensor([True])}, "seed: expected a whole number .* found True"),
        ({"sampler": None}, "sampler: expected a name, a function or a picture, found None"),
        ({"sampler": one_tensor}, r"sampler: expected one_tensor to yield \(latents, denoised\), found Tensor"),
        ({"guide": 5}, "guide: expected a function, found 5"),
        ({"guide": lambda *_: None}, r"guide: expected a tensor \(1, 4, 8, 8\) from it, found NoneType"),
        ({"guide": Halves(7.5)}, r"guide: expected weights \(2, B or 1\) that sum to 1 over the roles, found"),
        ({"transform": "x"}, "transform: expected a function"),
        ({"transform": lambda step: 0.5}, r"transform: expected a tensor \(1, 4, 8, 8\) from it, found float"),
        ({"observe": 3}, "observe: expected a function"),
        ({"refiner": "x.safetensors"}, "refiner: expected a pipeline, as minisd.load gives it, found str"),
        ({"sigmas": "karras"}, "sigmas: expected numbers"),
        ({"sigmas": [float("inf"), 0]}, "sigmas: expected two or more numbers"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents: expected numbers, found NaN"),
        ({"latents": [[1]]}, "latents: expected a tensor of shape .* found list"),
        ({"init_image": np.array(["x"])}, "init_image: expected an array of numbers"),
        ({"init_image": np.zeros((8, 8, 3), complex)}, "init_image: expected an array of numbers"),
    ],
)
def test_odd_things_are_told_in_one_line(options, message, tiny):
    with pytest.raises(UsageError, match=message):
        tiny("a star", **(FAST | options))


def test_single_numbers_of_arrays_and_arrays_of_any_layout(tiny):
    wanted = tiny("a star", seed=5, guidance_scale=3.0, **FAST)
    assert same(tiny("a star", seed=np.array(5), guidance_scale=torch.tensor(3.0), **FAST), wanted)
    numbers = (np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251).astype(np.uint8)
    forms = [numbers[::-1][::-1], numbers.astype(np.uint16), numbers.astype(">i4"), np.asfortranarray(numbers)]
    pictures = [tiny("a star", init_image=form, seed=1, strength=0.5, **FAST) for form in (numbers, *forms)]
    assert all(same(picture, pictures[0]) for picture in pictures[1:])


def test_conditionings_for_more_pictures_than_they_have(tiny):
    two, texts = tiny.encode_prompt(["a red star", "a blue star"]), ["a red star", "a blue star"]
    assert same(tiny(two, num_images=2, seed=1, **FAST), tiny(texts, num_images=2, seed=1, **FAST))
    negatives = tiny.encode_prompt(["blue", "red"])
    wanted = tiny(texts, negative_prompt=["blue", "red"], num_images=2, seed=1, **FAST)
    assert same(tiny(texts, negative_prompt=negatives, num_images=2, seed=1, **FAST), wanted)
    with pytest.raises(UsageError, match="negative_prompt: expected one, or 3, one for each prompt, found 2"):
        tiny(["a", "b", "c"], negative_prompt=negatives, **FAST)
    with pytest.raises(UsageError, match="prompt: expected at least one conditioning, found a timeline without"):
        tiny(Timeline(()), **FAST)
    with pytest.raises(UsageError, match="prompt: expected conditionings of one shape at all times"):
        tiny(Timeline(((0, two), (9, tiny.encode_prompt("a " * 99)))), **FAST)


def test_a_part_of_the_way_down_own_levels(tiny):
    picture = Image.new("RGB", (32, 32), "red")
    sigmas = torch.linspace(5, 0, 11)
    result = tiny("a star", sigmas=sigmas, init_image=picture, strength=0.5, seed=1, steps=1)
    assert len(list(tiny.stream("a star", sigmas=sigmas, init_image=picture, strength=0.5, seed=1))) == 5
    assert result.metadata[0]["strength"] == 0.5


@pytest.mark.parametrize(("texts", "options"), [(5, {}), ([], {}), ([5], {}), ("a", {"clip_skip": 0}), ("a", {"clip_skip": 99})])
def test_what_cannot_be_encoded_is_named(texts, options, tiny):
    with pytest.raises(UsageError, match=r"(prompts|clip_skip): expected"):
        tiny.encode_prompt(texts, **options)


def test_k_diffusions_way_of_asking(tiny):
    def theirs(denoise, x, sigmas, noise):
        ones = x.new_ones([x.shape[0]])
        for sigma, following in pairwise(sigmas):
            denoised = denoise(x, sigma * ones)
            x = x + (following - sigma) * (x - denoised) / sigma
            yield x, denoised

    assert same(tiny("a star", sampler=theirs, seed=1, **FAST), tiny("a star", seed=1, **FAST))
    assert program(theirs, tiny.noise_levels("karras", 5)) is not None


def test_a_sampler_that_works_in_place_has_steps_of_its_own(tiny):
    def in_place(denoise, x, sigmas, noise):
        for sigma, following in pairwise(sigmas):
            denoised = denoise(x, sigma)
            x.sub_(denoised).mul_(following / sigma).add_(denoised)
            yield x, denoised

    own, usual = (list(tiny.stream("a star", sampler=each, seed=1, **FAST)) for each in (in_place, "euler"))
    assert all(torch.allclose(a.before, b.before, atol=1e-4) for a, b in zip(own, usual, strict=True))


def test_arguments_that_are_none_are_named(tiny):
    with pytest.raises(UsageError, match="prompt"):
        tiny()
    with pytest.raises(UsageError, match="request: expected names for what is changed"):
        tiny(Request("a star"), 3)


def test_no_negative_prompt_may_be_none(tiny):
    assert same(tiny("a star", negative_prompt=None, seed=1, **FAST), tiny("a star", seed=1, **FAST))


def test_a_conditioning_is_what_its_prompt_is(tiny):
    told = tiny.encode_prompt("a red star")
    result = tiny(told, negative_prompt="blue", seed=1, **FAST)
    assert same(result, tiny("a red star", negative_prompt="blue", seed=1, **FAST))
    assert same(tiny("a red star", negative_prompt=tiny.encode_prompt("blue"), seed=1, **FAST), result)
    long = tiny.encode_prompt("a red star " * 40)
    assert long.context.shape[1] > 77
    assert same(tiny(long, seed=1, **FAST), tiny("a red star " * 40, seed=1, **FAST))
    two = tiny.encode_prompt(["a red star", "a blue star"])
    assert same(tiny(two, seed=[1, 2], **FAST), tiny(["a red star", "a blue star"], seed=[1, 2], **FAST))
    assert result.metadata[0]["prompt"] is None
    with pytest.raises(UsageError, match="prompt: the picture's caller gave a conditioning"):
        repeat(result.metadata[0], tiny.checkpoint.path)
    with pytest.raises(UsageError, match=r"prompt: expected a conditioning with context \(B, 77\*k, \d+\), found \(1, 5, 3\)"):
        tiny(Conditioning(torch.zeros(1, 5, 3)), **FAST)


def test_own_levels_guides_and_samplers_in_a_recipe(tiny):
    def mine(denoise, x, sigmas, noise):
        for sigma, following in pairwise(sigmas):
            denoised = denoise(x, sigma)
            x = denoised + following * (x - denoised) / sigma
            yield x, denoised

    sigmas = tiny.noise_levels("karras", 2)
    result = tiny("a star", sigmas=sigmas, seed=1, width=32, height=32)
    assert same(result, tiny("a star", spacing="karras", seed=1, **FAST))
    again = repeat(json.loads(json.dumps(result.metadata[0])), tiny.checkpoint.path)
    assert same(tiny(again), result)
    own = tiny("a star", sampler=mine, guide=lambda answers, x, call: answers[1], seed=1, **FAST)
    assert (own.metadata[0]["sampler"], own.metadata[0]["guide"]) == ("mine", "<lambda>")
    with pytest.raises(UsageError, match="the picture was drawn with its caller's own sampler, guide; it cannot be made again"):
        repeat(own.metadata[0], tiny.checkpoint.path)
    edited = tiny("a star", transform=lambda step: step.latents, seed=1, **FAST)
    with pytest.raises(UsageError, match="its caller's own transform"):
        repeat(edited.metadata[0], tiny.checkpoint.path)
    assert (result.metadata[0]["steps"], len(result.metadata[0]["sigmas"])) == (2, 3)


def test_a_recipe_says_that_the_model_was_changed_in_memory():
    pipe = minisd.load(device="cpu")
    assert "changed" not in pipe("a star", seed=1, **FAST).metadata[0]
    hook = pipe.unet.middle_block.register_forward_hook(lambda *_: None)
    recipe = pipe("a star", seed=1, **FAST).metadata[0]
    assert recipe["changed"] == "UNet: middle_block has a hook"
    with pytest.warns(UserWarning, match=r"changed in memory \(UNet: middle_block has a hook\)"):
        repeat(recipe, pipe.checkpoint.path)
    hook.remove()
    assert "changed" not in pipe("a star", seed=1, **FAST).metadata[0]
    pipe.unet.out[2].bias.add_(1)
    assert pipe("a star", seed=1, **FAST).metadata[0]["changed"] == "weights were written to"


def test_completion_knows_what_there_is():
    assert {"load", "Request", "Pipeline", "Step"} <= set(dir(minisd))


def test_a_guide_that_wants_what_there_is_not_is_named(tiny):
    def guide(answers, x, call):
        return answers[0]

    guide.roles = ("nobody",)
    with pytest.raises(UsageError, match="guide: expected some of the roles negative, positive, found 'nobody'"):
        tiny("a star", guide=guide, **FAST)


def test_a_step_says_what_it_is(tiny):
    steps = list(tiny.stream("a star", seed=[5, 8], steps=3, width=32, height=32))
    assert [step.picture for step in steps] == [0, 0, 0, 1, 1, 1]
    assert [step.seed for step in steps] == [5, 5, 5, 8, 8, 8]
    assert {step.total for step in steps} == {6}
    assert [round(step.timestep) for step in steps[:3]] == [999, 500, 0]
    assert {step.way for step in steps} == {"plain" if isinstance(tiny.engine, Plain) else "network"}
    for step in steps:
        assert torch.allclose(step.before, step.denoised + step.sigma * step.eps, atol=1e-4)
    assert repr(steps[0]) == "Step(1 of 6, sigma 14.61, timestep 999, 1x4x8x8 latents, seed 5)"
    assert isinstance(steps[0], Step)


def test_steps_that_nobody_can_count(tiny):
    def patient(denoise, x, sigmas, noise):
        denoised = denoise(x, sigmas[0])
        for _ in range(1 + int(float(denoised.abs().max()) > 0)):
            yield denoised, denoised

    steps = list(tiny.stream("a star", sampler=patient, seed=1, **FAST))
    assert [step.total for step in steps] == [None, None]
    assert len(tiny("a star", sampler=patient, seed=1, progress=True, **FAST).images) == 1


def test_one_line_reprs_and_pictures_in_a_notebook(tiny, capsys):
    result = tiny("a star", seed=1, num_images=2, progress=True, **FAST)
    assert "drawing" in capsys.readouterr().err
    assert result._repr_png_().startswith(b"\x89PNG")
    assert repr(result) == "Result(2 of 32x32 pixels, seeds 1, 2)"
    assert repr(tiny).startswith("Pipeline(tiny.safetensors: Stable Diffusion 1.x, draw, ")
    assert repr(tiny.network.schedule) == "Discrete(1000 timesteps, sigma 0.02917 to 14.61)"
    assert "\n" not in "".join(map(repr, (result, tiny, tiny.network.schedule)))


def test_transform_is_gone_on_with(tiny):
    seen = []

    def transform(step):
        seen.append((step.index, step.sigma))
        return step.latents * 0

    found = tiny("a star", seed=1, transform=transform, **FAST)
    assert [index for index, _ in seen] == [0, 1]
    assert not found.latents.any()
    assert same(tiny("a star", seed=1, transform=lambda step: step.latents, **FAST), tiny("a star", seed=1, **FAST))


def test_a_request_may_be_changed_at_the_call(tiny):
    request = Request("a star", seed=1, **FAST)
    assert same(tiny(request, steps=3), tiny(replace(request, steps=3)))


def test_no_guidance_at_all_is_told(tiny):
    with pytest.warns(UserWarning, match="guidance_scale 0 draws the negative prompt alone; 1 turns guidance off"):
        nothing = tiny("a red star", guidance_scale=0, seed=1, **FAST)
    assert same(nothing, tiny("", guidance_scale=1, seed=1, **FAST))


def test_levels_and_rescaling_are_in_the_parameters_text(tiny):
    def text(**options):
        return parameters_text(tiny("a star", seed=1, **(FAST | options)).metadata[0]).splitlines()[-1]

    assert "Schedule type: Karras" in text(spacing="karras")
    assert "Schedule type: Exponential" in text(spacing="exponential", sampler="ddim")
    assert "Schedule type: Leading" in text(spacing="leading")
    assert "Schedule type: Uniform" in text(spacing="linspace", sampler="ddim")
    assert "Schedule type: KL Optimal" in text(spacing="KL Optimal")
    fused = text(sampler="DPM++ 2M Karras")
    assert "Sampler: DPM++ 2M," in fused
    assert "Schedule type: Karras" in fused
    for usual in ({}, {"spacing": "linspace"}, {"sampler": "ddim"}, {"spacing": "karras", "sigmas": [9.0, 3.0, 0.0]}):
        assert "Schedule" not in text(**usual)
    assert "CFG Rescale: 0.7" in text(guidance_rescale=0.7)
    assert "Eta DDIM: 0.5" in text(sampler="ddim", eta=0.5)
    for name in ("Rescale", "Eta", "Image CFG", "VAE"):
        assert name not in text()
    recipe = tiny("a star", seed=1, **FAST).metadata[0]
    assert "Image CFG scale: 1.5" in parameters_text(recipe | {"task": "edit"})
    assert "VAE hash: 0123456789, VAE: other" in parameters_text(recipe | {"vae": "other", "vae_sha256": "0123456789abcdef" * 4})

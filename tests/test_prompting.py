"""What weights, AND, editing and second prompts do to a drawing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import SMALL
from helpers import relative_error
from own_samplers import heun
from PIL import Image

import minisd
from minisd.diffusion.denoiser import Call, ClassifierFree, Timeline, checked
from minisd.diffusion.guides import Composed
from minisd.errors import UsageError
from minisd.pictures.infotext import of_infotext
from minisd.pictures.metadata import parameters_text
from minisd.plan import planned
from minisd.recipe import repeat
from minisd.request import Request
from minisd.result import finish
from minisd.walks import course, read_prompts

FAST = {"steps": 4, "width": 32, "height": 32, "seed": 1}
RED, BLUE = "a red star on a blue background", "a blue ring on a red background"


@pytest.fixture(scope="module")
def pipe() -> minisd.Pipeline:
    return minisd.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> minisd.Pipeline:
    path: Path = SMALL["sdxl"].write(tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors")
    return minisd.load(path, device="cpu", dtype="float32")


def latents(pipe: minisd.Pipeline, prompt: object, **options: object) -> torch.Tensor:
    return pipe(prompt, **(FAST | options)).latents


def test_and_is_a_sum_of_guidances(pipe):
    def summed(answers, x, call):
        none, red, blue, grey = answers
        return none + 4 * 1.0 * (red - none) + 4 * 0.5 * (blue - none) + 4 * -0.2 * (grey - none)

    summed.roles, summed.on = ("negative", "positive", "positive 2", "positive 3"), "output"
    prompt = f"{RED} AND {BLUE} :0.5 AND grey:-.2"
    wanted = latents(pipe, prompt, guide=summed)
    assert relative_error(latents(pipe, prompt, guidance_scale=4), wanted) <= 1e-5
    assert relative_error(latents(pipe, f"{RED} AND {BLUE}", guidance_scale=4), wanted) > 1e-2


def test_a_weight_at_the_end_multiplies_guidance(pipe):
    with pytest.warns(UserWarning, match="':2' at its end"):
        found = latents(pipe, f"{RED}:2", guidance_scale=3)
    assert torch.equal(found, latents(pipe, RED, guidance_scale=6))


def test_weights_of_parts_sum_to_one_with_no_words():
    call = Call(0, 0, 1.0)
    weights = checked(Composed(((7.0, 3.0), (-0.5, 0.0))).weights(call), 3)
    assert torch.allclose(weights, torch.tensor([[-5.5, -2.0], [7.0, 3.0], [-0.5, 0.0]]))
    checked(ClassifierFree(99.9 * 47.3).weights(call), 2)  # which rounds by more than a ten-thousandth
    with pytest.raises(UsageError, match="guide: expected weights"):
        checked(torch.tensor([[1.0], [0.1]]), 2)


def spoken(pipe: minisd.Pipeline, text: str, calls: int, **options: object) -> list[int]:
    """Which of a timeline's conditionings each call gets, numbered as they come."""
    plan = planned(Request(text, **(FAST | options)), pipe.capabilities())
    (leg,) = course(plan, pipe)
    with torch.no_grad():
        _, (timeline,), _ = read_prompts(plan, slice(0, 1), leg)
    seen: list[object] = []
    for i in range(calls):
        found = timeline.at(Call(i, i, 1.0))
        if not any(found is each for each in seen):
            seen.append(found)
    return [next(k for k, each in enumerate(seen) if timeline.at(Call(i, i, 1.0)) is each) for i in range(calls)]


def test_steps_are_counted_as_a1111_counts_them(pipe):
    assert spoken(pipe, "[a:b:0.5]", 6, steps=6) == [0, 0, 0, 0, 1, 1]  # one call more than three
    assert spoken(pipe, "[a:b:1]", 4) == [0, 0, 1, 1]
    assert spoken(pipe, "[a|b]", 6, steps=6) == [0, 0, 1, 0, 1, 0]  # the first of them twice
    assert spoken(pipe, "[a:b:0]", 4) == [0] * 4
    assert spoken(pipe, "[a:b:0.5]", 7, sampler=heun) == [0, 0, 0, 0, 0, 1, 1]  # two calls a step: until 4 of 8
    assert spoken(pipe, "[a:b:2]", 7, sampler=heun) == [0, 0, 0, 1, 1, 1, 1]  # half steps
    assert spoken(pipe, "[a:b:0.5]", 4, sigmas=[9.0, 6.0, 3.0, 1.0, 0.0]) == [0, 0, 0, 1]


def test_an_edited_prompt_is_a_timeline(pipe):
    first, second = (pipe.encode_prompt(text) for text in (RED, BLUE))
    wanted = latents(pipe, Timeline(((2, first), (9, second))))
    assert relative_error(latents(pipe, f"[{RED}:{BLUE}:0.5]"), wanted) <= 1e-4
    assert relative_error(latents(pipe, RED), wanted) > 1e-2
    dark = latents(pipe, RED, negative_prompt="[grey:blue:0.5]")
    assert relative_error(latents(pipe, RED, negative_prompt="grey"), dark) > 1e-4


def test_a_refiner_goes_on_in_the_prompt(pipe):
    """The same network as its own refiner draws what it draws alone."""
    prompt = f"[{RED}|{BLUE}|] AND [grey::4]:-0.2"
    whole = latents(pipe, prompt, steps=6, sampler="euler")
    assert relative_error(latents(pipe, prompt, steps=6, refiner=pipe, high_noise_frac=0.5), whole) <= 1e-5
    assert relative_error(latents(pipe, RED, steps=6), whole) > 1e-2


def test_unlike_pictures_in_one_batch(pipe, monkeypatch):
    """As a GPU draws them: parts, schedules, scales and lengths of each."""
    prompts = [f"{RED} AND {BLUE}:0.5", f"[{RED}:{BLUE}:0.5]", "[a star|a ring] AND red AND blue:0.1"]
    request = Request(prompts, negative_prompt=["", "[grey::2]", "blue"], guidance_scale=[3, 5, 7], **FAST)
    alone = pipe(request).latents
    monkeypatch.setattr("minisd.pipeline.in_parts", lambda plan, device: [slice(0, 3)])
    assert relative_error(finish(pipe.draw(planned(request, pipe.capabilities()))).latents, alone) <= 1e-4


def test_weights_and_plain_prompts(pipe):
    plain = latents(pipe, "a (red:1.5) star", plain_prompt=True)
    found = {
        mode: latents(pipe, "a (red:1.5) star", emphasis=mode) for mode in ("original", "no-norm", "ignore", "none", "comfy")
    }
    assert torch.equal(found["none"], plain)
    assert torch.equal(found["ignore"], latents(pipe, "a red star"))
    kinds = [*found.values(), plain]
    different = [torch.stack(kinds)[i] for i in (0, 1, 2, 3, 4)]
    assert all(relative_error(a, b) > 1e-4 for i, a in enumerate(different) for b in different[:i])
    for mode in found:
        assert torch.equal(latents(pipe, pipe.encode_prompt("a (red:1.5) star", emphasis=mode)), found[mode])


def test_a_recipe_tells_how_the_prompt_was_read(pipe, sdxl):
    result = pipe(f"({RED}:1.2)", emphasis="no-norm", **FAST)
    recipe = result.metadata[0]
    assert (recipe["emphasis"], recipe["plain_prompt"], recipe["prompt"]) == ("no-norm", False, f"({RED}:1.2)")
    assert torch.equal(pipe(repeat(recipe, pipe.checkpoint.path)).latents, result.latents)
    assert ", Emphasis: No norm," in parameters_text(recipe)
    assert "Emphasis" not in parameters_text(pipe("a", **FAST).metadata[0])
    assert "--emphasis no-norm" in of_infotext("a\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Emphasis: No norm").command()
    two = sdxl(["a", "b"], prompt_2=["c", "d"], negative_prompt_2="e", **(FAST | {"steps": 1})).metadata
    assert [(recipe["prompt_2"], recipe["negative_prompt_2"]) for recipe in two] == [("c", "e"), ("d", "e")]


def test_a_recipe_from_before_is_read_as_it_was(pipe):
    old = {key: value for key, value in pipe("a", **FAST).metadata[0].items() if key not in ("emphasis", "plain_prompt")}
    assert repeat(old | {"prompt": "a (red:1.2) star:2"}, pipe.checkpoint.path).plain_prompt


def test_a_second_prompt_is_read_by_the_second_encoder(sdxl):
    def context(**options: object) -> torch.Tensor:
        plan = planned(Request("a red star", **(FAST | options)), sdxl.capabilities())
        negative, (positive,), _ = read_prompts(plan, slice(0, 1), course(plan, sdxl)[0])
        return torch.cat([each.entries[0][1].context for each in (positive, negative)])

    with torch.no_grad():
        usual, second = context(), context(prompt_2="a (ring:1.3)", negative_prompt_2="grey")
    assert torch.equal(second[0, :, :64], usual[0, :, :64])
    assert relative_error(second[0, :, 64:], usual[0, :, 64:]) > 1e-2
    assert not usual[1].any()  # an empty negative prompt is zeros; with a second one it is none
    assert second[1, :, :64].any()
    assert second[1, :, 64:].any()
    with torch.no_grad():
        assert torch.equal(context(prompt_2="a red star"), usual)


@pytest.mark.filterwarnings("ignore:prompt. '.2' at its end")
@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ("a AND b", {"guidance_rescale": 0.7}, "prompt: expected no AND beside guidance_rescale"),
        ("a AND b", {"guide": lambda answers, x, call: answers[1]}, "guide: expected a prompt without AND"),
        ("a:2", {"guide": lambda answers, x, call: answers[1]}, "guide: expected a prompt without AND"),
        ("(a:1..)", {}, "prompt: expected a number as a weight"),
        ("a", {"negative_prompt": "(a:1..)"}, "negative_prompt: expected a number as a weight"),
        ("(a:inf)", {"emphasis": "comfy"}, "prompt: expected weights that are finite, found inf"),
        ("a", {"emphasis": "loud"}, "emphasis: expected one of original, no-norm, ignore, none, comfy, found 'loud'"),
        ("a", {"emphasis": "none", "plain_prompt": True}, "emphasis: expected none beside plain_prompt"),
        ("a", {"plain_prompt": "yes"}, "plain_prompt: expected true or false"),
        ("a", {"prompt_2": "b"}, "prompt_2: only SDXL has a second text encoder, found Stable Diffusion 1.x"),
        ("a", {"negative_prompt_2": "b"}, "negative_prompt_2: only SDXL"),
        ("a AND " * 60, {}, "prompt: expected at most 50 parts joined by AND, found 61"),
    ],
)
def test_what_does_not_fit_is_told(prompt, options, told, pipe):
    with pytest.raises(UsageError, match=told.replace("(", r"\(")):
        pipe(prompt, **(FAST | options))


def test_second_prompts_that_do_not_fit(sdxl, tmp_path):
    with pytest.raises(UsageError, match="prompt_2: expected one, or 3, one for each prompt, found 2"):
        planned(Request(["a", "b", "c"], prompt_2=["a", "b"]), sdxl.capabilities())
    with pytest.raises(UsageError, match="prompt_2: expected none beside a conditioning"):
        planned(Request(sdxl.encode_prompt("a"), prompt_2="b"), sdxl.capabilities())
    with pytest.raises(UsageError, match="prompt_2: expected a text"):
        planned(Request("a", prompt_2=5), sdxl.capabilities())
    edits = minisd.load(SMALL["sd1-edit"].write(tmp_path / "edit.safetensors"), device="cpu", dtype="float32")
    picture = Image.new("RGB", (32, 32), "red")
    with pytest.raises(UsageError, match="prompt: expected no AND beside a model that edits"):
        edits("a AND b", init_image=picture, **FAST)


def test_a_conditioning_that_is_shorter_goes_on_with_its_last_vector(pipe):
    short, long = pipe.encode_prompt(RED), pipe.encode_prompt("grey " * 100)
    by_hand = torch.cat([short.context, short.context[:, -1:].expand(-1, 77, -1)], dim=1)
    found = latents(pipe, short, negative_prompt="grey " * 100)
    assert torch.equal(found, latents(pipe, minisd.diffusion.denoiser.Conditioning(by_hand), negative_prompt=long))

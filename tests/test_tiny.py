"""The tiny checkpoint draws what the prompt says."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_tiny import KINDS, exam, examine_outlines, right
from readme_pictures import cells
from safetensors import safe_open
from tiny_world import TRAINING, caption, draw, held_back, training_scene

import minisd
from minisd.batch.scores.judge import judge, look
from minisd.diffusion.samplers import SAMPLERS
from minisd.diffusion.spacings import SPACINGS
from minisd.files.checkpoint import file_sha256
from minisd.pictures.metadata import read_recipe

WEIGHTS = Path(__file__).parents[1] / "weights"
LIT, CLAY, OUTLINE = (WEIGHTS / f"tiny-{name}.safetensors" for name in ("lit", "clay", "outline"))


def test_the_judge_is_right_about_drawn_pictures():
    rng = random.Random(3)
    scenes = [training_scene(rng) for _ in range(200)]
    assert [judge(draw(scene, rng)) for scene in scenes] == [(scene.shape, scene.colour, scene.background) for scene in scenes]


def test_the_judge_sees_nothing_in_an_empty_picture():
    from PIL import Image

    assert judge(Image.new("RGB", (64, 64), (15, 15, 15))) is None


def test_the_judge_finds_the_place_of_what_is_not_too_large_for_one():
    rng = random.Random(4)
    scenes = [scene for scene in (training_scene(rng) for _ in range(200)) if scene.size != "large"]
    assert [look(draw(scene, rng)).place for scene in scenes] == [scene.place for scene in scenes]


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_exam_asks_for_what_its_prompts_say(kind):
    for wanted, prompt, _ in exam(100, kind=kind):
        assert wanted
        assert all(word.replace("centre", "") in prompt for word in wanted.values()), prompt


def test_training_never_saw_what_the_exam_asks():
    assert len(held_back()) == 60
    assert not set(held_back()) & set(TRAINING)
    assert {tuple(wanted.values()) for wanted, _, _ in exam(100)} <= set(held_back())


def test_captions_name_what_they_must():
    rng = random.Random(0)
    for _ in range(300):
        scene = training_scene(rng)
        text = caption(scene, rng)
        assert all(word in text for word in (scene.shape, scene.colour, scene.background)), text


def test_file_is_a_raw_checkpoint_of_at_most_25_mb(tiny):
    path = tiny.checkpoint.path
    assert path.stat().st_size <= 25e6
    with safe_open(path, framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
        assert file.get_slice("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight").get_shape()[0] == 49408


def test_draws_what_the_prompt_says(tiny):
    """12 of the 100 held-back questions of scripts/judge_tiny.py; at 90 of 100, 9 or more of 12 are right 97 times in 100."""
    questions = exam(100)[::9][:12]
    found = [look(tiny(prompt, seed=seed).images[0]) for _, prompt, seed in questions]
    print(list(zip(questions, found, strict=True)), file=sys.stderr)
    assert sum(right(wanted, seen) for (wanted, _, _), seen in zip(questions, found, strict=True)) >= 9


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("place", 8), ("half", 5)])
def test_meets_places_and_half_said_prompts(tiny, kind, least):
    """10 of 100 questions; of 100 it met 97 places and 80 half-said prompts."""
    met = 0
    for wanted, prompt, seed in exam(100, kind=kind)[::10]:
        seen = look(tiny(prompt, seed=seed).images[0])
        met += seen is not None and seen.place == wanted["place"] if kind == "place" else right(wanted, seen)
    assert met >= least


def test_the_controlnet_draws_within_outlines(tiny):
    """Prompts say the colours alone.  Of 100: place 98, size 93, shape 56, colours 99 (100 without it)."""
    assert OUTLINE.stat().st_size <= 8e6
    found = examine_outlines(tiny, str(OUTLINE), 5)
    assert found["place"] >= 4
    assert found["size"] >= 3
    assert found["colours"] >= found["without"] - 2


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_both_samplers_draw_it(tiny, sampler):
    assert judge(tiny("a red circle on a blue background", seed=1, sampler=sampler).images[0]) == ("circle", "red", "blue")


def test_pictures_of_the_readme_were_drawn_by_the_commands_under_them(tiny):
    assert len(cells()) == 12
    for path, (prompt, option, seed, *model) in cells():
        recipe = read_recipe(path)
        assert (recipe["prompt"], option, str(recipe["seed"])) == (prompt, "--seed", seed)
        assert model in (
            [],
            ["-m", "weights/tiny-lit.safetensors"],
            *(["--lora", f"weights/tiny-clay.safetensors{s}"] for s in ("", ":0.5")),
        )
        checkpoint = LIT if "-m" in model else tiny.checkpoint.path
        loras = [(Path(each["source"]).stem, each["strength"]) for each in recipe.get("loras") or ()]
        assert loras == ([("tiny-clay", 0.5 if model[1].endswith("0.5") else 1.0)] if "--lora" in model else [])
        assert recipe["model_sha256"] == file_sha256(checkpoint), f"{path} was drawn by another checkpoint"


def darker_below(picture) -> float:
    """By how much the ground is darker in the lower corners than in the upper ones."""
    grey = np.asarray(picture.convert("L"), dtype=float)
    edges = np.concatenate([grey[:, :4], grey[:, -4:]], axis=1)
    return float(np.median(edges[:8]) - np.median(edges[-8:]))


def test_a_checkpoint_decides_the_style_and_the_prompt_the_content(tiny):
    """The same prompts and seeds on both checkpoints: 6 questions each of an exam that was put aside, 4 or more right; only
    clay has a ground that darkens downward."""
    lit = minisd.load(LIT, device="cpu")
    assert LIT.stat().st_size <= 25e6
    found = {"tiny": 0, "tiny-lit": 0}
    for wanted, prompt, seed in exam(100, 2)[::17]:
        drawn = [pipe(prompt, seed=seed).images[0] for pipe in (tiny, lit)]
        for name, picture in zip(found, drawn, strict=True):
            found[name] += right(wanted, look(picture))
        plain, shaded = (darker_below(picture) for picture in drawn)
        assert abs(plain) < 12 < shaded, (prompt, seed, plain, shaded)
    assert min(found.values()) >= 4, found


def test_the_lora_is_what_the_other_checkpoint_has_more(tiny):
    """tiny-lit is tiny with tiny-clay merged into it, rounded to float16: the last bit is that of the machine's products."""
    assert CLAY.stat().st_size + OUTLINE.stat().st_size <= 8e6
    pipe = minisd.load(device="cpu", dtype="float32")
    pipe.set_loras([CLAY])
    lit = minisd.load(LIT, device="cpu", dtype="float32").model.state_dict()
    for key, value in pipe.model.state_dict().items():
        torch.testing.assert_close(value.half().float(), lit[key], rtol=2**-10, atol=2**-20)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_by_its_own_spacing(tiny, name):
    picture = tiny("a red circle", sampler=name, steps=3, seed=1, width=32, height=32, guidance_scale=2.0).images[0]
    assert np.asarray(picture).std() > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_over_every_spacing_with_every_guidance(tiny, name):
    for spacing in SPACINGS:
        for guidance in ({"guidance_scale": 1}, {"guidance_scale": 4.0}, {"guidance_scale": 4.0, "guidance_rescale": 0.7}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of spacings that begin low
                drawn = tiny("a red circle", sampler=name, spacing=spacing, steps=2, seed=1, width=16, height=16, **guidance)
            assert drawn.latents.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_what_the_prompt_says(tiny, name):
    """With a guidance that methods of several steps can follow on so small a model; CFG++ with one of its own."""
    scale = 1.5 if SAMPLERS[name].pair else 3.0
    found = [
        right(wanted, look(tiny(prompt, seed=seed, sampler=name, steps=30, guidance_scale=scale).images[0]))
        for wanted, prompt, seed in exam(100)[::9][:3]
    ]
    assert sum(found) >= 2, found

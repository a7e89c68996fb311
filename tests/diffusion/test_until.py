"""Guidance in the first part of the steps alone (cfg_until): which calls ask whom, the same picture on every way, its recipe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import relative_error

import minisd
from minisd.diffusion.denoiser import Call, ClassifierFree
from minisd.diffusion.guides import Until
from minisd.diffusion.samplers import SAMPLERS
from minisd.fast.cuda import Cuda
from minisd.library.places import tiny_checkpoint
from minisd.plan import planned
from minisd.recipe import repeat
from minisd.walks import course

PROMPT = "a red circle on a blue background"
SMALL = {"width": 32, "height": 32, "steps": 4, "seed": 1, "guidance_scale": 4.0}


def asked(pipe, **options):
    """How many conditions each call asked with, and the latents."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    try:
        return seen, pipe(PROMPT, **(SMALL | options)).latents
    finally:
        hook.remove()


def test_the_first_steps_are_guided_and_the_others_ask_half(tiny):
    assert asked(tiny, cfg_until=0.5)[0] == [2, 2, 1, 1]
    assert asked(tiny, cfg_until=0.5, sampler="heun")[0] == [2, 2, 2, 2, 1, 1, 1]  # by steps, not by calls


def test_its_ends_are_all_guidance_and_none(tiny):
    whole, none = asked(tiny)[1], asked(tiny, guidance_scale=1.0)[1]
    assert torch.equal(asked(tiny, cfg_until=1)[1], whole)
    assert relative_error(asked(tiny, cfg_until=0)[1], none) < 1e-6
    between = asked(tiny, cfg_until=0.75)[1]
    assert 1e-4 < relative_error(between, whole) < relative_error(none, whole)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_the_fast_way_draws_the_same(sampler):
    pipe = minisd.load(device="cpu", dtype="float32", fast=False)
    plain = pipe(PROMPT, **SMALL, sampler=sampler, cfg_until=0.5)
    pipe.engine = Cuda(pipe.unet, False)
    result = pipe(PROMPT, **SMALL, sampler=sampler, cfg_until=0.5)
    assert result.metadata[0]["way"] == "recorded"
    assert relative_error(result.latents, plain.latents) < 1e-4


def test_a_guide_of_two_scales_is_alone_for_both():
    guide = Until(ClassifierFree((2.0, 5.0)), 3)
    assert torch.equal(guide.weights(Call(2, 2, 1.0)), torch.tensor([[-1.0, -4.0], [2.0, 5.0]]))
    assert torch.equal(guide.weights(Call(3, 3, 1.0)), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


def test_a_refiner_goes_on_counting(tiny):
    plan = planned(minisd.Request(PROMPT, **(SMALL | {"steps": 10})), tiny.capabilities())
    for until, expected in ((0.9, [8, 1]), (0.5, [5, 0]), (1.0, [None, None])):
        # The tiny checkpoint in the place of a refiner: who draws counts here, not what.
        request = replace(plan.request, refiner=tiny, high_noise_frac=0.8, cfg_until=until)
        legs = course(replace(plan, request=request), tiny)
        assert [leg.guided for leg in legs] == expected, until
        assert sum(leg.steps for leg in legs) == 10


def test_its_recipe_draws_it_again(tiny):
    result = tiny(PROMPT, **SMALL, cfg_until=0.5)
    recipe = result.metadata[0]
    assert recipe["cfg_until"] == 0.5
    again = tiny(repeat(recipe, tiny_checkpoint()))
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))


PAIR = next(name for name, sampler in SAMPLERS.items() if sampler.pair)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cfg_until": 1.5}, "cfg_until: expected a number from 0 to 1, found 1.5"),
        ({"cfg_until": True}, "cfg_until: expected a number from 0 to 1, found True"),
        ({"guidance_scale": 1}, "cfg_until: expected 1 beside guidance_scale 1, which is none, found 0.5"),
        ({"guidance_rescale": 0.7}, "cfg_until: expected 1 beside guidance_rescale"),
        ({"guide": lambda answers, x, call: answers[1]}, "cfg_until: expected 1 beside a guide of one's own"),
        ({"sampler": PAIR}, "cfg_until: expected 1 beside sampler"),
        ({"sampler": "dpm_adaptive"}, "cfg_until: expected 1 with sampler"),
        ({"prompt": "a red AND a blue"}, "prompt: expected no AND beside cfg_until"),
    ],
)
def test_where_it_means_nothing_it_is_refused(options, said, tiny):
    with pytest.raises(minisd.UsageError) as error:
        tiny(**({"prompt": PROMPT, "cfg_until": 0.5} | SMALL | options))
    assert str(error.value).startswith(said)

"""Pictures by the rules of other programs, against those rules written down once more, step by step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from minisd.diffusion.levels import LevelWish
from minisd.diffusion.schedule import scaled_linear, zero_terminal
from minisd.diffusion.spacings import visited
from minisd.diffusion.worlds import RULES, Wanted, schedule_of
from minisd.errors import UsageError

SCHEDULE = scaled_linear()
PROMPT, SMALL = "a red circle on a blue background", {"width": 64, "height": 64, "seed": 3, "guidance_scale": 5.0, "steps": 6}


def wanted(sampler="euler", spacing="karras", steps=10, strength=None):
    return Wanted(sampler, spacing, steps, LevelWish(), False, strength)


@pytest.fixture(scope="module")
def float32():
    import minisd

    return minisd.load(device="cpu", dtype="float32")


@pytest.mark.parametrize("spacing", ["linspace", "karras", "simple"])
def test_comfyuis_latents(float32, spacing):
    """One generator, noise scaled by sqrt(1 + sigma^2) at the top, whole timesteps, Euler's steps, classifier-free guidance."""
    both = float32.encode_prompt(["", PROMPT])
    table = SCHEDULE.sigmas.float()
    sigmas = visited(spacing, SCHEDULE, 6).float()
    noise = torch.randn(1, 4, *latent_size(float32), generator=torch.manual_seed(3))
    top = torch.isclose(sigmas[0], table[-1], rtol=1e-5)
    x = noise * ((1 + sigmas[0] ** 2).sqrt() if top else sigmas[0])
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            t = (sigma.log() - table.log()).abs().argmin()
            eps = float32.unet((x / (sigma**2 + 1).sqrt()).expand(2, -1, -1, -1), t.float().expand(2), both.context)
            eps = eps[:1] + 5.0 * (eps[1:] - eps[:1])
            x = x + (following - sigma) * eps
    found = float32(PROMPT, sampler="euler", spacing=spacing, like="comfyui", **SMALL).latents
    assert float((found - x).norm() / x.norm()) < 1e-4
    other = float32(PROMPT, sampler="euler", spacing=spacing, **SMALL).latents
    assert float((other - x).norm() / x.norm()) > 1e-4


def latent_size(pipe):
    return 64 // pipe.vae.downscale, 64 // pipe.vae.downscale


def test_how_far_a_picture_is_walked():
    """Of 10 steps at strength 0.5: ComfyUI makes 20 and keeps all 10, A1111 does one more than half, diffusers half."""
    found = {world: RULES[world](SCHEDULE, wanted(strength=0.5)).sigmas for world in ("comfyui", "a1111", "diffusers")}
    assert {world: len(sigmas) - 1 for world, sigmas in found.items()} == {"comfyui": 10, "a1111": 6, "diffusers": 5}
    assert found["comfyui"].equal(visited("karras", SCHEDULE, 20)[-11:])
    assert found["a1111"].equal(visited("karras", SCHEDULE, 10)[-7:])


def test_how_the_first_noise_is_scaled():
    top = float(SCHEDULE.sigmas[-1])
    assert RULES["comfyui"](SCHEDULE, wanted()).start_scale == pytest.approx((top**2 + 1) ** 0.5)
    assert RULES["a1111"](SCHEDULE, wanted()).start_scale == pytest.approx(top)
    below = RULES["comfyui"](SCHEDULE, wanted(spacing="align_your_steps"))
    assert below.start_scale == pytest.approx((float(below.sigmas[0]) ** 2 + 1) ** 0.5)
    assert RULES["comfyui"](SCHEDULE, wanted(spacing="ddim_uniform")).start_scale < 14.6


def test_a1111s_ddim_ends_at_timestep_1():
    found = RULES["a1111"](SCHEDULE, wanted("ddim", "leading", 20))
    assert SCHEDULE.timestep(found.sigmas).round().tolist() == [951 - 50 * i for i in range(20)]
    assert len(RULES["a1111"](SCHEDULE, wanted("ddim", "leading", 30)).sigmas) == 31
    with pytest.raises(UsageError, match="steps: expected at least 2 for ddim like a1111"):
        RULES["a1111"](SCHEDULE, wanted("ddim", "leading", 1))


def test_timesteps_are_whole_for_comfyui():
    comfy = schedule_of("comfyui", SCHEDULE)
    between = SCHEDULE.sigma(torch.tensor([10.2, 10.7, 999.0, 0.0], dtype=torch.float64))
    assert comfy.timestep(between).tolist() == [10, 11, 999, 0]
    assert comfy.timestep(torch.tensor(1e6)).shape == ()
    assert schedule_of("a1111", SCHEDULE).timestep(between)[0] == pytest.approx(10.2)
    assert float(schedule_of("comfyui", zero_terminal(SCHEDULE)).sigmas[-1]) == pytest.approx(4518.76, rel=1e-5)


@pytest.mark.parametrize("world", ["comfyui", "a1111", "diffusers"])
def test_it_is_recorded_and_chosen_again(world, tmp_path, monkeypatch):
    from minisd.cli import main
    from minisd.pictures.metadata import read_recipe

    monkeypatch.chdir(tmp_path)
    small = ["--steps", "2", "--size", "16x16", "--device", "cpu", "--dtype", "float32", "--seed", "1"]
    assert main(["a star", "--like", world, "--sampler", "DPM2 Karras", *small, "-o", "x.png"]) == 0
    assert read_recipe("x.png")["like"] == world
    assert main(["again", "x.png", "-o", "y.png"]) == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_what_else_follows_from_the_program(float32):
    from minisd.plan import planned
    from minisd.request import Request

    def settled(**options):
        request = planned(Request("a star", **options), float32.capabilities()).request
        return request.rng, request.emphasis, request.plain_prompt, request.sde_noise

    assert settled() == ("cpu", "original", False, "independent")
    assert settled(like="comfyui") == ("comfy", "comfy", False, "independent")
    assert settled(like="a1111", sampler="DPM++ SDE") == ("nv", "original", False, "brownian")
    assert settled(like="a1111", rng="cpu", sde_noise="independent", sampler="dpmpp_sde")[::3] == ("cpu", "independent")
    assert settled(like="comfyui", emphasis="original")[1] == "original"
    assert settled(like="diffusers")[2] is True
    assert settled(like="diffusers", emphasis="no-norm")[1:3] == ("no-norm", False)

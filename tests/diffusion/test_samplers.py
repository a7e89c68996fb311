from __future__ import annotations

import math

import pytest
import torch

from minisd.diffusion.levels import AS_THEY_COME, LevelWish, levels
from minisd.diffusion.samplers import SAMPLERS
from minisd.diffusion.samplers.one_step import ddim, euler
from minisd.diffusion.schedule import scaled_linear
from minisd.diffusion.spacings import SPACINGS, leading, linspace, trailing

SCHEDULE = scaled_linear()


def run(sampler, denoise, x, sigmas, **options):
    return [step[0] for step in sampler(denoise, x, sigmas, lambda *_: torch.randn_like(x), **options)]


def sigmas_of(spacing, steps):
    return levels(SCHEDULE, spacing, steps, AS_THEY_COME).sigmas


def test_published_noise_levels():
    assert float(SCHEDULE.alphas_cumprod[0]) == pytest.approx(0.99915)
    assert float(SCHEDULE.alphas_cumprod[999]) == pytest.approx(0.0046600985, rel=1e-6)
    assert float(SCHEDULE.sigmas[0]) == pytest.approx(0.02916716, rel=1e-6)
    assert float(SCHEDULE.sigmas[999]) == pytest.approx(14.61464123, rel=1e-6)


def test_timestep_is_the_inverse_of_sigma():
    t = torch.tensor([0.0, 0.25, 1.0, 500.7, 998.5, 999.0], dtype=torch.float64)
    assert torch.allclose(SCHEDULE.timestep(SCHEDULE.sigma(t)), t, atol=1e-7)
    assert SCHEDULE.timestep(torch.tensor([1e-9, 100.0])).tolist() == [0, 999]


def test_spacings():
    assert leading(50).tolist() == list(range(981, 0, -20))
    assert linspace(4).tolist() == [999, 666, 333, 0]
    assert trailing(50).tolist() == list(range(999, 0, -20))
    for spacing in (leading, linspace, trailing):
        for steps in (1, 2, 7, 20, 30, 100):
            t = spacing(steps)
            assert len(t) == steps
            assert (t.diff() < 0).all()
            assert t.min() >= 0
            assert t.max() <= 999


def test_a_spacing_that_starts_low_is_told():
    with pytest.warns(UserWarning, match="starts at timestep 501 of 999"):
        levels(SCHEDULE, "leading", 2, LevelWish(ends_above_zero=True))


def test_how_first_and_last_latents_are_scaled():
    top, low = float(SCHEDULE.sigmas[-1]), float(SCHEDULE.sigmas[0])
    found = levels(SCHEDULE, "linspace", 10, AS_THEY_COME)
    assert (found.start_scale, found.end_scale, float(found.sigmas[-1])) == (pytest.approx(top), 1, 0)
    unit = levels(SCHEDULE, "linspace", 10, LevelWish(unit_start=True, ends_above_zero=True))
    assert unit.start_scale == pytest.approx(math.sqrt(top**2 + 1))
    assert unit.end_scale == pytest.approx(math.sqrt(low**2 + 1))
    assert float(unit.sigmas[-1]) == low
    sigma = float(SCHEDULE.sigma(leading(10))[0])
    assert levels(SCHEDULE, "leading", 10, AS_THEY_COME).start_scale == pytest.approx(math.sqrt(sigma**2 + 1))


@pytest.mark.parametrize("sampler", [euler, ddim])
def test_exact_where_the_picture_is_known(sampler):
    """With the true x_0 as the estimate, the path is a straight line and every step is exact."""
    picture, noise = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    sigmas = sigmas_of("linspace", 5)
    for x, sigma in zip(run(sampler, lambda x, s: picture, picture + sigmas[0] * noise, sigmas), sigmas[1:], strict=True):
        assert torch.allclose(x, picture + sigma * noise)


def test_ddim_without_eta_is_euler():
    def denoise(x, sigma):
        return torch.tanh(x) / (1 + sigma)

    x, sigmas = torch.randn(2, 4, 8, 8, dtype=torch.float64), sigmas_of("trailing", 9)
    for a, b in zip(run(euler, denoise, x, sigmas), run(ddim, denoise, x, sigmas), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_of_a_gaussian_have_its_variance(eta):
    """For pictures drawn from N(0, 4) the best estimate is known; every eta must give that variance back."""
    torch.manual_seed(0)
    sigmas = sigmas_of("linspace", 400)
    x = torch.randn(20_000, dtype=torch.float64) * (sigmas[0] ** 2 + 4).sqrt()
    found = run(ddim, lambda x, sigma: x * 4 / (4 + sigma**2), x, sigmas, eta=eta)[-1]
    assert float(found.var()) == pytest.approx(4, rel=0.05)


def test_registry():
    assert len(SAMPLERS) == 44
    assert all(sampler.wish.spacing in SPACINGS for sampler in SAMPLERS.values())

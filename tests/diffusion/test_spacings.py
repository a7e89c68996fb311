"""Every spacing against its source: k-diffusion's and ComfyUI's rules computed with NumPy and SciPy, and numbers of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import minisd
from minisd.diffusion.levels import LevelWish, levels
from minisd.diffusion.schedule import Continuous, scaled_linear, zero_terminal
from minisd.diffusion.spacings import NAMES, SPACINGS, quantiles, spacing_named, visited

STEPS = (1, 2, 5, 10, 20, 30, 50)
SCHEDULES = {"SD": scaled_linear(), "zero SNR": zero_terminal(scaled_linear())}
AYS = [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016]
AYS += [0.3977456272, 0.1515232662, 0.0291671582]
AYS_A1111 = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]


def at(table, t):
    """Log-linear between the trained timesteps (k-diffusion external.py, t_to_sigma)."""
    return np.exp(np.interp(t, np.arange(1000), np.log(table)))


def stretched(table, count):
    logs = np.log(table[::-1])
    return np.exp(np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(table)), logs))[::-1]


def ppf(shares):
    """scipy.stats.beta.ppf(shares, 0.6, 0.6); below, some of its own numbers."""
    return quantiles(torch.as_tensor(np.asarray(shares))).numpy()


def mochi(n):
    """ComfyUI's linear_quadratic_schedule, relative to the highest level."""
    if n == 1:
        return np.array([1.0, 0.0])
    k, t = n // 2, 0.025
    a = (k - t * n) / (k * (n - k) ** 2)
    b = t / k - 2 * (k - t * n) / (n - k) ** 2
    return 1 - np.array([i * t / k for i in range(k)] + [a * i * i + b * i + a * k * k for i in range(k, n)] + [1.0])


def zero(levels):
    return np.append(levels, 0.0)


# name -> (table of 1000 levels, steps) -> levels
RULES = {
    "linspace": lambda s, n: zero(at(s, np.linspace(999, 0, n))),
    "sgm_uniform": lambda s, n: zero(at(s, np.linspace(999, 0, n + 1)[:-1])),
    "simple": lambda s, n: zero([s[-(1 + int(i * (1000 / n)))] for i in range(n)]),
    "ddim_uniform": lambda s, n: np.append(s[1 :: 1000 // n][::-1], 0.0),
    "leading": lambda s, n: zero(s[np.arange(n)[::-1] * (1000 // n) + 1]),
    "trailing": lambda s, n: zero(s[np.round(np.arange(1000, 0, -1000 / n)[:n]).astype(int) - 1]),
    "turbo": lambda s, n: zero(s[np.clip(np.round(np.arange(n, 0, -1) * (1000.0 / n) - 1), 0, 999).astype(int)]),
    "lcm": lambda s, n: zero(s[(np.arange(50) * 20 + 19)[::-1][np.floor(np.linspace(0, 50, n, endpoint=False)).astype(int)]]),
    "smoothstep": lambda s, n: zero(
        s[np.round(999 * np.array([(1 - i / n) ** 2 * (1 + 2 * i / n) for i in range(n)])).astype(int)]
    ),
    "karras": lambda s, n: zero(np.linspace(s[-1] ** (1 / 7), s[0] ** (1 / 7), n) ** 7),
    "exponential": lambda s, n: zero(np.exp(np.linspace(np.log(s[-1]), np.log(s[0]), n))),
    "kl_optimal": lambda s, n: zero(np.tan(np.linspace(np.arctan(s[-1]), np.arctan(s[0]), n))),
    "kl_optimal_a1111": lambda s, n: np.tan(np.linspace(np.arctan(s[-1]), np.arctan(s[0]), n + 1)),
    "linear_quadratic": lambda s, n: s[-1] * mochi(n),
    "beta": lambda s, n: zero(s[list(dict.fromkeys(np.rint(ppf(1 - np.arange(n) / n) * 999).astype(int)))]),
    "beta_a1111": lambda s, n: zero(s[0] + ppf(1 - np.linspace(0, 1, n)) * (s[-1] - s[0])),
    "align_your_steps": lambda s, n: zero(stretched(AYS, n + 1)[:-1]),
    "align_your_steps_a1111": lambda s, n: zero(stretched(AYS_A1111, n)),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RULES)
def test_is_the_rule_of_its_source(name, schedule):
    table = SCHEDULES[schedule].sigmas.numpy()
    for steps in STEPS:
        found, expected = visited(name, SCHEDULES[schedule], steps).numpy(), RULES[name](table, steps)
        if name == "align_your_steps_a1111" and steps == 1:  # A1111 takes the lowest level, from which nothing can be drawn
            assert found.tolist() == [pytest.approx(14.615), 0]
            continue
        assert len(found) == len(expected), steps
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-9), steps


def test_published_numbers():
    def shown(name, steps, xl=False):
        return [float(f"{sigma:.4g}") for sigma in visited(name, SCHEDULES["SD"], steps, xl)]

    assert shown("align_your_steps", 10) == [float(f"{sigma:.4g}") for sigma in AYS[:-1]] + [0]
    assert shown("align_your_steps", 10, xl=True)[:4] == [14.61, 6.318, 3.768, 2.181]
    assert shown("align_your_steps_a1111", 11, xl=True)[-3:] == [0.113, 0.029, 0]
    assert shown("gits_forge", 11)[1:] == [4.617, 2.507, 1.236, 0.702, 0.402, 0.24, 0.156, 0.104, 0.094, 0.029, 0]
    assert shown("gits", 2) == [14.61, 0.8033, 0]
    assert shown("gits", 4) == [14.61, 2.363, 0.9219, 0.3662, 0]
    assert shown("gits", 3) == [14.61, 1.563, 0.5242, 0]
    assert [len(shown("gits", steps)) for steps in STEPS] == [steps + 1 for steps in STEPS]
    assert SCHEDULES["SD"].timestep(visited("sd_turbo", SCHEDULES["SD"], 4)[:-1]).round().tolist() == [999, 899, 799, 699]
    assert [len(visited("ddim_uniform", SCHEDULES["SD"], steps)) - 1 for steps in (10, 30, 50)] == [10, 31, 50]


# (share, scipy.stats.beta.ppf(share, 0.6, 0.6)), by SciPy 1.16
PPF = [
    (0.01, 0.00086123882154291),
    (0.05, 0.012554456873611),
    (0.1, 0.039584405588781),
    (0.2, 0.12292175045833),
    (0.25, 0.17568037865269),
    (0.3, 0.23401700387524),
    (0.4, 0.36270099075321),
    (0.5, 0.5),
    (0.75, 0.8243196213473),
    (0.99, 0.99913876117846),
]


def test_quantiles_of_the_beta_distribution():
    shares, expected = torch.tensor(PPF, dtype=torch.float64).T
    assert torch.allclose(quantiles(shares), expected, rtol=1e-11, atol=0)


def test_names_of_other_programs():
    known = {
        "Karras": "karras", "Normal": "linspace", "normal": "linspace", "Uniform": "linspace", "discrete": "linspace",
        "SGM Uniform": "sgm_uniform", "SGMUniform": "sgm_uniform", "Simple": "simple", "DDIM": "ddim_uniform",
        "KL Optimal": "kl_optimal_a1111", "kl_optimal": "kl_optimal", "Beta": "beta_a1111", "beta": "beta",
        "Align Your Steps": "align_your_steps_a1111", "align_your_steps": "align_your_steps", "ays": "align_your_steps",
        "Align Your Steps GITS": "gits_forge", "Polyexponential": "exponential", "Turbo": "turbo", "sgm-uniform": "sgm_uniform",
        "linear_quadratic": "linear_quadratic", "KARRAS": "karras", "ddim_uniform": "ddim_uniform", "gits": "gits",
    }  # fmt: skip
    assert {name: spacing_named(name) for name in known} == known
    assert all(own in SPACINGS for own in NAMES.values())
    with pytest.raises(minisd.UsageError, match="spacing: 'karas' is unknown; did you mean karras"):
        spacing_named("karas")


def test_discarding_the_level_before_the_last():
    found = levels(SCHEDULES["SD"], "karras", 10, LevelWish("karras", discard=True)).sigmas
    whole = visited("karras", SCHEDULES["SD"], 11)
    assert len(found) == 11
    assert found.equal(torch.cat([whole[:-2], whole[-1:]]))


def test_a_model_without_timesteps():
    edm = Continuous(0.002, 80.0)
    for name, spacing in SPACINGS.items():
        if spacing.timesteps:
            with pytest.raises(minisd.UsageError, match="for a model without timesteps, found"):
                visited(name, edm, 10)
        else:
            assert len(visited(name, edm, 10)) == 11
    assert math.isclose(float(visited("karras", edm, 10)[0]), 80)


def test_the_pipeline_gives_them(tiny):
    for name in SPACINGS:
        found = tiny.noise_levels(name, 10)
        assert found.dtype == torch.float64
        assert (found.diff() < 0).all()
    assert tiny.noise_levels("Align Your Steps", 10)[0] == pytest.approx(14.615)
    with pytest.raises(minisd.UsageError, match="steps: expected at most 10 with spacing 'sd_turbo', found 11"):
        tiny.noise_levels("sd_turbo", 11)

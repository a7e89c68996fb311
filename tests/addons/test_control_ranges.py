"""When a control acts: by shares of the steps as in diffusers, or by noise levels as in ComfyUI."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from controls import control_shapes
from families import SMALL
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd.addons.controls.acting import acts, level_at
from minisd.addons.controls.control import Control
from minisd.diffusion.denoiser import Call
from minisd.diffusion.schedule import Continuous, scaled_linear, zero_terminal
from minisd.diffusion.spacings import spacing_named, visited
from minisd.recipe import repeat
from minisd.workbench import blueprint

PIXEL = Image.new("RGB", (8, 8))


def steps_of(spacing: str, name: str, start: float, end: float, steps: int = 20) -> list[int]:
    """The steps at which it acts, where each asks once."""
    schedule = scaled_linear()
    levels = visited(spacing_named(spacing), schedule, steps, False)
    control = Control("x", PIXEL, start=start, end=end, range=name)
    return [i for i in range(steps) if acts(control, Call(i, i, float(levels[i])), steps, schedule)]


@pytest.mark.parametrize(
    ("spacing", "by_noise"),
    [("normal", range(4, 16)), ("karras", range(5, 12)), ("sgm_uniform", range(4, 17))],
)
def test_noise_levels_as_in_comfyui(spacing, by_noise):
    """What its own code gives for 20 steps and the shares 0.2 to 0.8; by steps it is the same for every spacing."""
    assert steps_of(spacing, "noise", 0.2, 0.8) == list(by_noise)
    assert steps_of(spacing, "steps", 0.2, 0.8) == list(range(4, 16))


def test_the_ends_of_noise_levels():
    """All of it, both ends included; and a level that is exactly that of a share."""
    assert steps_of("karras", "noise", 0.0, 1.0) == list(range(20))
    schedule = scaled_linear()
    for share, expected in ((0.0, float("inf")), (1.0, 0.0), (0.25, float(schedule.sigma(torch.tensor(749.25))))):
        assert level_at(schedule, share) == pytest.approx(expected)
    at = Call(0, 0, level_at(schedule, 0.5))
    for start, end in ((0.5, 1.0), (0.0, 0.5)):
        assert acts(Control("x", PIXEL, start=start, end=end, range="noise"), at, 20, schedule)
    assert level_at(Continuous(0.002, 80.0), 0.5) == pytest.approx((0.002 * 80) ** 0.5)
    assert level_at(zero_terminal(scaled_linear()), 0.001) < level_at(zero_terminal(scaled_linear()), 0.0)


def test_the_factor_of_diffusers_adapters():
    """Step i of N acts if i < int(N f), in exact numbers (their product of floats may be just below a whole number)."""
    for steps in (1, 7, 10, 20, 25, 50):
        for percent in range(1, 101):
            control = Control("x", PIXEL, end=percent / 100)
            ours = [i for i in range(steps) if acts(control, Call(i, i, 1.0), steps, scaled_linear())]
            assert ours == list(range(int(steps * Fraction(percent, 100)))), (steps, percent)


def test_each_call_is_judged_by_its_own_level(tmp_path, monkeypatch):
    """Of a step that asks twice, the second time alone may lie in the range; --like comfyui has noise levels by itself."""
    small = SMALL["sd1"]
    pipe = minisd.load(small.write(tmp_path / "sd1.safetensors"), device="cpu", dtype="float32")
    save_file(blueprint.random_weights(control_shapes(small.unet()), 3), tmp_path / "control.safetensors")
    PIXEL.save(tmp_path / "hint.png")
    control, calls, asked = minisd.load_control(tmp_path / "control.safetensors"), [], []
    plain = type(control).residuals
    monkeypatch.setattr(
        type(control), "residuals", lambda self, x, hint, t, *rest: asked.append(float(t[0])) or plain(self, x, hint, t, *rest)
    )
    common = {"steps": 6, "seed": 1, "sampler": "heun", "spacing": "karras", "width": 64, "height": 64}
    given = [minisd.Control(control, PIXEL, start=0.3, end=0.75, range="noise")]
    pipe("a star", controls=given, observe=lambda call, *_: calls.append(call), **common)
    levels = torch.tensor([call.sigma for call in calls], dtype=torch.float64)
    times = pipe.network.schedule.timestep(levels)
    inside = [call for call, time in zip(calls, times.tolist(), strict=True) if 0.25 * 999 <= time <= 0.7 * 999]
    assert len(asked) == len(inside)
    assert {call.step for call in inside if sum(each.step == call.step for each in inside) == 1}  # steps of which a half acts
    assert asked == pytest.approx(
        [float(pipe.network.schedule.timestep(torch.tensor(call.sigma).double())) for call in inside], abs=1e-3
    )

    file = [minisd.Control(tmp_path / "control.safetensors", tmp_path / "hint.png", start=0.3, end=0.75)]
    ways = {like: pipe("a star", controls=file, like=like, **common).metadata[0] for like in ("comfyui", "diffusers")}
    assert {like: recipe["controls"][0]["range"] for like, recipe in ways.items()} == {"comfyui": "noise", "diffusers": "steps"}
    again = repeat(json.loads(json.dumps(ways["comfyui"])), pipe.checkpoint.path)
    assert again.controls[0]["range"] == "noise"

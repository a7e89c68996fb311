"""The sampler lab: claimed and measured order of every sampler, side by side."""

from __future__ import annotations

import json

import pytest
import torch

from minisd.bench.lab import samplers as lab
from minisd.bench.lab import taps
from minisd.bench.lab.analytic import PROBLEMS, along_gaussian, gaussian
from minisd.cli import main
from minisd.diffusion.samplers import SAMPLERS


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.title)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in lab.NO_ORDER])
def test_measured_order_is_the_claimed_one_or_the_table_says_why(name, problem):
    apart = abs(lab.measured_order(name, problem) - SAMPLERS[name].order)
    assert apart <= 0.3 or name in lab.WHY
    if name in lab.WHY:  # no excuse without need
        assert max(abs(lab.measured_order(name, each) - SAMPLERS[name].order) for each in PROBLEMS) > 0.3


STOCHASTIC = ("er_sde", "restart", "dpm_adaptive", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "seeds_3", "euler_ancestral")


@pytest.mark.parametrize("name", [*STOCHASTIC, "dpmpp_2s_ancestral", "sa_solver"])
def test_what_is_drawn_has_the_spread_of_the_distribution(name):
    """With its noise on, and where there is no order to measure."""
    generator = torch.Generator().manual_seed(1)
    sigmas = torch.cat([torch.logspace(1, -1.5, 100, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x = sigmas[0] * torch.randn(10_000, 4, generator=generator, dtype=torch.float64)
    counted = lab.Counted(gaussian, SAMPLERS[name].pair)
    noise = lambda *_: torch.randn(x.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    *_, (found, _) = lab.sample(name, counted, x, sigmas, noise)
    assert torch.allclose(found.std(0), torch.tensor([0.3, 0.6, 1.0, 2.0], dtype=torch.float64), rtol=0.08)


def test_the_exact_flow_is_exact():
    """Of the Gaussian, by its own differential equation: the difference quotient is the slope."""
    x, sigma = torch.ones(1, 4, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    slope = (along_gaussian(x, sigma, sigma + 1e-6) - x) / 1e-6
    assert torch.allclose(slope, (x - gaussian(x, sigma)) / sigma, rtol=1e-5)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab, "REFERENCE", 4)
    monkeypatch.setattr(lab, "BUDGETS", (2, 3, 4))
    monkeypatch.setattr(lab, "SAMPLERS", {name: SAMPLERS[name] for name in ("euler", "heun", "lcm")})
    assert main(["bench", "samplers", "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert "goes to a picture and back at each step" in out
    known, drawn = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert [row["claimed"] for row in known["rows"]] == [1, 2, None]
    assert known["rows"][1]["order_mixture"] == pytest.approx(2, abs=0.1)
    assert drawn["rows"][0]["4_calls"] < drawn["rows"][0]["2_calls"]
    with pytest.raises(SystemExit):
        main(["bench", "samplers", "--full"])


def test_a_tap_that_was_left_costs_nothing(tmp_path, monkeypatch):
    """By the calls of functions, which are exact: not one more.  How long they take is for `minisd bench taps` to say."""
    monkeypatch.setattr(taps, "ROUNDS", 2)
    assert (
        main(["bench", "taps", "--device", "cpu", "--dtype", "float32", "--repeats", "1", "--json", str(tmp_path / "x.json")])
        == 0
    )
    (table,) = json.loads((tmp_path / "x.json").read_text())["tables"]
    never, left, another, looking = (row["calls"] for row in table["rows"])
    assert never == left == another
    assert never > 1000
    assert looking > never  # so that a hook would have been counted
    assert all(row["time_ms"] > 0 and row["ratio"] > 0 for row in table["rows"])


@pytest.mark.slow
def test_loras_beside_diffusers(tmp_path):
    """In the whole of SD 1.5, which takes 12 GB: both make the same weight."""
    assert (
        main(["bench", "lora", "--repeats", "1", "--dtype", "float32", "--device", "cpu", "--json", str(tmp_path / "x.json")])
        == 0
    )
    (table,) = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert [row["label"].split(",")[0] for row in table["rows"]] == ["minisd"] * 3 + ["diffusers"] * 3
    assert table["rows"][3]["difference"] < 1e-5


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    lab.plot({"euler": [(10, 0.1), (20, 0.05)], "heun": [(9, 0.05), (19, 0.01)]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000

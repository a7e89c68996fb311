"""The samplers against the programs that people know them from, with the same denoiser and the same noise.

sampler_values.json: [name, options, the latents that it ends with], float64, from ComfyUI's k_diffusion/sampling.py and
extra_samplers/uni_pc.py of July 2026 (restart: Forge's modules/sd_samplers_extra.py), over 10 Karras levels (restart: 24) and
with what `start`, `estimate` and `noises` below give.  The rest is compared with diffusers.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import minisd
from minisd.diffusion.levels import AS_THEY_COME, levels
from minisd.diffusion.program import program
from minisd.diffusion.samplers import SAMPLERS, named
from minisd.diffusion.samplers.registry import key
from minisd.diffusion.schedule import scaled_linear

SCHEDULE = scaled_linear()
VALUES = json.loads(Path(__file__).with_name("sampler_values.json").read_text(encoding="utf-8"))
SPREAD = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)
# What lies beyond rounding there: integrals as sums and coefficients in float32.
COARSE = {
    "deis": 2e-7,
    "er_sde": 2e-8,
    "uni_pc": 1e-6,
    "uni_pc_bh2": 1e-6,
    "restart": 5e-7,
    "dpm_fast": 1e-5,
    "dpm_adaptive": 1e-8,
}


def estimate(x, sigma, shift=0.0):
    """The best estimate for pictures of a Gaussian whose deviation differs by channel, and something that is not linear."""
    return x * SPREAD.to(x) ** 2 / (SPREAD.to(x) ** 2 + sigma**2) + 0.1 * torch.tanh(x / (1 + sigma) + shift)


def pair(x, sigma):
    """The guided estimate (scale 1.5) and the unconditional one."""
    unconditional = estimate(x, sigma, 0.5)
    return unconditional + 1.5 * (estimate(x, sigma) - unconditional), unconditional


def start(sigma):
    return torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigma


def noises():
    """The k-th noise is that of seed k, whatever it is for."""
    seeds = iter(range(1, 10_000))
    return lambda *_: torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(next(seeds)), dtype=torch.float64)


def sigmas_of(steps, spacing="karras"):
    return levels(SCHEDULE, spacing, steps, AS_THEY_COME).sigmas


def drawn(name, sigmas, noise, dtype=torch.float64, **options):
    denoise = pair if SAMPLERS[name].pair else estimate
    *_, (latents, _) = minisd.sample(name, denoise, start(sigmas[0]).to(dtype), sigmas, lambda *_: noise().to(dtype), **options)
    assert latents.dtype == dtype
    return latents.double()


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "options", "expected"), VALUES, ids=lambda value: str(value)[:40])
def test_ends_where_its_program_does(name, options, expected):
    expected, sigmas = torch.tensor(expected, dtype=torch.float64).view(1, 4, 2, 2), sigmas_of(24 if name == "restart" else 10)
    assert apart(drawn(name, sigmas, noises(), **options), expected) <= COARSE.get(name, 1e-8)
    assert apart(drawn(name, sigmas, noises(), torch.float32, **options), expected) <= 1e-5


def by_diffusers(scheduler, x, estimate, variance_preserving):
    """diffusers' scheduler over the levels from x, with the same denoiser, which is asked for the noise."""
    asked = []
    for t in scheduler.timesteps:
        sigma = scheduler.sigmas[scheduler.step_index or 0].double() if hasattr(scheduler, "sigmas") else SCHEDULE.sigmas[t]
        scale = (sigma**2 + 1).sqrt() if variance_preserving else 1.0
        if not asked and variance_preserving:
            x = x / scale
        asked.append(float(sigma))
        eps = (x * scale - estimate(x * scale, sigma)) / sigma
        x = scheduler.step(eps, t, x, return_dict=True).prev_sample.to(x.dtype)
    return x


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("euler", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "zero"}),
    ],
)
def test_equals_diffusers(name, kind, options):
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    scheduler = getattr(diffusers, kind)(**betas, **options)
    scheduler.set_timesteps(10)
    sigmas = sigmas_of(10)
    assert torch.allclose(torch.unique(scheduler.sigmas.double()), torch.unique(sigmas), rtol=1e-5, atol=1e-7)
    preserving = name == "dpmpp_2m"
    found = by_diffusers(scheduler, start(sigmas[0]), estimate, preserving)
    assert apart(drawn(name, sigmas, noises()), found) <= 1e-5


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("euler", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "zero"}),
    ],
)
def test_equals_diffusers_on_the_tiny_checkpoint(name, kind, options):
    """With the trained network in the box, in float32."""
    import diffusers

    pipe = minisd.load(device="cpu", dtype="float32")
    context = pipe.encode_prompt("a red circle on a blue background").context
    x = torch.randn(1, *pipe_shape(pipe), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def network(x, sigma):
        scale = (sigma**2 + 1).sqrt()
        eps = pipe.unet((x / scale).float(), SCHEDULE.timestep(torch.as_tensor(sigma).double()).float().view(1), context)
        return (x - sigma * eps).to(x.dtype)

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    scheduler = getattr(diffusers, kind)(**betas, **options)
    scheduler.set_timesteps(10)
    sigmas = torch.unique(scheduler.sigmas.double(), sorted=True).flip(0)
    found = by_diffusers(scheduler, x * float(sigmas[0]), network, name == "dpmpp_2m")
    *_, (latents, _) = minisd.sample(name, network, x * float(sigmas[0]), sigmas)
    assert apart(latents, found) <= 1e-5


def pipe_shape(pipe):
    return 4, pipe.recognition.size[1] // pipe.vae.downscale, pipe.recognition.size[0] // pipe.vae.downscale


def test_plms_equals_diffusers():
    """Its first step's second question, its multistep weights, and its end at the level of timestep 0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    scheduler.set_timesteps(10)
    way = levels(SCHEDULE, "leading", 10, SAMPLERS["plms"].wish)
    x = start(1.0)
    for t in scheduler.timesteps:
        scale = (SCHEDULE.sigmas[t] ** 2 + 1).sqrt()
        x = scheduler.step((x * scale - estimate(x * scale, SCHEDULE.sigmas[t])) / SCHEDULE.sigmas[t], t, x).prev_sample
    *_, (found, _) = minisd.sample("plms", estimate, start(way.start_scale), way.sigmas)
    assert apart(found / way.end_scale, x) <= 1e-5


def test_tcd_equals_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_tcd

    noise = noises()
    monkeypatch.setattr(scheduling_tcd, "randn_tensor", lambda *_, **__: noise())
    scheduler = diffusers.TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(4)
    sigmas = torch.cat([SCHEDULE.sigmas[scheduler.timesteps], SCHEDULE.sigmas[:1]])  # there it ends at timestep 0, not at 0
    x = start(1.0) * sigmas[0] / (sigmas[0] ** 2 + 1).sqrt()
    for t in scheduler.timesteps:
        sigma = SCHEDULE.sigmas[t]
        scale = (sigma**2 + 1).sqrt()
        x = scheduler.step((x * scale - estimate(x * scale, sigma)) / sigma, t, x, eta=0.3).prev_sample
    # It ends unscaled: the estimate, with the noise that timestep 0 has.
    assert apart(drawn("tcd", sigmas, noises()), x / SCHEDULE.alphas_cumprod[0].sqrt()) <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_its_table_is_the_sampler(name):
    """What the recorded way walks by; only a step size that looks at the picture has no table, and says so."""
    sampler, sigmas = SAMPLERS[name], sigmas_of(24)
    made = program(sampler.run, sigmas, pair=sampler.pair)
    if name == "dpm_adaptive":
        assert made is None
        return
    history, noise = torch.zeros(made.questions.shape[1], 1, 4, 2, 2, dtype=torch.float64), noises()
    history[0] = start(sigmas[0])
    for row, _ in made.draws:
        history[row] = noise()
    rows = iter(made.estimates)
    for i, sigma in enumerate(made.sigmas):
        asked = torch.tensordot(made.questions[i], history, 1)
        for answer in pair(asked, sigma) if sampler.pair else [estimate(asked, sigma)]:
            history[next(rows)] = answer
    assert apart(torch.tensordot(made.latents[-1], history, 1), drawn(name, sigmas, noises())) <= 1e-10


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_steps(name):
    """From one on, to 0 and to a level above it."""
    for steps in (1, 2, 3, 5):
        for sigmas in (sigmas_of(steps), sigmas_of(steps + 1)[:-1]):
            if steps < SAMPLERS[name].least:
                with pytest.raises(minisd.UsageError, match="sigmas: expected 3 or more falling numbers"):
                    drawn(name, sigmas, noises())
                continue
            found = drawn(name, sigmas, noises())
            assert found.isfinite().all()
            assert found.abs().max() < 100
    assert isinstance(SAMPLERS[name].options, dict)


# Calls of the network and noises for 10 steps: ../docs/drawing.md says them a step.
COUNTS = {
    "euler": (10, 0),
    "euler_ancestral": (10, 9),
    "heun": (19, 0),
    "heunpp2": (27, 0),
    "dpmpp_sde": (19, 18),
    "seeds_3": (28, 27),
    "plms": (11, 0),
    "dpm_fast": (10, 0),
    "lcm": (10, 9),
    "sa_solver": (10, 3),
    "sa_solver_pece": (19, 3),
    "uni_pc": (10, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_calls_and_noises_are_counted(name):
    made = program(SAMPLERS[name].run, sigmas_of(10))
    assert (len(made.sigmas), len(made.draws)) == COUNTS[name]


def test_noise_is_asked_for_the_way_that_it_is_for():
    sigmas, asked = sigmas_of(3), []

    def noise(sigma, following):
        asked.append((sigma, following))
        return torch.zeros(1, 4, 2, 2, dtype=torch.float64)

    for _ in minisd.sample("dpmpp_sde", estimate, start(sigmas[0]), sigmas, noise):
        pass
    middles = [float((a * b).sqrt()) for a, b in pairwise(sigmas[:-1])]
    a, b, c = sigmas[:3].tolist()
    assert asked == [pytest.approx(each) for each in [(a, middles[0]), (a, b), (b, middles[1]), (b, c)]]
    asked.clear()
    for _ in minisd.sample("seeds_2", estimate, start(sigmas[0]), sigmas, noise):
        pass
    assert asked == [pytest.approx(each) for each in [(a, middles[0]), (middles[0], b), (b, middles[1]), (middles[1], c)]]


# A1111 (labels and aliases, also of before 1.9), ComfyUI, diffusers, OctoAI, stable-diffusion.cpp.
KNOWN = """
euler = Euler | k_euler | K_EULER | EulerDiscreteScheduler
euler_ancestral = Euler a | k_euler_a | k_euler_ancestral | K_EULER_ANCESTRAL | EulerAncestralDiscreteScheduler | euler_a
euler_ancestral = euler a
heun = Heun | k_heun | HEUN | K_HEUN | HeunDiscreteScheduler
heunpp2 = HeunPP2
dpm_2 = DPM2 | k_dpm_2 | KDPM2DiscreteScheduler | dpm2
dpm_2:karras = DPM2 Karras | k_dpm_2_ka | DPM_2_KARRAS
dpm_2_ancestral = DPM2 a | k_dpm_2_a | KDPM2AncestralDiscreteScheduler
dpm_2_ancestral:karras = DPM2 a Karras | k_dpm_2_a_ka | DPM_2_ANCESTRAL_KARRAS
lms = LMS | k_lms | KLMS | LMSDiscreteScheduler
lms:karras = LMS Karras | k_lms_ka
dpm_fast = DPM fast | k_dpm_fast
dpm_adaptive = DPM adaptive | k_dpm_ad
dpmpp_2s_ancestral = DPM++ 2S a | k_dpmpp_2s_a | dpm++2s_a
dpmpp_2s_ancestral:karras = DPM++ 2S a Karras | k_dpmpp_2s_a_ka
dpmpp_2s = DPM_SINGLE | DPMSolverSinglestepScheduler
dpmpp_sde = DPM++ SDE | k_dpmpp_sde | DPMSolverSDEScheduler | dpmpp_sde_gpu
dpmpp_sde:karras = DPM++ SDE Karras | k_dpmpp_sde_ka | DPM_PLUS_PLUS_SDE_KARRAS
dpmpp_2m = DPM++ 2M | k_dpmpp_2m | DPMSolverMultistepScheduler | DPM_SOLVER_MULTISTEP | dpm++2m | dpm++ 2m
dpmpp_2m:karras = DPM++ 2M Karras | k_dpmpp_2m_ka | DPM_PLUS_PLUS_2M_KARRAS
dpmpp_2m_v2 = dpm++2mv2
dpmpp_2m_sde = DPM++ 2M SDE | k_dpmpp_2m_sde | DPM_PLUS_PLUS_2M_SDE | dpm++2m_sde | dpm++2m_sde_bt | dpmpp_2m_sde_gpu
dpmpp_2m_sde = dpm++ 2m sde gpu
dpmpp_2m_sde:karras = DPM++ 2M SDE Karras | DPM_PLUS_PLUS_2M_SDE_KARRAS
dpmpp_2m_sde:exponential = k_dpmpp_2m_sde_exp
dpmpp_2m_sde_heun = DPM++ 2M SDE Heun | k_dpmpp_2m_sde_heun
dpmpp_2m_sde_heun:exponential = DPM++ 2M SDE Heun Exponential
dpmpp_3m_sde = DPM++ 3M SDE | dpmpp_3m_sde_gpu
dpmpp_3m_sde:karras = k_dpmpp_3m_sde_ka
ddim = DDIM | ddim | DDIMScheduler
ddim:trailing = ddim_trailing
ddpm = DDPM | DDPMScheduler
plms = PLMS | PNDM | PNDMScheduler
uni_pc = UniPC | unipc | UNI_PC | UniPCMultistepScheduler
lcm = LCM | k_lcm | LCMScheduler
tcd = TCDScheduler | tcd
ipndm = IPNDM | IPNDMScheduler
ipndm_v = IPNDM_V
deis = DEIS | DEISMultistepScheduler
restart = Restart | restart
sa_solver = SASolverScheduler
res_multistep = res multistep
res_2s = res 2s | res_2s
gradient_estimation = euler_ge
euler_cfg_pp = euler_cfg_pp | DDIM CFG++ | ddim_cfgpp
euler_ancestral_cfg_pp = euler_a_cfg_pp
"""


def test_the_names_of_all_worlds_lead_to_one_registry():
    for own, names in (line.split(" = ") for line in KNOWN.strip().splitlines()):
        name, _, schedule = own.partition(":")
        for each in names.split(" | "):
            assert named(each) == (name, schedule or None), each
    for name, sampler in SAMPLERS.items():
        assert {named(each) for each in (name, sampler.label, *sampler.names)} == {(name, None)}
    keys = [
        each for name, sampler in SAMPLERS.items() for each in {key(other) for other in (name, sampler.label, *sampler.names)}
    ]
    assert len(set(keys)) == len(keys)
    with pytest.raises(minisd.UsageError, match="'dpmpp_2n' is unknown; did you mean dpmpp_2"):
        named("dpmpp_2n")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("euler", {"eta": 0.5}, "eta: sampler 'Euler' has no such option, .*; its options: s_churn, s_tmin, s_tmax, s_noise"),
        ("lms", {"order": 5}, "order: expected a whole number from 1 to 4 for 'LMS', found '5'"),
        ("lms", {"order": 2.5}, "order: expected a whole number from 1 to 4"),
        ("euler_ancestral", {"eta": float("nan")}, "eta: expected a number from 0.0 to 1.0"),
        ("dpm_adaptive", {"order": 1}, "order: expected a whole number from 2 to 3"),
        ("dpmpp_sde", {"s_noise": "much"}, "s_noise: expected a number from 0.0 to 10.0 for .*, found 'much'"),
    ],
)
def test_an_option_that_does_not_fit_is_one_clear_error(name, options, message):
    with pytest.raises(minisd.UsageError, match=message):
        minisd.sample(name, estimate, start(1.0), sigmas_of(5), **options)

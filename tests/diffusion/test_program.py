"""A sampler's program: its rows are the papers' coefficients, and walking by them is walking by the generator."""

from __future__ import annotations

import pytest
import torch
from own_samplers import LINEAR, NOT_LINEAR, dpmpp_2m, euler_ancestral

from minisd.diffusion.levels import AS_THEY_COME, levels
from minisd.diffusion.program import Draw, program
from minisd.diffusion.samplers.one_step import ddim, euler
from minisd.diffusion.schedule import scaled_linear

SIGMAS = levels(scaled_linear(), "karras", 20, AS_THEY_COME).sigmas
SAMPLERS = LINEAR | {"euler": euler, "ddim": ddim}


def denoise(x, sigma):
    """The best estimate for pictures of a Gaussian whose deviation differs by channel, and something that is not linear."""
    spread = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=x.dtype).view(1, 4, 1, 1)
    return x * spread**2 / (spread**2 + sigma**2) + 0.1 * torch.tanh(x / (1 + sigma))


def noise_of(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, following: torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def walked(made, x, noise):
    """By the table: (latents, denoised) of every step."""
    history = torch.zeros(made.questions.shape[1], *x.shape, dtype=x.dtype)
    history[0] = x
    for row, draw in made.draws:
        history[row] = noise(draw.sigma, draw.following)
    moments, calls = [], 0
    for step, done in enumerate(made.done):
        for i in range(calls, done):
            asked = torch.tensordot(made.questions[i].to(x.dtype), history, 1)
            history[made.estimates[i]] = denoise(asked, made.sigmas[i])
        calls = done
        moments.append(tuple(torch.tensordot(row[step].to(x.dtype), history, 1) for row in (made.latents, made.denoised)))
    return moments


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_walking_by_the_table_is_walking_by_the_generator(name, dtype, limit):
    sampler, start = SAMPLERS[name], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = list(sampler(denoise, start * SIGMAS[0], SIGMAS, noise_of(1, torch.float64)))
    found = walked(program(sampler, SIGMAS), (start * SIGMAS[0]).to(dtype), noise_of(1, dtype))
    assert len(found) == len(wanted)
    for moment, true in zip(found, wanted, strict=True):
        for x, y in zip(moment, true, strict=True):
            assert float((x.double() - y).norm() / y.norm()) <= limit


def test_rows_are_the_coefficients_of_the_papers():
    made = program(euler, SIGMAS)
    assert torch.allclose(made.questions[1, :2], torch.stack([SIGMAS[1] / SIGMAS[0], 1 - SIGMAS[1] / SIGMAS[0]]))
    assert made.sigmas.equal(SIGMAS[:-1])
    assert made.estimates == tuple(range(1, 21))
    multistep = program(dpmpp_2m, SIGMAS)
    h, before = (SIGMAS[1] / SIGMAS[2]).log(), (SIGMAS[0] / SIGMAS[1]).log()
    grown, r = 1 - SIGMAS[2] / SIGMAS[1], before / h  # -expm1(-h)
    assert multistep.questions[2, 2] == pytest.approx(float(grown * (1 + 1 / (2 * r))))
    late = -grown / (2 * r) + SIGMAS[2] / SIGMAS[1] * (1 - SIGMAS[1] / SIGMAS[0])  # as the old estimate, and in the state
    assert multistep.questions[2, 1] == pytest.approx(float(late))


def test_calls_draws_and_steps_are_counted():
    counts = {}
    for name, sampler in SAMPLERS.items():
        made = program(sampler, SIGMAS)
        counts[name] = len(made.sigmas), len(made.draws), len(made.done)
    assert counts == {
        "euler": (20, 0, 20), "ddim": (20, 0, 20), "heun": (39, 0, 20), "dpmpp_2m": (20, 0, 20),
        "euler_ancestral": (20, 19, 20), "restarting": (21, 2, 21),
    }  # fmt: skip
    assert program(ddim, SIGMAS, eta=1.0).draws[0][1] == Draw(float(SIGMAS[0]), float(SIGMAS[1]))
    assert program(euler_ancestral, SIGMAS, eta=0.0).draws == ()


def channels_apart(denoise, x, sigmas, noise):
    denoised = denoise(x, sigmas[0])
    yield denoised - 0.1 * denoised.mean(1, keepdim=True), denoised


def upside_down(denoise, x, sigmas, noise):
    yield denoise(x.flip(2), sigmas[0]), x


def by_position(denoise, x, sigmas, noise):
    denoised = denoise(x, sigmas[0])
    denoised[:, 0] *= 0.8
    yield denoised, denoised


def pictures_mixed(denoise, x, sigmas, noise):
    yield denoise(x.roll(1, 0), sigmas[0]), x


def by_size(denoise, x, sigmas, noise):
    yield denoise(x / x.shape[2], sigmas[0]), x


def other_shape(denoise, x, sigmas, noise):
    yield denoise(x.mT, sigmas[0]), x


def own_noise(denoise, x, sigmas, noise):
    for sigma in sigmas[:-1]:
        denoised = denoise(x, sigma)
        x = denoised + sigma * torch.randn_like(x)
        yield x, denoised


def with_an_offset(denoise, x, sigmas, noise):
    denoised = denoise(x, sigmas[0])
    yield denoised + 0.1, denoised


def by_sign(denoise, x, sigmas, noise):
    denoised = denoise(x, sigmas[0])
    yield torch.where(denoised > 0, denoised, x), denoised


def rare(denoise, x, sigmas, noise):
    """Linear but for numbers beyond a thousand."""
    denoised = denoise(x, sigmas[0])
    yield denoised.clamp(-1000, 1000), denoised


def asking_how_large(denoise, x, sigmas, noise):
    denoised = denoise(x, sigmas[0])
    yield (denoised if bool((denoised.abs() < 1e30).all()) else x), denoised


def without_end(denoise, x, sigmas, noise):
    while True:
        x = denoise(x, sigmas[0])
        yield x, x


def broken(denoise, x, sigmas, noise):
    yield denoise(x, sigmas[0]).nosuch, x


@pytest.mark.parametrize(
    "sampler",
    [
        *NOT_LINEAR,
        own_noise,
        with_an_offset,
        by_sign,
        rare,
        asking_how_large,
        without_end,
        broken,
        channels_apart,
        upside_down,
        by_position,
        pictures_mixed,
        by_size,
        other_shape,
        lambda *_: iter(()),
    ],
)
def test_what_has_no_program_is_found_out(sampler):
    assert program(sampler, SIGMAS) is None


def in_place(denoise, x, sigmas, noise):
    """Writes into what it was given and has yielded, as some do."""
    for i, sigma in enumerate(sigmas[:-1]):
        denoised = denoise(x, sigma)
        x.sub_(denoised).mul_(sigmas[i + 1] / sigma).add_(denoised)
        yield x, denoised.mul_(1)


def test_a_sampler_that_works_in_place_has_the_same_program():
    found, wanted = program(in_place, SIGMAS), program(euler, SIGMAS)
    assert torch.allclose(found.questions, wanted.questions)
    assert torch.allclose(found.latents, wanted.latents)

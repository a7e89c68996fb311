"""Samplers as somebody else would write them, from their papers: none of them is known to the fast way by name."""

from __future__ import annotations

from itertools import pairwise


def heun(denoise, x, sigmas, noise):
    """Two calls a step (Karras et al. 2022, algorithm 1 without churn)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        d = (x - denoised) / sigma
        euler = x + (following - sigma) * d
        if following > 0:
            again = (euler - denoise(euler, following)) / following
            x = x + (following - sigma) * (d + again) / 2
        else:
            x = euler
        yield x, denoised


def dpmpp_2m(denoise, x, sigmas, noise):
    """Several steps (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    old = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if following == 0:
            x = denoised
        else:
            h = sigma.log() - following.log()
            mixed = denoised
            if old is not None:
                r = (sigmas[i - 1].log() - sigma.log()) / h
                mixed = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
            x = following / sigma * x - (-h).expm1() * mixed
        old = denoised
        yield x, denoised


def euler_ancestral(denoise, x, sigmas, noise, *, eta: float = 1.0):
    """Fresh noise (k-diffusion sampling.py, sample_euler_ancestral)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        up = min(float(following), eta * float(following * (1 - (following / sigma) ** 2).sqrt()))
        down = (float(following) ** 2 - up**2) ** 0.5
        x = x + (down - sigma) * (x - denoised) / sigma
        if up > 0:
            x = x + up * noise(float(sigma), float(following))
        yield x, denoised


def restarting(denoise, x, sigmas, noise):
    """Goes back up once, and yields a step for each way down: more steps than levels."""
    for sigma, following in [*pairwise(sigmas), (sigmas[-2], sigmas[-1])]:
        if following == 0 and sigma == sigmas[-2]:
            x = x + sigma * 0.1 * noise(0.0, float(sigma))
        denoised = denoise(x, sigma)
        x = denoised + following * (x - denoised) / sigma
        yield x, denoised


def thresholded(denoise, x, sigmas, noise):
    """Not linear: what it does depends on what it sees."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma).clamp(-1, 1)
        x = denoised + following * (x - denoised) / sigma
        yield x, denoised


def by_norm(denoise, x, sigmas, noise):
    """As many calls as it pleases."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if float((x - denoised).abs().max()) > 5:
            denoised = (denoised + denoise(x, sigma)) / 2
        x = denoised + following * (x - denoised) / sigma
        yield x, denoised


LINEAR = {"heun": heun, "dpmpp_2m": dpmpp_2m, "euler_ancestral": euler_ancestral, "restarting": restarting}
NOT_LINEAR = [thresholded, by_norm]

"""From noise to finished latents against diffusers' pipeline: same weights, same noise, guidance on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FULL, Oracle, relative_error, write_checkpoint

import minisd

PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry"
CASES = [
    ("ddim", "leading", 10),
    ("ddim", "trailing", 10),
    ("euler", "linspace", 10),
    ("euler", "leading", 10),
    ("euler", "linspace", 7),
]


def both(pipe: minisd.Pipeline, oracle: Oracle, folder, sampler: str, spacing: str, steps: int, side: int):
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(5))
    common = {"negative_prompt": NEGATIVE, "latents": noise, "guidance_scale": 7.5, "width": side * 8, "height": side * 8}
    found = pipe(PROMPT, sampler=sampler, spacing=spacing, steps=steps, **common)
    wanted = oracle.pipeline(sampler, spacing, folder)(PROMPT, num_inference_steps=steps, output_type="latent", **common).images
    return found, wanted


@pytest.mark.parametrize(("sampler", "spacing", "steps"), CASES)
def test_latents_equal_those_of_diffusers(reduced, oracle, tmp_path, sampler, spacing, steps):
    found, wanted = both(reduced, oracle, tmp_path, sampler, spacing, steps, side=16)
    assert relative_error(found.latents, wanted) <= 1e-4


@torch.no_grad()
def test_picture_equals_that_of_diffusers(reduced, oracle, tmp_path):
    found, wanted = both(reduced, oracle, tmp_path, "euler", "linspace", 4, side=16)
    pixels = oracle.vae.decode(wanted / 0.18215).sample
    picture = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(found.images[0], dtype=np.float32) - picture).max() <= 1


def test_ddim_with_eta_equals_diffusers_step(reduced):
    """eta > 0 draws noise in an order of its own, so one step is compared, with the noise given to both."""
    from diffusers import DDIMScheduler

    from minisd.diffusion.levels import LevelWish, levels
    from minisd.diffusion.samplers.one_step import ddim

    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    reference.set_timesteps(10)
    sigmas = levels(reduced.network.schedule, "leading", 10, LevelWish(ends_above_zero=True)).sigmas
    x, eps, extra = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
    for i in (0, 4, 9):
        scale = (sigmas[i] ** 2 + 1).sqrt()
        steps = ddim(lambda x, sigma: x - sigma * eps, x * scale, sigmas[i : i + 2], lambda *_: extra, eta=0.7)
        found = next(steps)[0] / (sigmas[i + 1] ** 2 + 1).sqrt()
        wanted = reference.step(eps, int(reference.timesteps[i]), x, eta=0.7, variance_noise=extra).prev_sample
        assert relative_error(found, wanted) <= 1e-6


@pytest.mark.slow
@pytest.mark.xdist_group("full width")  # one at a time: up to 11 GB
@torch.no_grad()
def test_full_width_stable_diffusion_15(tmp_path):
    """The published architecture at its real size: 1.07 G parameters, float32, 32x32 latents."""
    path = write_checkpoint(tmp_path / "sd15.safetensors", FULL)
    pipe = minisd.load(path, device="cpu", dtype="float32")
    oracle = Oracle(path, FULL)
    path.unlink()

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    x, t, context = noise(1, 4, 32, 32), torch.tensor([601.0]), noise(1, 77, 768)
    errors = {"UNet": relative_error(pipe.unet(x, t, context), oracle.unet(x, t, context).sample)}
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    encoder = pipe.text_encoders[0]
    errors["CLIP"] = relative_error(encoder.final_norm(encoder.hidden_states(ids)[-1]), oracle.text(ids).last_hidden_state)
    errors["VAE decode"] = relative_error(pipe.vae.decode(x), oracle.vae.decode(x).sample)
    image = noise(1, 3, 256, 256).clamp(-1, 1)
    errors["VAE encode"] = relative_error(pipe.vae.encode(image)[0], oracle.vae.encode(image).latent_dist.mean)
    assert max(errors.values()) <= 1e-5, errors
    for sampler, spacing in (("ddim", "leading"), ("euler", "linspace")):
        found, wanted = both(pipe, oracle, tmp_path / "tokenizer", sampler, spacing, 10, side=32)
        errors[sampler] = relative_error(found.latents, wanted)
    print(errors)
    assert max(errors["ddim"], errors["euler"]) <= 1e-4, errors

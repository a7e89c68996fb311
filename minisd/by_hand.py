"""The whole of it on one screen: from a prompt to a picture, without any of what makes it comfortable.

The map of the house.  Every name leads to a file of the reading order, and pipeline.py is the same with all that one may ask for.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from minisd.diffusion.schedule import scaled_linear
from minisd.files.checkpoint import open_checkpoint
from minisd.files.model import load_model
from minisd.library.places import tiny_checkpoint
from minisd.text.tokenizer import tokenize


@torch.no_grad()
def draw(prompt: str, path: Path | None = None, steps: int = 20, guidance: float | None = None, seed: int = 0) -> Image.Image:
    """A picture by a checkpoint of SD 1.x or 2.x that predicts the noise, float32 on the CPU."""
    model, found = load_model(open_checkpoint(path or tiny_checkpoint()), torch.device("cpu"), torch.float32)
    (encoder,), schedule, width = model.text_encoders, scaled_linear(), found.size[0] // model.vae.downscale

    ids = torch.tensor(tokenize(["", prompt]))  # (2, 77): no words, and the prompt
    context = encoder.final_norm(encoder.hidden_states(ids)[-1 - found.family.towers[0].skip])  # (2, 77, D)

    sigmas = torch.cat([schedule.sigma(torch.linspace(999, 0, steps)), torch.zeros(1)])  # (steps + 1,), falling
    noise = torch.randn(1, model.vae.latent_channels, width, width, generator=torch.Generator().manual_seed(seed))
    x = noise * sigmas[0].float()  # (1, 4, h, w)

    for sigma, following in pairwise(sigmas):
        scaled = (x / (sigma**2 + 1).sqrt()).float().expand(2, -1, -1, -1)  # of unit variance, as in training
        t = schedule.timestep(sigma).float().expand(2)
        without, with_prompt = model.unet(scaled, t, context).chunk(2)  # two predictions of the noise
        eps = without + (guidance or found.guidance) * (with_prompt - without)  # classifier-free guidance
        x = (x + (following - sigma) * eps).float()  # Euler's step on dx / dsigma = eps

    pixels = model.vae.decode(x / found.latent_scale)[0]  # (3, H, W), about [-1, 1]
    return Image.fromarray(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    draw("a red circle on a blue background", seed=1).save("by-hand.png")

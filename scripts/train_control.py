"""Trains the ControlNet in weights/: an outline comes in, and the tiny checkpoint draws within it what the prompt says.

    python scripts/train_control.py --out weights          (2 CPU cores: about half an hour)

A copy of the tiny UNet's encoder that sees an outline beside the latents (Zhang et al. 2023, arXiv 2302.05543).  What it adds
passes convolutions that begin as zeros, so training begins with the checkpoint as it is.  Needs matplotlib for the curve.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_world import Scene, mask_of, outline_of, painted, training_scene
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_tiny import SEED, Training, encode_all, noisy, plot_losses, timesteps, wordings

import minisd
from minisd.diffusion.schedule import scaled_linear
from minisd.models.control import ControlNet
from minisd.models.shapes import Shapes
from minisd.models.vae import AutoencoderKL
from minisd.text.tokenizer import tokenize
from minisd.workbench import blueprint

PICTURES = 16_000
HINT = (16, 32, 96)  # widths of the hint's convolutions; two halvings, as the tiny VAE has
UNSAID = 0.3  # of the prompts are empty, so that the outline counts without words


def examples(count: int, rng: random.Random) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Pictures (N, 3, 64, 64) and their outlines (N, 64, 64), uint8, with captions."""
    pictures, outlines, captions = [], [], []
    for _ in range(count):
        scene: Scene = training_scene(rng)
        mask = mask_of(scene, rng)
        pictures.append(np.asarray(painted(mask, scene)))
        outlines.append(np.asarray(outline_of(mask, inside=rng.random() < 0.5)))
        captions.append(wordings(scene, rng))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(outlines)), captions


def beginning(pipe: minisd.Pipeline) -> ControlNet:
    """The UNet's own weights where it has them, zeros where the ControlNet ends, random ones where it sees the hint."""
    unet = pipe.unet.state_dict()
    control = ControlNet(blueprint.controlnet(Shapes({name: tuple(value.shape) for name, value in unet.items()}), HINT))
    for name, value in control.named_parameters():
        if name in unet:
            value.data.copy_(unet[name])
        elif name.startswith(("zero_convs", "middle_block_out", f"input_hint_block.{len(control.input_hint_block) - 1}")):
            value.data.zero_()
    return control


def train(
    pipe: minisd.Pipeline, control: ControlNet, latents: Tensor, outlines: Tensor, captions: list[list[str]], steps: int,
    rate: float, batch: int,
) -> list[float]:  # fmt: skip
    """Predicts the noise, as train_tiny.train_unet does; the checkpoint itself stays as it is."""
    pipe.model.requires_grad_(False)
    text, training = pipe.text_encoders[0], Training(control, steps, rate)
    alphas = scaled_linear().alphas_cumprod.float()
    for _ in range(steps):
        chosen = torch.randint(len(latents), (batch,))
        prompts = [random.choice(captions[i]) if random.random() > UNSAID else "" for i in chosen.tolist()]
        hint = outlines[chosen][:, None].expand(-1, 3, -1, -1).float() / 255
        t, weight = timesteps(alphas, batch, most=20)
        x, noise = noisy(latents[chosen], alphas[t])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                context = text.final_norm(text.hidden_states(torch.tensor(tokenize(prompts)))[-1])
            residuals = control.residuals(x, hint, t, context)
            out = pipe.unet(x, t, context, residuals=residuals)
        training.step((weight * (out.float() - noise).square()).mean())
    return training.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder for the ControlNet and its curve")
    parser.add_argument("-m", "--model", help="checkpoint that it is for (default: the one in the box)")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    random.seed(SEED)
    torch.manual_seed(SEED)
    pipe = minisd.load(args.model, device="cpu", dtype="float32", fast=False)
    pictures, outlines, captions = examples(PICTURES, random.Random(SEED))
    assert isinstance(pipe.vae, AutoencoderKL)
    control = beginning(pipe)
    losses = train(pipe, control, encode_all(pipe.vae, pictures, "cpu"), outlines, captions, args.steps, 5e-4, 32)
    metadata = {"format": "pt", "modelspec.title": "tiny outline", "modelspec.license": "MIT"}
    weights = {f"control_model.{name}": value.half().contiguous() for name, value in control.state_dict().items()}
    path = args.out / "tiny-outline.safetensors"
    save_file(weights, path, metadata)
    path.chmod(0o644)
    plot_losses(args.out / "tiny-outline-training.png", {"ControlNet": losses})


if __name__ == "__main__":
    main()

"""Trains a LoRA: another style on the tiny checkpoint, with all that it knows.

    python scripts/train_lora.py --pictures 8000 --steps 900      (a quarter of an hour of one CPU core)

The checkpoint's decoder must know the style: `train_tiny.py --start tiny.safetensors` trains it on all of them.
Low-rank changes of the UNet's matrices and convolutions (Hu et al. 2021, arXiv 2106.09685) learn pictures of the style; the
checkpoint itself stays as it is.  They begin at zero: training begins with its own pictures.  Needs matplotlib for the curve.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from tiny_world import STYLES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_tiny import PICTURES, SEED, Training, data_set, encode_all, noisy, plot_losses, quick, timesteps

import minisd
from minisd.addons.lora_names import targets, written_names
from minisd.diffusion.schedule import scaled_linear
from minisd.models.family import SD1, UNET
from minisd.models.shapes import Shapes
from minisd.models.vae import AutoencoderKL
from minisd.text.tokenizer import tokenize
from minisd.workbench.loras.extracting import Tensors, about, pair, write


class LowRank(nn.Module):
    """up(down(x)) beside a layer, in its shape."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            size, stride, padding = layer.kernel_size, layer.stride, layer.padding
            self.down: nn.Module = nn.Conv2d(layer.in_channels, rank, size, stride, padding, bias=False)  # type: ignore[arg-type]
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a forward hook."""
        return output + self.up(self.down(inputs[0]))


def beside(pipe: minisd.Pipeline, rank: int) -> dict[str, LowRank]:
    """By the names of kohya's files: one beside every matrix and convolution of the UNet's blocks."""
    shapes = Shapes({key: tuple(value.shape) for key, value in pipe.model.state_dict().items()})
    found: dict[str, LowRank] = {}
    for target, name in written_names(targets(shapes, SD1), SD1, "kohya").items():
        inside = "_blocks" in target.key or "middle_block" in target.key
        if target.key.startswith(UNET) and inside and len(shapes[target.key]) > 1:
            layer: Any = pipe.model.get_submodule(target.key.removesuffix(".weight"))
            found[name] = LowRank(layer, rank)
            layer.register_forward_hook(found[name])
    return found


def train(
    pipe: minisd.Pipeline, learnt: nn.Module, latents: Tensor, captions: list[list[str]], steps: int, rate: float, batch: int
) -> list[float]:
    """Predicts the noise, as train_tiny.train_unet does."""
    text, training, device = pipe.text_encoders[0], Training(learnt, steps, rate), str(pipe.device)
    alphas = scaled_linear().alphas_cumprod.float().to(device)
    for i in range(steps):
        chosen = torch.randint(len(latents), (batch,))
        prompts = [random.choice(captions[j]) if random.random() > 0.1 else "" for j in chosen.tolist()]
        t, weight = timesteps(alphas, batch, most=20 if i < steps / 2 else 8)
        x, noise = noisy(latents[chosen.to(device)], alphas[t])
        with quick(device), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                context = text.final_norm(text.hidden_states(torch.tensor(tokenize(prompts), device=device))[-1])
            out = pipe.unet(x, t, context)
        training.step((weight * (out.float() - noise).square()).mean())
    return training.losses


def tensors_of(learnt: dict[str, LowRank]) -> Tensors:
    """As a file has them, with alpha as the rank."""
    found: Tensors = {}
    for name, each in learnt.items():
        weights = dict(each.named_parameters())
        found |= pair(name, weights["up.weight"].detach(), weights["down.weight"].detach(), "kohya")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder for the LoRA and its curve")
    parser.add_argument("-m", "--model", help="checkpoint that it is for (default: the one in the box)")
    parser.add_argument("--name", default="tiny-clay", help="name of the file")
    parser.add_argument("--style", choices=list(STYLES), default="lit", help="how the pictures are drawn")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    random.seed(SEED)
    torch.manual_seed(SEED)
    pipe = minisd.load(args.model, dtype="float32", fast=False)
    pipe.model.requires_grad_(False)
    assert isinstance(pipe.vae, AutoencoderKL)
    pictures, captions = data_set(args.pictures, args.style, random.Random(SEED))
    latents = encode_all(pipe.vae, pictures, str(pipe.device))
    learnt = beside(pipe, args.rank)
    losses = train(pipe, nn.ModuleDict(learnt).to(pipe.device), latents, captions, args.steps, 2e-3, 32)
    tensors = tensors_of(learnt)
    told = {"modelspec.license": "MIT", "ss_sd_model_name": pipe.checkpoint.path.name, "ss_output_name": args.name}
    path = args.out / f"{args.name}.safetensors"
    write(path, tensors, torch.float16, about(SD1, tensors) | told)
    path.chmod(0o644)
    plot_losses(args.out / f"{args.name}-training.png", {"LoRA": losses})


if __name__ == "__main__":
    main()

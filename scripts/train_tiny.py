"""Trains the tiny checkpoint in weights/ from nothing: pictures that it draws itself, minisd's own modules, plain PyTorch.

    python scripts/train_tiny.py --out weights        (2 CPU cores: less than 2 hours; not tried on a GPU yet)

In order: draw a data set; train the autoencoder on it; turn the pictures into latents; train text encoder and UNet
together to predict the noise in noisy latents; write everything as one raw SD 1.x checkpoint, with curves and samples.
Needs matplotlib for the curves.  The seed is fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from judge_tiny import examine
from safetensors.torch import load_file, save_file
from tiny_world import STYLES, Scene, caption, draw, half_said, training_scene
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import minisd
from minisd.batch.scores.world import SIZE
from minisd.diffusion.schedule import scaled_linear
from minisd.models.clip import TextEncoder, text_encoder
from minisd.models.family import SD1
from minisd.models.shapes import Shapes, below
from minisd.models.unet import UNet
from minisd.models.vae import AutoencoderKL
from minisd.system.device import cpu_computes_bfloat16
from minisd.text.tokenizer import tokenize
from minisd.workbench import blueprint

SEED = 0
PICTURES = 32_000
LATENT_SCALE = 0.18215  # SD 1.x multiplies latents by this to bring them to unit variance; ours are made to fit


def tiny() -> Shapes:
    """4 x smaller latents, 16 x 16 of them; attention where they are 8 x 8; a text encoder 64 wide over the real vocabulary."""
    return blueprint.assemble(
        SD1,
        blueprint.unet(64, (1, 2), blocks=2, depths=(0, 1), context=64),
        blueprint.vae((32, 64, 128), (32, 64, 128), blocks=(1, 2)),
        blueprint.clip_text(64, 4),
    )


def data_set(count: int, style: str, rng: random.Random) -> tuple[Tensor, list[list[str]]]:
    """Pictures (count, 3, 64, 64) as uint8, and six captions for each, two of which leave things unsaid."""
    scenes = [training_scene(rng) for _ in range(count)]
    pictures = np.stack([np.asarray(draw(scene, rng, style)) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), [wordings(scene, rng) for scene in scenes]


def wordings(scene: Scene, rng: random.Random) -> list[str]:
    return [caption(scene, rng) for _ in range(4)] + [half_said(scene, rng) for _ in range(2)]


def to_range(pictures: Tensor, device: str) -> Tensor:
    return pictures.to(device).float() / 127.5 - 1


class Training:
    """What both trainings share: the optimiser, a learning rate that warms up and falls to zero, and the loss so far."""

    def __init__(self, model: nn.Module, steps: int, rate: float, done: int = 0) -> None:
        self.model, self.steps, self.rate, self.done = model, steps, rate, done
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.losses: list[float] = []
        self.start = time.monotonic()

    def step(self, loss: Tensor) -> None:
        i = self.done + len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1, (len(self.losses) + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / self.steps))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        if i % 50 == 0:
            mean = sum(self.losses[-50:]) / len(self.losses[-50:])
            print(f"step {i}/{self.steps}  loss {mean:.4f}  {time.monotonic() - self.start:.0f} s", flush=True)


def train_vae(vae: AutoencoderKL, pictures: Tensor, steps: int, rate: float, batch: int, device: str) -> list[float]:
    """Reconstruction (absolute and squared error) with a light pull of the latents towards a unit normal.

    An encoder that takes no gradients stays as it is, and so do its latents: a UNet which knows them stays useful.
    """
    training = Training(vae, steps, rate)
    learns = vae.encoder.conv_in.weight.requires_grad
    for _ in range(steps):
        x = to_range(pictures[torch.randint(len(pictures), (batch,))], device)
        with quick(device), sdpa_kernel(SDPBackend.MATH):
            with torch.set_grad_enabled(learns):
                mean, logvar = vae.encode(x)
            latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            out = vae.decode(latents)
        pull = 1e-3 * kl(mean, logvar) if learns else 0
        training.step((out - x).abs().mean() + (out - x).square().mean() + pull)
    return training.losses


def quick(device: str) -> torch.autocast:
    """bfloat16 where it is computed; on a CPU without its instructions float32 is many times as fast."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu_computes_bfloat16())


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """From a unit normal (Kingma and Welling 2013, arXiv 1312.6114, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()


@torch.no_grad()
def begin_as(vae: AutoencoderKL, like: AutoencoderKL) -> None:
    """Takes what has a place in both; a block that the other has not begins as the identity.  The encoder stays as it is."""
    theirs = like.state_dict()
    for name, value in vae.state_dict().items():
        if name in theirs and theirs[name].shape == value.shape:
            value.copy_(theirs[name])
        elif name not in theirs and name.endswith(("conv2.weight", "conv2.bias")):
            value.zero_()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def autoencoder_of(path: Path) -> AutoencoderKL:
    """Of a checkpoint, in float32."""
    weights = part(path, "first_stage_model.")
    vae = AutoencoderKL(Shapes({name: tuple(value.shape) for name, value in weights.items()}))
    vae.load_state_dict(weights)
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor, device: str) -> None:
    """Folds into the two 1x1 convolutions that every latent channel has mean 0 and standard deviation 1 / 0.18215."""
    mean = torch.cat([vae.encode(to_range(part, device))[0] for part in pictures[:2048].split(256)])
    centre, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    gain = 1 / (LATENT_SCALE * spread)
    channels = len(gain)
    quant, back = vae.quant_conv, vae.post_quant_conv
    assert quant.bias is not None
    assert back.bias is not None
    back.bias += back.weight[:, :, 0, 0] @ centre
    back.weight /= gain[None, :, None, None]
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - centre) * gain
    quant.bias[channels:] += 2 * gain.log()  # the second half is the logarithm of the variance


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Tensor, device: str) -> Tensor:
    """Means of the latents of all pictures, at unit variance: (N, 4, 16, 16)."""
    parts = []
    for part in pictures.split(256):
        with quick(device):
            parts.append(vae.encode(to_range(part, device))[0].float() * LATENT_SCALE)
    return torch.cat(parts)


def begin_as_identity(unet: UNet) -> None:
    """Zeroes the last layer of every block and of the network: such a network trains faster."""
    for name, parameter in unet.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "out.2.weight")):
            nn.init.zeros_(parameter)


def timesteps(alphas: Tensor, batch: int, most: float) -> tuple[Tensor, Tensor]:
    """Half of them drawn evenly, half as often as they weigh; and what is left of the weights then (B, 1, 1, 1).

    A timestep weighs 1 + sigma^2 = 1 / alpha, at most `most`.
    """
    weight = (1 / alphas).clamp(max=most)
    share = 0.5 + 0.5 * weight / weight.mean()
    t = torch.multinomial(share, batch, replacement=True)
    return t, (weight / share)[t][:, None, None, None]


def noisy(latents: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) at alphas (B,) of the schedule, and the noise in them (Ho et al. 2020, eq. 4)."""
    noise, alpha = torch.randn_like(latents), alpha[:, None, None, None]
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, noise


def train_unet(
    unet: UNet,
    text: TextEncoder,
    latents: Tensor,
    captions: list[list[str]],
    steps: int,
    rate: float,
    done: int,
    batch: int,
    device: str,
) -> Iterator[tuple[list[float], dict[str, Tensor]]]:
    """Predicts the noise (Ho et al. 2020, eq. 14); one prompt in ten is left out, for classifier-free guidance.

    The squared error is weighted with 1 + sigma^2, which makes it that of v-prediction (Salimans and Ho 2022, arXiv 2202.00512).
    Unweighted, 1 of 20 backgrounds was right after 1,000 steps; weighted, 14 of 20 after 1,500.  Likely why: in pictures so
    plain the prompt decides the colours at high noise only, which hardly counts in the unweighted error; lower down they can be
    read off the noisy latents.  The weight is capped, lower in the second half, where the details follow.  Timesteps that weigh
    much are drawn more often: with places met 21 times of 40 before, it was 37 of 40 after 1,000 steps more.

    Yields now and then the losses and an exponential moving average of the weights, which draws better than the last ones.
    """
    both = nn.ModuleDict({"unet": unet, "text": text})
    training = Training(both, steps, rate, done)
    average = {name: value.detach().clone() for name, value in both.state_dict().items()}
    alphas = scaled_linear().alphas_cumprod.float().to(device)
    for i in range(done, steps):
        chosen = torch.randint(len(latents), (batch,))
        prompts = [random.choice(captions[j]) if random.random() > 0.1 else "" for j in chosen.tolist()]
        ids = torch.tensor(tokenize(prompts), device=device)
        t, weight = timesteps(alphas, batch, most=20 if i < steps / 2 else 8)
        x, noise = noisy(latents[chosen.to(device)], alphas[t])
        with quick(device), sdpa_kernel(SDPBackend.MATH):
            out = unet(x, t, text.final_norm(text.hidden_states(ids)[-1]))
        training.step((weight * (out.float() - noise).square()).mean())
        keep = min(0.999, (i - done + 1) / (i - done + 10))
        for name, value in both.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        if (i + 1) % 500 == 0 or i + 1 == steps:
            yield training.losses, average


def save(path: Path, parts: dict[str, dict[str, Tensor]], style: str) -> None:
    """One raw SD 1.x file in half precision, keys in alphabetical order as in the published ones."""
    weights = {f"{name}.{key}": value.half().cpu().contiguous() for name, part in parts.items() for key, value in part.items()}
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": path.stem.replace("-", " "),
        "modelspec.description": f"One coloured shape on a background, {style}; trained by scripts/train_tiny.py.",
        "modelspec.license": "MIT",
        "modelspec.resolution": f"{SIZE}x{SIZE}",
        "modelspec.prediction_type": "epsilon",
        "minisd.guidance_scale": "6",
    }
    save_file(dict(sorted(weights.items())), path, metadata)
    path.chmod(0o644)


def part(path: Path, name: str) -> dict[str, Tensor]:
    """The weights of a checkpoint that stand below a name, in float32."""
    return {key.removeprefix(name): value.float() for key, value in load_file(path).items() if key.startswith(name)}


def plot_losses(path: Path, curves: dict[str, list[float]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.5), constrained_layout=True, squeeze=False)
    for axis, (name, losses) in zip(axes[0], curves.items(), strict=True):
        smooth = np.convolve(losses, np.ones(25) / 25, mode="valid")
        axis.plot(losses, alpha=0.25, linewidth=0.7)
        axis.plot(np.arange(len(smooth)) + 12, smooth)
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("weights"), help="folder for the checkpoint, its training curves and samples"
    )
    parser.add_argument("--name", default="tiny", help="name of the checkpoint's file")
    parser.add_argument("--style", choices=list(STYLES), default="flat", help="how the pictures are drawn")
    parser.add_argument(
        "--start",
        type=Path,
        help="fine-tune this checkpoint, at half of the learning rates; of its autoencoder the decoder alone",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-steps", type=int, default=2200)
    parser.add_argument("--unet-steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64, help="latents a step, of UNet and text encoder")
    parser.add_argument("--rate", type=float, default=1e-3, help="their learning rate, before --start halves it")
    parser.add_argument("--vae", type=Path, help="take the autoencoder from this checkpoint instead of training it")
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint, of --done steps, instead of from nothing")
    parser.add_argument("--done", type=int, default=0, help="UNet steps that the checkpoint to resume has behind it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(SEED)
    torch.manual_seed(SEED)

    shapes, share = tiny(), 0.5 if args.start else 1.0
    curves = {}
    vae = AutoencoderKL(below(shapes, "first_stage_model")).to(args.device)
    if args.vae:
        vae.load_state_dict(part(args.vae, "first_stage_model."))
    else:
        every = torch.cat([data_set(PICTURES // len(STYLES), style, random.Random(SEED))[0] for style in STYLES])
        like = autoencoder_of(args.start).to(args.device) if args.start else None
        if like:
            begin_as(vae, like)
        curves["autoencoder"] = train_vae(vae, every, args.vae_steps, 2e-3 * share, 16, args.device)
        if not like:
            normalise_latents(vae, every, args.device)
        save(args.out / f"{args.name}-vae.safetensors", {"first_stage_model": vae.state_dict()}, args.style)
    pictures, captions = data_set(PICTURES, args.style, random.Random(SEED))
    latents = encode_all(vae, pictures, args.device)

    random.seed(SEED + 1)  # from here on the same, whether the autoencoder was trained or taken from a file
    torch.manual_seed(SEED + 1)
    unet = UNet(below(shapes, "model.diffusion_model")).to(args.device)
    text = text_encoder(below(shapes, "cond_stage_model.transformer")).to(args.device)
    if args.resume or args.start:
        for name, module in (("model.diffusion_model.", unet), ("cond_stage_model.transformer.", text)):
            module.load_state_dict(part(args.resume or args.start, name))
    else:
        begin_as_identity(unet)
    settings = (args.unet_steps, args.rate * share, args.done, args.batch, args.device)
    for losses, average in train_unet(unet, text, latents, captions, *settings):
        parts = {"model.diffusion_model": "unet.", "cond_stage_model.transformer": "text."}
        weights = {name: {k.removeprefix(p): v for k, v in average.items() if k.startswith(p)} for name, p in parts.items()}
        save(args.out / f"{args.name}.safetensors", weights | {"first_stage_model": vae.state_dict()}, args.style)
        curves["UNet and text encoder"] = losses
        (args.out / f"{args.name}-training.json").write_text(json.dumps(curves))
    plot_losses(args.out / f"{args.name}-training.png", curves)
    sheet, right = examine(minisd.load(args.out / f"{args.name}.safetensors"), 40)
    sheet.save(args.out / f"{args.name}-samples.png")
    print(f"{right['all']} of 40 held-back prompts right; see {args.out / f'{args.name}-samples.png'}")


if __name__ == "__main__":
    main()

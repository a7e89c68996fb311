"""SD 1.5's ControlNet at its real size against diffusers: what it adds, and five steps from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FULL, Oracle, relative_error, write_checkpoint
from PIL import Image
from safetensors.torch import save_file

import minisd


def control_of(folder: Path):
    """The published architecture (0.36 G parameters) with random weights in float32: ours, and diffusers'."""
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    theirs = ControlNetModel(cross_attention_dim=768).eval()
    for name, weight in theirs.named_parameters():
        if "controlnet_" in name:  # which begin as zeros
            torch.nn.init.normal_(weight, std=0.02)
    save_file(theirs.state_dict(), folder / "control.safetensors")
    return minisd.load_control(folder / "control.safetensors"), theirs


@pytest.mark.slow
@torch.no_grad()
def test_residuals_at_full_width(tmp_path):
    control, theirs = control_of(tmp_path)
    x, context, t, picture = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768), torch.tensor([601.0]), torch.rand(1, 3, 256, 256)
    down, middle = theirs(x, t, context, picture, return_dict=False)
    pairs = zip(control.residuals(x, picture, t, context), (*down, middle), strict=True)
    assert max(relative_error(found, wanted) for found, wanted in pairs) <= 1e-5


@pytest.mark.slow
@pytest.mark.seldom  # two minutes and a half
@pytest.mark.xdist_group("full width")  # one at a time: up to 11 GB
@torch.no_grad()
def test_five_steps_at_full_width(tmp_path):
    from diffusers import StableDiffusionControlNetPipeline

    control, theirs = control_of(tmp_path)
    path = write_checkpoint(tmp_path / "sd15.safetensors", FULL)
    pipe, oracle = minisd.load(path, device="cpu", dtype="float32"), Oracle(path, FULL)
    path.unlink()
    hint = Image.fromarray(np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    common = {
        "latents": torch.randn(1, 4, 16, 16),
        "width": 128,
        "height": 128,
        "guidance_scale": 7.5,
        "negative_prompt": "blurry",
    }
    prompt = "a photograph of an astronaut riding a horse"
    found = pipe(prompt, steps=5, controls=[minisd.Control(control, hint, 0.8)], **common).latents
    bare = oracle.pipeline("euler", "linspace", tmp_path / "tokenizer")
    reference = StableDiffusionControlNetPipeline(**bare.components, controlnet=theirs, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    wanted = reference(
        prompt, image=hint, num_inference_steps=5, output_type="latent", controlnet_conditioning_scale=0.8, **common
    ).images
    error, change = relative_error(found, wanted), relative_error(pipe(prompt, steps=5, **common).latents, found)
    print(f"5 steps: relative L2 error {error:.1e}; the ControlNet changes the latents by {change:.1e}")
    assert error <= 1e-4
    assert change > 1e-2

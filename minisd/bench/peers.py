"""diffusers with the same random weights, as its users run it: eager, in a CUDA graph, and compiled."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .networks import Published, StepInput
from .report import Report
from .timing import Run, captured

INSTALLED = importlib.util.find_spec("diffusers") is not None
KINDS = ("eager", "graph", "compiled")

# The configurations that diffusers' repositories of the published models carry, where they differ from its defaults.
LINEAR = {"use_linear_projection": True}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "SD 2.1-768": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 96} | LINEAR,
    "SDXL": {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "sample_size": 128} | LINEAR | SDXL,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


def prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A copy of its weights, in PyTorch's own memory order."""
    return {f"{prefix}.{key}": value.clone(memory_format=torch.contiguous_format) for key, value in module.state_dict().items()}


def unet(model: Published, ours: nn.Module) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        theirs = UNet2DConditionModel(**UNETS[model.name])
    weights = convert_ldm_unet_checkpoint(prefixed(ours, "model.diffusion_model"), dict(theirs.config))
    theirs.load_state_dict(weights, assign=True)
    return theirs.requires_grad_(False).eval()


def unet_call(theirs: Any, given: StepInput) -> Tensor:
    more = {"text_embeds": given.pooled, "time_ids": given.sizes} if given.pooled is not None else None
    return theirs(given.x, given.t, given.context, added_cond_kwargs=more, return_dict=False)[0]


def vae(ours: nn.Module) -> nn.Module:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with torch.device("meta"):
        theirs = AutoencoderKL(**VAE)
    theirs.load_state_dict(convert_ldm_vae_checkpoint(prefixed(ours, "first_stage_model"), dict(theirs.config)), assign=True)
    return theirs.requires_grad_(False).eval()


def vae_call(theirs: Any, latents: Tensor) -> Tensor:
    return theirs.decode(latents, return_dict=False)[0]


def compiled(theirs: Any, call: Callable[..., Tensor], *given: Any) -> Run:
    """At its best: channels-last, one matrix for q, k and v, the whole network in one graph (diffusers' own advice)."""
    theirs = theirs.to(memory_format=torch.channels_last)
    if hasattr(theirs, "fuse_qkv_projections"):
        theirs.fuse_qkv_projections()
    fast = torch.compile(call, mode="reduce-overhead", fullgraph=True)

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(theirs, *given)

    return run


def bench(
    report: Report, kinds: list[str], make: Callable[[], Any], call: Callable[..., Tensor], given: Any, ours: float,
    wanted: Tensor,
) -> None:  # fmt: skip
    """A row for each kind of peer: eager, graph (both memory layouts), compiled.

    make: builds the network; given: what it is called with; ours: seconds, wanted: result of minisd's own.
    """
    clock = report.clock
    kinds = [kind for kind in kinds if kind in KINDS]
    if not INSTALLED or not kinds:
        report.note("no peers: diffusers is not installed" if kinds else "no peers asked for")
        return
    theirs = make()
    plain = partial(call, theirs, given)

    def row(label: str, prepare: Callable[[], Run], measure: Callable[[Run], float]) -> None:
        with report.attempt(label):
            start = time.perf_counter()
            run = prepare()
            result = run().clone()
            clock.synchronise()
            first = time.perf_counter() - start
            error = float((result.float() - wanted.float()).norm() / wanted.float().norm())
            seconds = measure(run)
            report.add(label, time=seconds, first=first, difference=error, to_ours=seconds / ours)

    if "eager" in kinds:
        row("diffusers, eager", lambda: plain, clock.back_to_back)
    if "graph" in kinds and clock.is_cuda:
        row("diffusers in a CUDA graph", lambda: captured(plain), clock.replayed)
        theirs.to(memory_format=torch.channels_last)
        row("diffusers in a CUDA graph, channels-last", lambda: captured(plain), clock.replayed)
    if "compiled" in kinds and clock.is_cuda:
        row("diffusers, torch.compile reduce-overhead", lambda: compiled(theirs, call, given), clock.back_to_back)


def write_configs(path: Path, folder: Path) -> None:
    """What `from_single_file(config=…)` wants: the small files of a diffusers folder, without weights."""
    from ..files.checkpoint import open_checkpoint
    from ..files.recognition import recognise
    from ..workbench.folders.configs import small_files

    checkpoint = open_checkpoint(path)
    for name, text in small_files(checkpoint, recognise(checkpoint)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

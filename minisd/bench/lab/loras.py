"""How long it takes to put a LoRA on, to change its strength and to take it off, beside diffusers with peft in the same run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...addons.lora_names import targets, written_names
from ...addons.stack import Stack
from ...addons.wanted import Lora, Wanted
from ...files.model import StableDiffusion
from ...models.family import SD1, UNET
from .. import peers
from ..networks import MODELS, random_module
from ..report import Report

RANK = 32
SEEN = f"{UNET}.middle_block.1.transformer_blocks.0.attn1.to_q.weight"  # where the results are compared
THEIRS = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def write_lora(path: Path) -> int:
    """A LoRA of every matrix and convolution of SD 1.5 that kohya's scripts train, by their names; returns how many."""
    shapes, generator = MODELS["sd15"].shapes(), torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for target, name in written_names(targets(shapes, SD1), SD1, "kohya").items():
        shape = shapes[target.key]
        if len(shape) > 1 and not any(part in name for part in ("embed", "conv_in", "conv_out")):
            tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator) * 0.02
            tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, *shape[1:], generator=generator) * 0.02
            tensors[f"{name}.alpha"] = torch.tensor(RANK / 2)
    save_file(tensors, path)
    return len(tensors) // 3


def bench(report: Report, args: Any) -> None:
    """The whole of SD 1.5's UNet and text encoder, random weights, in the dtype that this machine draws in."""
    clock = report.clock
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        count = write_lora(path)
        report.table(
            f"a LoRA of rank {RANK} on {count} layers of SD 1.5, {clock.dtype}".replace("torch.", ""),
            ("time s", "to ours", "difference"),
        )
        model = random_module(lambda: StableDiffusion(MODELS["sd15"].shapes(), SD1), clock.device, clock.dtype)
        ours, result = of_minisd(report, model, path, args.repeats)
        if peers.INSTALLED and args.peers and ours:
            with report.attempt("diffusers"):
                of_diffusers(report, model, path, ours, result)


def timed(report: Report, run: Callable[[], object]) -> float:
    report.clock.synchronise()
    start = time.perf_counter()
    run()
    report.clock.synchronise()
    return time.perf_counter() - start


def of_minisd(report: Report, model: StableDiffusion, path: Path, repeats: int) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds by what was done, and the weight that came out."""
    taken: dict[str, list[float]] = {"apply": [], "change": [], "remove": []}
    result = torch.empty(0)
    for _ in range(min(repeats, 3)):
        stack = Stack(model, SD1)  # which knows no file and no weight yet
        taken["apply"].append(timed(report, lambda: stack.put_on(Wanted((Lora(path),)))))  # noqa: B023
        result = model.state_dict()[SEEN].clone()
        for strength in (0.5, 0.7):
            taken["change"].append(timed(report, lambda: stack.put_on(Wanted((Lora(path, strength),)))))  # noqa: B023
        taken["remove"].append(timed(report, lambda: stack.put_on(Wanted())))  # noqa: B023
    found = {what: statistics.median(times) for what, times in taken.items()}
    names = {"apply": "from the file into the weights", "change": "another strength", "remove": "off again"}
    for what, seconds in found.items():
        report.add(f"minisd, {names[what]}", time=seconds, to_ours=1.0)
    return found, result


def of_diffusers(report: Report, model: StableDiffusion, path: Path, ours: dict[str, float], result: torch.Tensor) -> None:
    """load_lora_weights and fuse_lora, with peft, as its documentation has it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    unet: Any = peers.unet(MODELS["sd15"], model.unet)
    pipe: Any = StableDiffusionPipeline(
        vae=None, text_encoder=text.to(report.clock.device, report.clock.dtype), tokenizer=None, unet=unet,
        scheduler=EulerDiscreteScheduler(steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip

    def put_on() -> None:
        pipe.load_lora_weights(str(path))
        pipe.fuse_lora()

    def change() -> None:
        pipe.unfuse_lora()
        pipe.fuse_lora(lora_scale=0.5)

    seconds = timed(report, put_on)
    weight = {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items()}[THEIRS]
    apart = float((weight.float() - result.float()).norm() / result.float().norm())
    report.add("diffusers, load_lora_weights, fuse_lora", time=seconds, to_ours=seconds / ours["apply"], difference=apart)
    seconds = timed(report, change)
    report.add("diffusers, unfuse_lora, fuse_lora", time=seconds, to_ours=seconds / ours["change"])
    seconds = timed(report, pipe.unload_lora_weights)
    report.add("diffusers, unload_lora_weights", time=seconds, to_ours=seconds / ours["remove"])

"""The figures of the README, each against a peer in the same run.  Machines are noisy: read the ratios.

    python scripts/bench.py load      opening an fp16 SD 1.5 file (2.1 GB, random weights) against diffusers' from_single_file
    python scripts/bench.py unet      one SD 1.5 UNet step (batch 2, 64x64 latents) against diffusers; bfloat16 against float32
    python scripts/bench.py tiles     decoding 1024x1024 pixels in bands of rows against whole: difference, memory, time
    python scripts/bench.py cli       the command line on the tiny checkpoint; --help and inspect

No download: the weights are random, diffusers' configuration files are written on the spot.  Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def write_sd15(path: Path) -> None:
    """SD 1.5 with random weights in half precision: 2.1 GB."""
    import torch
    from safetensors.torch import save_file

    from minisd.blueprint import random_weights, sd15

    if not path.exists():
        save_file(random_weights(sd15(), dtype=torch.float16), path, {"format": "pt"})


def write_configs(folder: Path) -> None:
    """What `from_single_file(config=…)` wants: the configuration of SD 1.5 as a diffusers folder, without weights."""
    from minisd.tokenizer import bpe, merges_text

    def write(name: str, content: object) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write(
        "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.35.0",
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
        }
        | parts,
    )
    unet: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64, "layers_per_block": 2}
    unet |= {"block_out_channels": [320, 640, 1280, 1280], "in_channels": 4, "out_channels": 4}
    unet |= {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    write("unet/config.json", {"_class_name": "UNet2DConditionModel"} | unet)
    vae: dict[str, Any] = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae |= {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512}
    write("vae/config.json", {"_class_name": "AutoencoderKL"} | vae)
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    }
    write(
        "text_encoder/config.json",
        {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408} | text,
    )
    write(
        "scheduler/scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "clip_sample": False,
            "set_alpha_to_one": False,
        },
    )
    write("tokenizer/vocab.json", bpe().get_vocab())
    write("tokenizer/merges.txt", "#version: 0.2\n" + merges_text())
    write("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})


DIFFUSERS = """
from diffusers import StableDiffusionPipeline
run = lambda: StableDiffusionPipeline.from_single_file({path!r}, config={config!r}, local_files_only=True, torch_dtype={dtype},
                                                       safety_checker=None, feature_extractor=None)
"""
LOADERS = {
    "minisd, bfloat16 (its default here)": "import minisd.pipeline\nrun = lambda: minisd.load({path!r}, 'cpu', 'bfloat16')",
    "diffusers, bfloat16": DIFFUSERS.replace("{dtype}", "torch.bfloat16"),
    "diffusers, float32 (its default)": DIFFUSERS.replace("{dtype}", "None"),
    "the floor: as much new memory, zeroed": "run = lambda: torch.empty({size} // 2, dtype=torch.bfloat16).zero_()",
}
MEASURE = """
import time, torch, numpy, safetensors.torch, tokenizers
{setup}
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, start = peak(), time.perf_counter()
pipe = run()
print(time.perf_counter() - start, peak() - before)
"""


def bench_load(repeats: int) -> None:
    """Fresh processes, in turn, with the file in the page cache; imports are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        path, config = Path(folder) / "sd15.safetensors", Path(folder) / "config"
        write_sd15(path)
        write_configs(config)
        size = path.stat().st_size
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
        for _ in range(repeats + 1):
            for name, setup in LOADERS.items():
                code = MEASURE.format(setup=setup.format(path=str(path), config=str(config), size=size))
                out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
                seconds, peak = map(float, out.splitlines()[-1].split())
                rows[name].append((seconds, peak))
    print(f"opening a {size / 1e9:.2f} GB fp16 SD 1.5 file to ready modules, {repeats} runs each")
    medians = {}
    for name, runs in rows.items():
        medians[name] = statistics.median(seconds for seconds, _ in runs[1:])
        peak = max(peak for _, peak in runs[1:])
        print(f"  {name:<38} {medians[name]:6.2f} s   peak memory {peak / 1e9:.2f} GB = {peak / size:.2f} x the file")
    ours, same, default, floor = medians.values()
    print(f"  minisd is {same / ours:.1f} times as fast at the same dtype, {default / ours:.1f} times with each one's default;")
    print(f"  {floor / ours:.0%} of its time is what the new memory costs by itself")


def bench_unet(repeats: int) -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from minisd.blueprint import random_weights, sd15
    from minisd.shapes import below
    from minisd.unet import UNet

    weights = random_weights({key: shape for key, shape in sd15().items() if key.startswith("model.diffusion_model.")})
    with torch.device("meta"):
        ours = UNet(below(sd15(), "model.diffusion_model"))
        theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    ours.load_state_dict({key.removeprefix("model.diffusion_model."): value for key, value in weights.items()}, assign=True)
    theirs.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), dict(theirs.config)), assign=True)
    x, t, context = torch.randn(2, 4, 64, 64), torch.tensor([500.0, 500.0]), torch.randn(2, 77, 768)
    with torch.no_grad():
        times: dict[str, list[float]] = {"minisd": [], "diffusers": []}
        calls = {"minisd": lambda: ours(x, t, context), "diffusers": lambda: theirs(x, t, context).sample}
        difference = (calls["minisd"]() - calls["diffusers"]()).norm() / calls["diffusers"]().norm()
        for _ in range(repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        fp32 = {name: statistics.median(values) for name, values in times.items()}
        ours.bfloat16()
        bf16 = median(lambda: ours(x.bfloat16(), t, context.bfloat16()), repeats)
    print(f"SD 1.5 UNet step, batch 2, 64x64 latents, {torch.get_num_threads()} threads, relative difference {difference:.1e}")
    ratio = fp32["diffusers"] / fp32["minisd"]
    print(f"  float32   minisd {fp32['minisd']:.2f} s, diffusers {fp32['diffusers']:.2f} s: {ratio:.2f} times its speed")
    print(f"  bfloat16  minisd {bf16:.2f} s: {fp32['minisd'] / bf16:.2f} times our float32")


def bench_tiles(repeats: int) -> None:
    """The published VAE with random weights, on latents with large and small features."""
    import torch
    import torch.nn.functional as F
    from live_bytes import peak_bytes

    from minisd.blueprint import random_weights, vae
    from minisd.tiling import decode_tiled
    from minisd.vae import AutoencoderKL

    shapes = vae((128, 256, 512, 512), (128, 256, 512, 512), (2, 3))
    with torch.device("meta"):
        model = AutoencoderKL(shapes).requires_grad_(False).eval()
    model.load_state_dict(random_weights(shapes), assign=True)
    noise = torch.Generator().manual_seed(0)
    features = [F.interpolate(torch.randn(1, 4, n, n, generator=noise), 128, mode="bicubic") for n in (4, 16, 128)]
    latents = torch.stack(features).sum(0) * 3**-0.5
    print(f"decoding 1024x1024 pixels, {torch.get_num_threads()} threads, {repeats} runs each")
    for dtype in (torch.float32, torch.bfloat16):
        model, z = model.to(dtype), latents.to(dtype)
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "whole": partial(model.decode, z),
            "bands": partial(decode_tiled, model, z),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        pixels = {}
        with torch.no_grad():
            peak = {name: peak_bytes(call) for name, call in calls.items()}
            for _ in range(repeats):
                for name, call in calls.items():
                    start = time.perf_counter()
                    pixels[name] = call().float().clamp(-1, 1)
                    times[name].append(time.perf_counter() - start)
        psnr = 10 * torch.log10(4 / (pixels["whole"] - pixels["bands"]).square().mean())
        seconds = {name: statistics.median(values) for name, values in times.items()}
        print(f"  {dtype}: PSNR {psnr:.1f} dB, {seconds['bands']:.1f} s against {seconds['whole']:.1f} s,")
        print(f"    activations {peak['bands'] / 1e9:.2f} GB against {peak['whole'] / 1e9:.2f} GB at their peak")


def bench_cli(repeats: int) -> None:
    """Whole processes, from the shell's point of view."""
    command = [sys.executable, "-m", "minisd.cli"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sd15.safetensors"
        write_sd15(path)
        rows = {
            'minisd "a red circle on a blue background"': ["a red circle on a blue background", "-o", f"{folder}/x.png"],
            "minisd --help": ["--help"],
            f"minisd inspect (a file of {path.stat().st_size / 1e9:.1f} GB)": ["inspect", str(path)],
        }
        for name, arguments in rows.items():
            run = partial(subprocess.run, [*command, *arguments], check=True, capture_output=True)
            print(f"  {median(run, repeats):6.3f} s  {name}")
        empty = median(partial(subprocess.run, [sys.executable, "-c", "pass"], check=True), repeats)
        print(f"  {empty:6.3f} s  python -c pass, for scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "unet", "tiles", "cli"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    {"load": bench_load, "unet": bench_unet, "tiles": bench_tiles, "cli": bench_cli}[args.what](args.repeats)


if __name__ == "__main__":
    main()

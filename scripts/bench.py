"""Figures of the README that `minisd bench` does not cover.  Machines are noisy: read the ratios.

    python scripts/bench.py tiles     decoding 1024x1024 pixels in bands of rows against whole: difference, memory, time
    python scripts/bench.py cli       the command line on the tiny checkpoint; --help and inspect
    python scripts/bench.py library   minisd models over 200 checkpoints with the keys of SD 1.x and SDXL, first and second time
    python scripts/bench.py files     saving and merging a checkpoint of 2.1 GB against copying it, with fsync (needs 9 GB)
    python scripts/bench.py batch     minisd batch with 1 and 2 workers, and on Ray, against a plain loop over the API

No download: the weights are random.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

PICTURES = 240  # of a batch


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bench_tiles(repeats: int) -> None:
    """The published VAE with random weights, on latents with large and small features."""
    import torch
    import torch.nn.functional as F
    from live_bytes import peak_bytes

    from minisd.fast.tiling import decode_tiled
    from minisd.models.vae import AutoencoderKL
    from minisd.workbench.blueprint import random_weights, vae

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
    import torch

    from minisd.bench.networks import MODELS, random_checkpoint

    command = [sys.executable, "-m", "minisd"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sd15.safetensors"
        random_checkpoint(MODELS["sd15"], path, torch.device("cpu"))
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


def bench_library(repeats: int) -> None:
    """Whole processes; the checkpoints are files of holes, of which only the headers take space and are read."""
    from minisd.files.entry import Entry
    from minisd.files.saving import header
    from minisd.workbench.blueprint import sd15, sdxl

    kinds = [{key: ("F16", shape) for key, shape in shapes.items()} for shapes in (sd15(), sdxl())]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").mkdir()
        for i in range(200):
            planned = kinds[i % 2]
            head = header(planned, {"number": str(i)})
            with Path(folder, "models", f"mix{i:03}.safetensors").open("wb") as file:
                file.write(head)
                file.truncate(len(head) + sum(Entry(*facts, 0).nbytes for facts in planned.values()))
        cache = Path(folder) / "cache"
        environment = os.environ | {"MINISD_MODELS": f"{folder}/models", "XDG_CACHE_HOME": str(cache)}
        command = [sys.executable, "-m", "minisd", "models"]
        run = partial(subprocess.run, command, check=True, capture_output=True, env=environment)

        def first() -> None:
            shutil.rmtree(cache, ignore_errors=True)
            run()

        print(f"  {median(first, repeats):6.3f} s  minisd models, 200 checkpoints, first time")
        print(f"  {median(run, repeats):6.3f} s  second time")
        known = partial(subprocess.run, [*command, "list", "--json"], check=True, capture_output=True, env=environment)
        print(f"  {median(known, repeats):6.3f} s  the same with --json")


FILES = """
import os, shutil, sys, time
from minisd.workbench.converting import convert
from minisd.workbench.inspecting import inspect
from minisd.workbench.merging import merge
a, b, out = sys.argv[1:]
def copy():
    shutil.copyfile(a, out)
    descriptor = os.open(out, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
start = time.perf_counter()
{run}
seconds = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024)
"""


def bench_files(repeats: int) -> None:
    """Fresh processes in turn, imports not counted; the sources are in the page cache."""
    import torch

    from minisd.bench.networks import MODELS, random_checkpoint

    rows = {
        "copying it": "copy()",
        "saving it (minisd convert, the same dtype)": "convert(a, out)",
        "merging two (minisd merge, --ratio 0.3)": "merge([a, b], out, 0.3)",
        "looking for NaN in it (minisd inspect --check)": "inspect(a, check=True)",
    }
    with tempfile.TemporaryDirectory() as folder:
        a, b, out = (Path(folder) / f"{name}.safetensors" for name in ("a", "b", "out"))
        random_checkpoint(MODELS["sd15"], a, torch.device("cpu"))
        shutil.copyfile(a, b)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(repeats + 1):
            for name, code in rows.items():
                command = [sys.executable, "-P", "-c", FILES.replace("{run}", code), str(a), str(b), str(out)]
                seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                runs[name].append((float(seconds), float(peak)))
                out.unlink(missing_ok=True)
        print(f"a file of {a.stat().st_size / 1e9:.2f} GB, median and least of {repeats} runs, the first not counted")
        plain = statistics.median(seconds for seconds, _ in runs["copying it"][1:])
        for name, found in runs.items():
            times = [seconds for seconds, _ in found[1:]]
            middle = statistics.median(times)
            print(
                f"  {middle:5.2f} s (least {min(times):5.2f})  {middle / plain:4.2f} times the copy, "
                f"peak {max(peak for _, peak in found) / 1e9:.2f} GB  {name}"
            )


LOOP = """
import json, sys, time
from pathlib import Path
import minisd
rows = [json.loads(line) for line in open(sys.argv[1])]
pipe = minisd.load(device="cpu")
start = time.monotonic()
for row in rows:
    pipe(row["prompt"], seed=row["seed"]).save(Path(sys.argv[2]) / f"{row['id']}.png")
print(len(rows) / (time.monotonic() - start))
"""


def bench_batch(repeats: int) -> None:
    """Pictures a second of the tiny checkpoint; of workers with, of the loop without the time until the model is loaded."""
    import json

    ways: dict[str, list[str]] = {"a loop over the API, torch's own threads": [], "1 worker": ["--workers", "1"]}
    ways |= {"2 workers": ["--workers", "2"], "2 actors of Ray": ["--workers", "2", "--ray"]}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        manifest, out = Path(folder) / "m.jsonl", Path(folder) / "out"
        rows = [{"id": f"{i}", "prompt": f"a red circle on a blue background, {i}", "seed": i} for i in range(PICTURES)]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        for _ in range(repeats):
            for name, options in ways.items():
                out.mkdir()
                command = [sys.executable, "-c", LOOP, str(manifest), str(out)]
                if options:
                    command = [sys.executable, "-m", "minisd", "batch", str(manifest), "-o", str(out), "--json", *options]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
                rates[name].append(json.loads(done)["pictures_per_second"] if options else float(done))
                shutil.rmtree(out)
    print(f"{PICTURES} pictures of 20 steps, median of {repeats} runs in turns")
    first = statistics.median(rates["a loop over the API, torch's own threads"])
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"  {middle:5.2f} a second  {middle / first:4.2f} times the loop  {name} ({min(found):.2f} to {max(found):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tiles", "cli", "library", "files", "batch"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    benches = {"tiles": bench_tiles, "cli": bench_cli, "library": bench_library, "files": bench_files, "batch": bench_batch}
    benches[args.what](args.repeats)


if __name__ == "__main__":
    main()

"""bench unet and bench vae: one step of the UNet, one decoded picture; kernels on and off, and the peers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..device import name_of
from . import peers
from .networks import MODELS, laid_out, random_unet, random_vae, step_input
from .report import Report
from .timing import Run, captured

COLUMNS = ("time ms", "first s", "difference", "to ours")


@torch.no_grad()
def bench_unet(report: Report, args: Any) -> None:
    """The UNet as the samplers call it, batch 2, in a CUDA graph."""
    clock, model = report.clock, MODELS[args.model]
    side = model.latents if args.full else model.latents // 2
    report.table(title(report, f"{model.name} UNet step, batch 2, {side}x{side} latents"), COLUMNS)
    network, given = random_unet(model, clock.device, clock.dtype), step_input(model, side, clock.device, clock.dtype)

    def plain() -> Tensor:
        return network(given.x, given.t, given.context, given.y)

    def laid() -> None:
        laid_out(network, clock.device)

    ours, wanted = own_rows(report, "minisd", plain, laid, args.ablate)
    peers.bench(report, args.peers, lambda: peers.unet(model, network), peers.unet_call, given, ours, wanted)


@torch.no_grad()
def bench_vae(report: Report, args: Any) -> None:
    for side in (64, 128) if args.full else (32,):
        decode_rows(report, args, side)


def decode_rows(report: Report, args: Any, side: int) -> None:
    clock = report.clock
    report.table(title(report, f"VAE decoding {8 * side}x{8 * side} pixels"), COLUMNS)
    network = random_vae(clock.device, clock.dtype)
    latents = torch.randn(1, 4, side, side, device=clock.device).to(clock.dtype)

    def laid() -> None:
        laid_out(network, clock.device)

    ours, wanted = own_rows(report, "minisd", lambda: network.decode(latents), laid, args.ablate)
    peers.bench(report, args.peers, lambda: peers.vae(network), peers.vae_call, latents, ours, wanted)


def title(report: Report, what: str) -> str:
    graph = "replayed CUDA graphs where not eager" if report.clock.is_cuda else "eager"
    meaning = "difference is relative to minisd without kernels, to ours is time over the first row's"
    return f"{what}, {name_of(report.clock.dtype)}, {graph}; {meaning}"


def own_rows(report: Report, label: str, run: Run, lay_out: Callable[[], None], ablate: bool) -> tuple[float, Tensor]:
    """Rows for kernels on, off, and each of them switched alone; seconds of the first, result of PyTorch alone."""
    clock = report.clock
    with ops.using("torch"):
        wanted = run().clone()
    ours = own_row(report, f"{label}, kernels as chosen", None, run, lay_out, wanted, None)
    if clock.is_cuda:
        own_row(report, f"{label}, no kernels", "torch", run, lay_out, wanted, ours)
        if ablate:
            for name in sorted(ops.ALL):
                sign = "without" if name in ops.AUTO else "and also"
                choice = ",".join(sorted(ops.AUTO ^ {name}))
                own_row(report, f"{label}, {sign} {name}", choice, run, lay_out, wanted, ours)
    return ours, wanted


def own_row(
    report: Report, label: str, kernels: str | None, run: Run, lay_out: Callable[[], None], wanted: Tensor, ours: float | None
) -> float:
    clock = report.clock
    seconds = float("nan")
    with report.attempt(label), ops.using(kernels) if kernels else nullcontext():
        lay_out()
        start = time.perf_counter()
        fast = captured(run) if clock.is_cuda else run
        result = fast().clone()
        clock.synchronise()
        first = time.perf_counter() - start
        error = float((result.float() - wanted.float()).norm() / wanted.float().norm())
        seconds = clock.replayed(fast) if clock.is_cuda else clock.seconds(fast)
        report.add(label, time_ms=seconds, first_s=first, difference=error, to_ours=seconds / (ours or seconds))
    return seconds

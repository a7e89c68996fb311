"""bench unet and bench vae: one step of the UNet, one decoded picture; fused and plain, kernels on and off, and the peers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..diffusion.denoiser import ClassifierFree, Conditioning, Network, Timeline
from ..diffusion.levels import levels
from ..diffusion.program import program
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import scaled_linear
from ..fast import choice
from ..fast.cpu.engine import Cpu
from ..fast.cpu.networks import decoder_layer
from ..fast.cuda import Cuda
from ..fast.decoder import FusedDecoder
from ..fast.lossy.float8 import to_float8
from ..fast.lossy.networks import form_of
from ..fast.operations import attentions_of
from ..fast.ways import Walk
from ..models.unet import UNet
from ..system.device import name_of
from ..system.memory import keeping_freed_memory
from . import peers
from .lab import runtimes
from .networks import MODELS, StepInput, laid_out, random_unet, random_vae, step_input
from .report import Report
from .timing import Run, captured

COLUMNS = ("time ms", "first s", "difference", "to ours")
FLOOR = "the plain form's arithmetic alone"


@torch.no_grad()
def bench_unet(report: Report, args: Any) -> None:
    """The UNet as the samplers call it, batch 2, in a CUDA graph."""
    clock, model = report.clock, MODELS[args.model]
    side = model.latents if args.full else model.latents // 2
    report.table(title(report, f"{model.name} UNet step, batch 2, {side}x{side} latents"), COLUMNS)
    network, given = random_unet(model, clock.device, clock.dtype), step_input(model, side, clock.device, clock.dtype)
    report.note(f"attention by {attentions_of(network)}")
    engine = Cuda(network, graphs=True) if clock.is_cuda else Cpu(network)
    fused = engine.fuse()
    shift, keys_values = fused.shifts(given.t[:1], given.y)[0], fused.keys_values(given.context)

    def plain() -> Tensor:
        return network(given.x, given.t, given.context, given.y)

    def fast() -> Tensor:
        return fused(given.x, shift, keys_values)

    def laid(fused: bool) -> None:
        laid_out(network, clock.device, fused)

    ours, wanted = own_rows(report, fast, plain, laid, args.ablate)
    with report.attempt("minisd, whole step as drawn"):
        laid(True)
        whole_step(report, engine, given, ours)
    peers.bench(report, args.peers, lambda: peers.unet(model, network), peers.unet_call, given, ours, wanted)
    tensors = [x for x in (given.x, given.t, given.context, given.y) if x is not None]
    module = runtimes.Called(network, lambda network, *given: network(*given))
    runtimes.bench(report, args.peers, module, tensors, after_laying(laid, as_drawn(fast)), wanted)
    if args.fp8:
        with report.attempt("--fp8"):
            float8_rows(report, network, given, plain, wanted, ours)


def float8_rows(report: Report, network: UNet, given: StepInput, plain: Run, wanted: Tensor, ours: float) -> None:
    """The last of all, as the weights are rounded for good."""

    def as_it_lies() -> None:
        """The weights lie as whoever came before has left them."""

    to_float8(network)
    form = form_of(network) if report.clock.is_cuda else None
    if form is not None:
        fused = form(network)
        shift, keys_values = fused.shifts(given.t[:1], given.y)[0], fused.keys_values(given.context)
        own_row(report, "minisd, fused, --fp8", None, lambda: fused(given.x, shift, keys_values), as_it_lies, wanted, ours)
    own_row(report, "minisd, plain modules, --fp8", None, plain, as_it_lies, wanted, ours)


def whole_step(report: Report, engine: Cuda, given: StepInput, ours: float) -> None:
    """One of the steps that the pipeline replays: with the tables' rows, guidance and the sampler's update; on a CPU the first
    of a picture, with the prompt's keys and values."""
    clock, network = report.clock, engine.unet
    halves = [
        Conditioning(context, vector=vector) for context, vector in zip(given.context.split(1), parts(given.y), strict=True)
    ]
    schedule, sampler = scaled_linear(), SAMPLERS["euler"]
    way = levels(schedule, "linspace", 20, sampler.wish)
    conditioning = [Timeline(((0, half),)) for half in halves]
    steps = program(sampler.run, way.sigmas)
    walk = Walk(Network(network, schedule), sampler, way, conditioning, ClassifierFree(7.5), steps)

    def draw() -> None:
        for _ in engine.walk(walk, given.x[:1].float(), lambda *_: torch.zeros_like(given.x[:1]).float()):
            if not clock.is_cuda:
                return

    first = clock.once(draw)
    seconds = clock.replayed(one_call(engine)) if clock.is_cuda else clock.seconds(draw)
    report.add("minisd, whole step as drawn", time=seconds, first=first, to_ours=seconds / ours)
    if clock.is_cuda:
        second = clock.once(draw)
        report.add("minisd, 20 steps as drawn, a step", time=second / 20, to_ours=second / 20 / ours)


def one_call(engine: Cuda) -> Run:
    """The first call of what an engine has just drawn, again."""
    (buffers,) = engine.shapes.values()

    def again() -> None:
        buffers.call.zero_()  # beyond the last row of the table there is nothing but NaN
        if engine.fused:
            engine.run(engine.fused, buffers, (0, 1))

    return again


def parts(y: Tensor | None) -> Sequence[Tensor | None]:
    return (None, None) if y is None else y.split(1)


@torch.no_grad()
def bench_vae(report: Report, args: Any) -> None:
    for side in (64, 128) if args.full else (32,):
        decode_rows(report, args, side)


def decode_rows(report: Report, args: Any, side: int) -> None:
    clock = report.clock
    report.table(title(report, f"VAE decoding {8 * side}x{8 * side} pixels"), COLUMNS)
    network = random_vae(clock.device, clock.dtype)
    fused = FusedDecoder(network) if clock.is_cuda else FusedDecoder(network, decoder_layer)
    latents = torch.randn(1, 4, side, side, device=clock.device).to(clock.dtype)

    def laid(fused: bool) -> None:
        laid_out(network, clock.device, fused)

    ours, wanted = own_rows(report, lambda: fused(latents), lambda: network.decode(latents), laid, args.ablate)
    peers.bench(report, args.peers, lambda: peers.vae(network), peers.vae_call, latents, ours, wanted)
    decoder = runtimes.Called(network, lambda network, latents: network.decode(latents))
    runtimes.bench(report, args.peers, decoder, [latents], after_laying(laid, as_drawn(lambda: fused(latents))), wanted)


def title(report: Report, what: str) -> str:
    search = "on" if torch.backends.cudnn.benchmark else "off"
    graph = f"replayed CUDA graphs where not eager, cudnn.benchmark {search}" if report.clock.is_cuda else "eager"
    meaning = "difference is relative to minisd without kernels, to ours is time over the first row's"
    return f"{what}, {name_of(report.clock.dtype)}, {graph}; {meaning}"


def own_rows(report: Report, fast: Run, plain: Run, lay: Callable[[bool], None], ablate: bool) -> tuple[float, Tensor]:
    """Rows for the fused and the plain form, kernels on and off, and for each kernel switched alone.

    Returns the seconds of the first, and what the plain form makes in PyTorch alone.
    """
    clock = report.clock
    with choice.using("torch"), FlopCounterMode(display=False) as counter:
        wanted = plain().clone()
    ours = own_row(report, "minisd, fused", None, fast if clock.is_cuda else as_drawn(fast), partial(lay, True), wanted, None)
    lay_out = partial(lay, False)
    own_row(report, "minisd, plain modules", None, plain, lay_out, wanted, ours)
    if clock.is_cuda:
        own_row(report, "minisd, fused, no kernels", "torch", fast, lay_out, wanted, ours)
        own_row(report, "minisd, plain modules, no kernels", "torch", plain, lay_out, wanted, ours)
        if ablate:
            for name in sorted(choice.ALL - choice.FLOAT8 - {"linear_step"}):
                sign = "without" if name in choice.AUTO else "and also"
                own_row(
                    report, f"minisd, fused, {sign} {name}", ",".join(sorted(choice.AUTO ^ {name})), fast, lay_out, wanted, ours
                )
            before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = not before
            own_row(report, f"minisd, fused, cudnn.benchmark {'off' if before else 'on'}", None, fast, lay_out, wanted, ours)
            torch.backends.cudnn.benchmark = before
    report.add(FLOOR, time=counter.get_total_flops() / clock.matmul_rate)
    return ours, wanted


def as_drawn(fast: Run) -> Run:
    """As the engine of a CPU computes."""
    return keeping_freed_memory()(fast)


def after_laying(lay: Callable[[bool], None], fast: Run) -> Run:
    """Lays the weights out for the fused form once, before its first call."""
    first = cache(partial(lay, True))

    def run() -> Tensor:
        first()
        return fast()

    return run


def own_row(
    report: Report, label: str, kernels: str | None, run: Run, lay_out: Callable[[], None], wanted: Tensor, ours: float | None
) -> float:
    clock = report.clock
    seconds = float("nan")
    with report.attempt(label), choice.using(kernels) if kernels else nullcontext():
        lay_out()
        start = time.perf_counter()
        fast = captured(run) if clock.is_cuda else run
        result = fast().clone()
        clock.synchronise()
        first = time.perf_counter() - start
        error = float((result.float() - wanted.float()).norm() / wanted.float().norm())
        seconds = clock.replayed(fast) if clock.is_cuda else clock.seconds(fast)
        report.add(label, time=seconds, first=first, difference=error, to_ours=seconds / (ours or seconds))
    return seconds

"""bench taps: what a tap costs while there is none.

Two networks of the very same weights, of which one was never tapped and the other was, at every module, through a drawing and by
a second tap that failed.  They are called in turns, each round the other way round; the least of all rounds counts, on a CPU of
processor time, since another program on the machine may take its time but gives none back.  The calls of functions are counted,
too, which needs no quiet machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...files.model import NoInit
from ...inside.taps import Value, tap
from ...models.family import UNET
from ...models.shapes import Shapes
from ...models.unet import UNet
from ...pipeline import Pipeline, load
from ...request import Request
from ..report import Report
from ..timing import Clock, Run

PROMPT = "a red circle on a blue background"
ROUNDS = 40  # for each of --repeats
STEPS = 4


@torch.no_grad()
def bench(report: Report, args: Any) -> None:
    clock = report.clock
    pipe = load(args.checkpoint, str(clock.device), clock.dtype, fast=False)
    never, another, request = twin(pipe.unet), twin(pipe.unet), Request(PROMPT, steps=STEPS, seed=1)
    given, rounds = call_of(pipe, request), ROUNDS * args.repeats
    report.table(
        f"a call of the UNet, {pipe.checkpoint.path.stem}, plain, in turns, the least of {rounds}", ("time ms", "ratio", "calls")
    )
    tapped_and_left(pipe, request)
    runs = {"never tapped": never, "tapped before, and left": pipe.unet, "another that was never tapped": another}
    measured(report, {name: partial(unet, *given) for name, unet in runs.items()}, rounds)
    with tap(pipe, f"{UNET}.middle_block", lambda value: None):
        measured(report, {"": partial(never, *given), "while a tap looks at one block": partial(pipe.unet, *given)}, rounds)
    report.note("ratio: to the network that was never tapped, in the same rounds; how far its double is from 1 is the noise")
    report.note("calls: of Python's functions and of PyTorch's, counted; a hook that were left behind would be one more")


def measured(report: Report, runs: Mapping[str, Run], rounds: int) -> None:
    """A row for each that has a name; ratios are to the first."""
    found = in_turns(report.clock, runs, rounds)
    first = next(iter(found.values()))
    for name, run in runs.items():
        if name:
            report.add(name, time=found[name], ratio=found[name] / first, calls=function_calls(run))


def function_calls(run: Run) -> int:
    """How many functions it calls, Python's and those of its extensions."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def twin(unet: UNet) -> UNet:
    """Another network of the same tensors: where weights lie in memory counts, too."""
    weights = unet.state_dict()
    with torch.device("meta"), NoInit():
        made = UNet(Shapes({name: tuple(weight.shape) for name, weight in weights.items()}))
    made.load_state_dict(weights, assign=True)
    return made.requires_grad_(False).eval()


def call_of(pipe: Pipeline, request: Request) -> tuple[Any, ...]:
    """What a drawing's first call gives to the UNet, seen without a tap."""
    seen: list[tuple[Any, ...]] = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, given: seen.append(given))
    next(iter(pipe.stream(request)))
    hook.remove()
    return seen[0]


def tapped_and_left(pipe: Pipeline, request: Request) -> None:
    """By a tap that keeps what every module of the UNet makes, and by one whose function raises."""
    with tap(pipe, f"{UNET}*"):
        next(iter(pipe.stream(request)))

    def fail(value: Value) -> Tensor:
        raise LookupError(value.name)

    with suppress(LookupError), tap(pipe, f"{UNET}*", fail):
        next(iter(pipe.stream(request)))


def in_turns(clock: Clock, runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """The least seconds of a call of each, called in turns, forth and back."""
    for run in runs.values():
        run()
    least = dict.fromkeys(runs, float("inf"))
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            least[name] = min(least[name], spent(clock, runs[name]))
    return least


def spent(clock: Clock, run: Run) -> float:
    """Seconds of a call: of the processor where it computes, else until the device has done."""
    if clock.is_cuda:
        return clock.once(run)
    start = time.process_time()
    run()
    return time.process_time() - start

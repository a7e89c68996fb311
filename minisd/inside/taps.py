"""Taps: what the modules of a pipeline are given and make while it draws, by the checkpoint's own names, to see or to change.

A tap is a forward hook, so it sees the modules as they stand: a pipeline that would draw in a faster form takes the plain way
for as long as one is there.  Without a tap there is nothing: no hook, no question asked.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..diffusion.denoiser import Call, Denoiser, Noise
from ..errors import UsageError
from ..fast.cpu.engine import Cpu
from ..fast.engine import Engine, Plain, moments
from ..fast.ways import Moment, Walk, Way
from ..models.clip import TextEncoder
from ..models.vae import AutoencoderKL
from ..pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class Value:
    """What a module was given and made, once."""

    name: str  # of the module in the checkpoint, such as "model.diffusion_model.middle_block.1"
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Tensor  # of the UNet's modules with a row for each role: the negative prompts first, then the prompts
    call: Call | None  # the question to the UNet that it belongs to; None outside of them: text encoders, VAE

    @property
    def step(self) -> int | None:
        """Of the sampler, from 0; None for text encoders and VAE."""
        return None if self.call is None else self.call.step


Change = Callable[[Value], Tensor | None]


class Tapped:
    """The values that came by, in their order."""

    def __init__(self) -> None:
        self.values: list[Value] = []

    def __iter__(self) -> Iterator[Value]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> list[Value]:
        """Those of a name, or of a pattern of names."""
        return [value for value in self.values if fnmatchcase(value.name, name)]


@contextmanager
def tap(
    pipe: Pipeline, names: str | Iterable[str], change: Change | None = None, steps: int | Iterable[int] | None = None
) -> Iterator[Tapped]:
    """For the length of a with block, hands out what modules of a pipeline make.

    names: of modules in the checkpoint, or patterns of them (*, ?, […], as in file names, over dots, too), one or several.
    change: is shown every Value; what it returns, of the same shape, goes on in the place of the output.  Without it the values
        are kept, and the block's target has them in their order.
    steps: of the sampler, from 0, at which the UNet's values are handed out; by default all.  Other networks have no steps.
    Raises UsageError for names that no module has which makes a value, and for a change of another shape.
    """
    check_pipeline(pipe)
    chosen, found, tapped = steps_of(steps), matching(pipe.model, names), Tapped()

    def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = engine.call()
        if chosen is not None and call is not None and call.step not in chosen:
            return None
        value = Value(name, module, inputs, output, call)
        if change is None:
            tapped.values.append(value)
            return None
        return fitting(name, change(value), output)

    with watched(pipe) as engine, ExitStack() as hooks:
        for name, module in found.items():
            see = partial(hook, name)
            see.only_looks = change is None  # type: ignore[attr-defined]
            hooks.callback(module.register_forward_hook(see).remove)
        yield tapped


def check_pipeline(pipe: object) -> None:
    if not isinstance(pipe, Pipeline):
        raise UsageError(f"pipe: expected a pipeline, as minisd.load gives it, found {type(pipe).__name__}")


def steps_of(steps: int | Iterable[int] | None) -> frozenset[int] | None:
    if steps is None:
        return None
    try:
        found = frozenset(map(operator.index, steps if isinstance(steps, Iterable) else [steps]))
    except TypeError:
        found = frozenset({-1})
    if not found or min(found) < 0:
        raise UsageError(f"steps: expected numbers of steps from 0, found {repr(steps)[:80]}")
    return found


def matching(model: nn.Module, names: str | Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names that make a value.  Raises UsageError where a name has none."""
    known = dict(model.named_modules())
    making = {name: module for name, module in known.items() if name and makes_value(module)}
    found: dict[str, nn.Module] = {}
    for pattern in [names] if isinstance(names, str) else names:
        if not isinstance(pattern, str):
            raise UsageError(f"names: expected names of modules, found {repr(pattern)[:80]}")
        matches = [name for name in making if fnmatchcase(name, pattern)]
        if not matches and any(fnmatchcase(name, pattern) for name in known):
            raise UsageError(f"names: {pattern!r} only holds other modules; take one of those, such as {pattern + '.*'!r}")
        if not matches:
            close = get_close_matches(pattern, making, 3, 0.3)
            raise UsageError(f"names: expected modules of this checkpoint, such as {', '.join(close)}; found {pattern!r}"[:600])
        found |= {name: making[name] for name in matches}
    return found


def makes_value(module: nn.Module) -> bool:
    """Whether it is called itself; lists of modules are not, and the text encoders and the VAE have other methods than that."""
    return getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


def fitting(name: str, given: object, output: Tensor) -> Tensor | None:
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.shape != output.shape:
        found = tuple(getattr(given, "shape", ())) or type(given).__name__
        raise UsageError(f"change: expected None or a tensor {tuple(output.shape)} for {name}, found {found}")
    return given.to(output)


class Watched(Plain):
    """An engine that draws with the modules as they stand, and knows which call of the UNet they are at."""

    def __init__(self, base: Engine) -> None:
        self.base = base
        self.now: Denoiser | None = None  # of the walk that is being taken

    def call(self) -> Call | None:
        return self.now.calls[-1] if self.now and self.now.calls else None

    def way(self, walk: Walk, x: Tensor) -> tuple[Way, str]:
        return "plain", "taps see the modules"

    def walk(self, walk: Walk, x: Tensor, noise: Noise) -> Iterator[Moment]:
        denoise = walk.denoiser()
        return self.through(denoise, moments(walk, denoise, x, noise, "plain"))

    def through(self, denoise: Denoiser, steps: Iterator[Moment]) -> Iterator[Moment]:
        while True:  # two streams of one pipeline may run in turns
            self.now = denoise
            try:
                moment = next(steps)
            except StopIteration:
                return
            finally:
                self.now = None
            yield moment

    def read(self, encoder: TextEncoder, ids: Tensor) -> Sequence[Tensor]:
        return self.base.read(encoder, ids)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return self.base.decode(vae, latents)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        self.base.replace(old, new)

    def refresh(self) -> None:
        self.base.refresh()


@contextmanager
def watched(pipe: Pipeline) -> Iterator[Watched]:
    """Has a pipeline draw by a Watched engine, several taps by one; says so where it would be faster otherwise."""
    before = pipe.engine
    if isinstance(before, Watched):
        yield before
        return
    if not isinstance(before, Plain | Cpu):
        warnings.warn("drawing slower than this device can: taps see the modules", stacklevel=5)
    pipe.engine = engine = Watched(before)
    try:
        yield engine
    finally:
        pipe.engine = before

"""Numbers that are none: which module is the first to make them, what to do about it, and blocks that are computed wider.

A module is at fault if what it was given is finite and what it makes is not.  Modules end before those that they are part of, so
the first that is found is the innermost.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .device import name_of


@dataclass(frozen=True)
class Culprit:
    """The first module that left the finite numbers."""

    name: str  # in the checkpoint
    kind: str  # its class
    dtype: torch.dtype  # of its weights, or of what it was given
    weight: str | None  # one of its weights that holds NaN or infinity
    low: float  # of the numbers that it was given
    high: float

    def words(self) -> str:
        """What happened there, and what to do."""
        first = f"the first to leave the finite numbers is {self.name} ({self.kind})"
        if self.weight:
            return f"{first}: its {self.weight} holds NaN or infinity; minisd inspect FILE --check names all such weights"
        given = f"given numbers from {self.low:.4g} to {self.high:.4g} in {name_of(self.dtype)}"
        if self.dtype == torch.float32:
            return f"{first}, {given}: its weights are too large to be right; try another file"
        return f"{first}, {given}: draw with dtype float32 or bfloat16, or with --rescue, which computes such blocks in float32"

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name, "kind": self.kind, "dtype": name_of(self.dtype), "weight": self.weight,
            "input_range": [self.low, self.high], "words": self.words(),
        }  # fmt: skip


def floats(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def finite(values: Any) -> bool:
    return all(bool(value.isfinite().all()) for value in floats(values))


@contextmanager
def watching(networks: Mapping[str, nn.Module]) -> Iterator[list[Culprit]]:
    """For the length of a with block, looks at what all modules make; the list gets the first that leaves the finite numbers.

    networks: by their names in the checkpoint.
    """
    found: list[Culprit] = []

    def see(name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
        inputs = [*given, *named.values()]
        if not found and not finite([made]) and finite(inputs):
            found.append(culprit(name, module, floats(inputs)))

    with ExitStack() as hooks:
        for prefix, network in networks.items():
            for name, module in network.named_modules():
                hook = partial(see, f"{prefix}.{name}" if name else prefix)
                hook.only_looks = True  # type: ignore[attr-defined]  # fast/ways.py, hooked
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield found


def culprit(name: str, module: nn.Module, inputs: list[Tensor]) -> Culprit:
    broken = [key for key, weight in module.named_parameters() if not weight.float().isfinite().all()]
    own = dtype_of(module, inputs[0].dtype if inputs else torch.float32)
    low, high = (float(min(map(torch.min, inputs))), float(max(map(torch.max, inputs)))) if inputs else (0.0, 0.0)
    return Culprit(name, type(module).__name__, own, broken[0] if broken else None, low, high)


def dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What it computes in: that of its weights, but for those in float8, which are dequantised when they are used."""
    return next((weight.dtype for weight in module.parameters() if weight.element_size() > 1), otherwise)


class Rescuing(nn.Module):
    """A UNet whose blocks that overflow are computed in float32, from the call on at which they first do."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.wide: dict[str, nn.Module] = {}  # copies in float32, by name
        self.rescued: set[str] = set()

    def forward(self, *given: Any, **named: Any) -> Tensor:
        """As the UNet's own; the output may be float32."""
        while True:
            with self.widened():
                out: Tensor = self.unet(*given, **named)
                if finite([out]):
                    return out
                with watching({"": self.unet}) as found:
                    self.unet(*given, **named)
            if not found or found[0].weight:
                return out
            name = part_name(found[0].name.removeprefix("."))
            if name is None or name in self.rescued or found[0].dtype == torch.float32:
                return out
            self.rescued.add(name)
            warnings.warn(f"rescue: {name} overflows in {name_of(found[0].dtype)}; it is computed in float32", stacklevel=2)

    @contextmanager
    def widened(self) -> Iterator[None]:
        """The parts of the network, for one call, as those that take float32 and, where they are to, compute in it."""
        parts = [(name, module) for name, module in self.unet.named_modules() if name and part_name(name) == name]
        try:
            for name, module in parts:
                module.forward = partial(self.computed, name, module, module.forward)
            yield
        finally:
            for _, module in parts:
                vars(module).pop("forward", None)

    def computed(self, name: str, module: nn.Module, own: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """What comes in float32 did not fit the narrower numbers; what goes out does so only where it does not fit, either."""
        dtype = dtype_of(module, torch.float32)
        fits = all(value.dtype == dtype for value in floats(given))
        if name not in self.rescued and fits:
            return own(*given, **named)
        if name not in self.wide:
            self.wide[name] = without_hooks(module).float()
        out = self.wide[name](*(value.float() if floats([value]) else value for value in given), **named)
        narrow = out.to(dtype)
        return narrow if finite([narrow]) else out


def without_hooks(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    for each in made.modules():
        vars(each).pop("forward", None)
        each._forward_hooks.clear()
    return made


def part_name(name: str) -> str | None:
    """The layer of a block of the UNet that a module is in, such as "input_blocks.4.1", or what stands outside of blocks."""
    words = name.split(".")
    depth = {"input_blocks": 3, "output_blocks": 3, "middle_block": 2}.get(words[0], 1)
    return ".".join(words[:depth]) if name and len(words) >= depth else None

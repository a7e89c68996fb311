"""A walk down some noise levels, and which way it may take.

    recorded    the sampler's program: one graph a call, the network fused.  Taken where all of it is linear
    network     the sampler's own generator; the network fused and recorded
    plain       the generator and the modules as they stand

Nothing claims to be fast: a sampler's program is derived from its one definition, an affine guide has no other than its
weights, and a network is fused only if every module is of the class that it was built of, without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Call, Denoiser, Guide, Known, Network, Observer, Timeline, Unet, is_affine
from ..diffusion.levels import Levels
from ..diffusion.program import Program
from ..diffusion.samplers import Sampler

HISTORY_BYTES = 256 << 20  # beyond, the way of the network: 100 steps of Heun over 8 pictures of SDXL would keep 400 MB


Way = Literal["recorded", "network", "plain"]


class Moment(NamedTuple):
    """A step of a walk."""

    latents: Tensor  # (B, C, h, w), at the level that is left
    denoised: Tensor  # the estimate of the finished ones
    before: Tensor  # the latents that the step began from
    call: Call | None  # the first question of this step, if it asked any
    way: Way


@dataclass(frozen=True)
class Walk:
    """Latents down some noise levels, with one network, one sampler and one guide."""

    network: Network
    sampler: Sampler
    levels: Levels
    conditioning: Sequence[Timeline]  # for each role of the guide
    guide: Guide
    program: Program | None = None  # of the sampler over these levels, where it has one
    options: Mapping[str, object] = field(default_factory=dict)  # of the sampler
    known: Known | None = None
    transform: Callable[[Moment], Tensor] | None = None  # what the latents become after each step
    observe: Observer | None = None  # is shown every call

    def denoiser(self, unet: Unet | None = None) -> Denoiser:
        """For this walk; unet: what computes the network in its place."""
        network = replace(self.network, unet=unet or self.network.unet)
        total = len(self.program.sigmas) if self.program else None
        return Denoiser(network, self.conditioning, self.guide, self.known, self.observe, total)


def way(walk: Walk, x: Tensor, built: Settings) -> tuple[Way, str]:
    """The fastest way that computes exactly this walk from x (B, C, h, w), and why none faster."""
    assert isinstance(walk.network.unet, nn.Module)
    if why := touched(walk.network.unet, built):
        return "plain", why
    if walk.transform or walk.observe:
        return "network", "a caller watches or edits the steps"
    if not is_affine(walk.guide):
        return "network", f"{name_of(walk.guide)} is not a weighted sum of what the network answers"
    if walk.program is None:
        return "network", f"the steps of {walk.sampler.label} depend on what the network answers"
    if len({each.context.shape for timeline in walk.conditioning for _, each in timeline.entries}) > 1:
        return "network", "the conditioning changes its length"
    if walk.program.questions.shape[1] * x.numel() * 4 > HISTORY_BYTES:
        return "network", "the history of so many steps would take too much memory"
    return "recorded", ""


def name_of(guide: Guide) -> str:
    return getattr(getattr(guide, "function", guide), "__name__", type(guide).__name__)


Settings = dict[str, tuple[type, dict[str, Any]]]
OURS = ("torch", "minisd")  # whose classes the fused forms know
OWN = ("forward", "hidden_states", "final_norm", "pooled", "encode", "decode", "embed", "down")  # what a module may be asked


def structure(network: nn.Module) -> Settings:
    """The class of every module, by its name, and what it was built with."""
    return {name: (type(module), settings(module)) for name, module in network.named_modules()}


def settings(module: nn.Module) -> dict[str, Any]:
    """Numbers and words of a module, such as eps, heads, padding_mode."""
    known = vars(module).items()
    return {name: value for name, value in known if name != "training" and isinstance(value, int | float | str | tuple)}


def patched(kind: type) -> bool:
    """Whether somebody has put another `forward` into a class since it was written."""
    forward = kind.forward  # type: ignore[attr-defined]
    if forward is nn.Module.forward:
        return False
    written = ((base.__module__, f"{base.__qualname__}.forward") for base in kind.__mro__)
    return hasattr(forward, "__wrapped__") or (forward.__module__, forward.__qualname__) not in written


def touched(network: nn.Module, built: Settings) -> str | None:
    """What keeps a network from being computed in another form than its modules: the first of them that is not as built."""
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "there is a hook on all modules"
    count = 0
    for name, module in network.named_modules():
        kind, count = type(module), count + 1
        where = name or "the network"
        if name not in built:
            return f"{where} is new"
        if built[name][0] is not kind or kind.__module__.split(".")[0] not in OURS:
            return f"{where} is a {kind.__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has a hook"
        if not vars(module).keys().isdisjoint(OWN) or patched(kind):
            return f"{where} has a forward of its own"
        if built[name][1] != settings(module):
            changed = [key for key, value in settings(module).items() if built[name][1].get(key) != value]
            return f"{where} was given another {', '.join(changed)}"
    return None if count == len(built) else "a module is gone"

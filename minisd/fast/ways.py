"""A walk down some noise levels, and which way it may take.

    recorded    the sampler's program: one graph a call, the network fused.  Taken where all of it is linear
    network     the sampler's own generator; the network fused and recorded
    plain       the generator and the modules as they stand

Nothing claims to be fast: a sampler's program is derived from its one definition, an affine guide has no other than its
weights, and a network is fused only if every module is of the class that it was built of, without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    control: Callable[[Unet, Denoiser], Unet] | None = None  # (the UNet, who asks it) -> with what controls add to it

    def denoiser(self, unet: Unet | None = None) -> Denoiser:
        """For this walk; unet: what computes the network in its place."""
        network = replace(self.network, unet=unet or self.network.unet)
        total = len(self.program.sigmas) if self.program else None
        made = Denoiser(network, self.conditioning, self.guide, self.known, self.observe, total)
        if self.control:
            made.network = replace(network, unet=self.control(network.unet, made))
        return made


def way(walk: Walk, x: Tensor, built: Built) -> tuple[Way, str]:
    """The fastest way that computes exactly this walk from x (B, C, h, w), and why none faster."""
    assert isinstance(walk.network.unet, nn.Module)
    if why := touched(walk.network.unet, built):
        return "plain", why
    if walk.control:
        return "plain", "a ControlNet or T2I-Adapter adds to the network"
    if torch.is_autocast_enabled(x.device.type):
        return "plain", "autocast is on"
    if walk.transform or walk.observe:
        return "network", "a caller watches or edits the steps"
    if not is_affine(walk.guide):
        return "network", f"{name_of(walk.guide)} is not a weighted sum of what the network answers"
    if walk.sampler.pair:
        return "network", f"{walk.sampler.label} asks for the estimate of the negative prompt as well"
    if walk.program is None:
        return "network", f"the steps of {walk.sampler.label} depend on what the network answers"
    if len({each.context.shape for timeline in walk.conditioning for _, each in timeline.entries}) > 1:
        return "network", "the conditioning changes its length"
    if walk.program.questions.shape[1] * x.numel() * 4 > HISTORY_BYTES:
        return "network", "the history of so many steps would take too much memory"
    return "recorded", ""


def name_of(guide: Guide) -> str:
    return getattr(getattr(guide, "function", guide), "__name__", type(guide).__name__)


Built = dict[str, tuple[type, list[tuple[str, Any]], list[str]]]
OURS = ("torch", "minisd")  # whose classes the fused forms know
# What a module may be asked, and what the fused forms compute without asking it.
OWN = ("forward", "hidden_states", "final_norm", "pooled", "encode", "decode", "embed", "down", "_conv_forward")


def structure(network: nn.Module) -> Built:
    """The class of every module, by its name, and what it was built with: numbers and words such as eps, heads, padding_mode."""

    def settings(module: nn.Module) -> list[tuple[str, Any]]:
        known = vars(module).items()
        return [(name, value) for name, value in known if name != "training" and isinstance(value, int | float | str | tuple)]

    def weights(module: nn.Module) -> list[str]:
        return [name for name, weight in module._parameters.items() if weight is not None]

    return {name: (type(module), settings(module), weights(module)) for name, module in network.named_modules()}


def patched(kind: type) -> bool:
    """Whether somebody has put another `forward` or the like into a class since it was written."""
    for name in OWN:
        found = getattr(kind, name, None)
        if found is None or found is nn.Module.forward:
            continue
        written = ((base.__module__, f"{base.__qualname__}.{name}") for base in kind.__mro__)
        if hasattr(found, "__wrapped__") or (found.__module__, found.__qualname__) not in written:
            return True
    return False


def hooked(module: nn.Module, looking: bool) -> bool:
    """Whether a module has a hook; looking: also those that say of themselves that they only look, by an attribute."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(looking or not getattr(hook, "only_looks", False) for hook in hooks)


def touched(network: nn.Module, built: Built, looking: bool = True) -> str | None:
    """What keeps a network from being computed in another form than its modules: the first of them that is not as built.

    looking: hooks that only look count, too.
    """
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "there is a hook on all modules"
    count, known = 0, set[type]()
    for name, module in network.named_modules():
        kind, count = type(module), count + 1
        where = name or "the network"
        if name not in built:
            return f"{where} is new"
        if built[name][0] is not kind or kind.__module__.split(".")[0] not in OURS:
            return f"{where} is a {kind.__name__}"
        if hooked(module, looking):
            return f"{where} has a hook"
        if not vars(module).keys().isdisjoint(OWN) or (kind not in known and patched(kind)):
            return f"{where} has a forward of its own"
        known.add(kind)
        own = vars(module)
        for setting, value in built[name][1]:
            if own.get(setting) != value:
                return f"{where} was given another {setting}"
        if [name for name, weight in module._parameters.items() if weight is not None] != built[name][2]:
            return f"{where} was given another weight"
    return None if count == len(built) else "a module is gone"


@contextmanager
def lasting() -> Iterator[None]:
    """What is made within can be written to from then on, in inference mode and outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def version_of(x: Tensor) -> int:
    """Grows when a tensor is written to; those of inference mode do not count."""
    return 0 if x.is_inference() else x._version


def address_of(x: Tensor) -> int:
    """Changes when a tensor's memory is another; 0 of one that has none of its own."""
    with torch._C.DisableTorchFunctionSubclass():  # or one that is held in another form would be made plain, to have an address
        return x.data_ptr()


class AsLoaded:
    """Networks as a file gave them, and what has been done to them since."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self.built = [(network, structure(network)) for network in networks]
        self.weights = self.now()

    def now(self) -> list[tuple[Tensor, int]]:
        return [(weight, version_of(weight)) for network, _ in self.built for weight in network.parameters()]

    @contextmanager
    def layering(self) -> Iterator[None]:
        """What is written to within is no change by a stranger: the recipe tells of it by itself."""
        clean = self.changed() is None
        yield
        if clean:
            self.weights = self.now()

    def changed(self) -> str | None:
        for network, built in self.built:
            if why := touched(network, built, looking=False):
                return f"{type(network).__name__}: {why}"
        now = [weight for network, _ in self.built for weight in network.parameters()]
        same = len(now) == len(self.weights)
        same &= all(x is weight and version_of(x) == version for x, (weight, version) in zip(now, self.weights, strict=False))
        return None if same else "weights were written to"


class Snapshot:
    """A network as it stands, and whether it still does: cheap enough to be asked between two steps."""

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        self.children = [
            (each._modules, name, child) for each in modules for name, child in each._modules.items() if child is not None
        ]
        weights = [(each._parameters, name, weight) for each in modules for name, weight in each._parameters.items()]
        self.weights = [(own, name, x, address_of(x), version_of(x)) for own, name, x in weights if x is not None]

    def still(self) -> bool:
        for branch, name, child in self.children:
            if branch.get(name) is not child or child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
                return False
        for leaves, name, weight, address, version in self.weights:
            if leaves.get(name) is not weight or version_of(weight) != version or address_of(weight) != address:
                return False
        return True

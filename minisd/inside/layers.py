"""Two ways to compute the same network, layer by layer: where an error enters, where it accumulates, how near numbers are to the
end of float16.

Both sides get the same inputs: of one drawing by A some calls of the UNet, the texts before it and the latents behind it.
Where it enters: each module of B is given what A's was given, so its error is its own.  Where it accumulates: B runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..fast.lossy.float8 import E4M3
from ..models.family import UNET, VAE
from ..options import number
from ..request import Request
from ..result import finish
from ..system.device import name_of
from .sides import LARGEST_HALF, Side, Stage
from .sketches import apart, distance, sketch
from .taps import makes_value, tap

SUMS = 4096  # of the sketches by which accumulated errors are measured: to 2 %, and exactly where there are no more numbers
ULPS = [0.0, 0.5, *(2.0**k for k in range(11))]  # upper ends of the histogram's bins; beyond is one more
TEXTS, DECODER = "texts", "decoder"
# What a layer's own error may be where the sides round differently: a few times what was measured for healthy ones.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3, E4M3: 0.1}
FUSED_BOUND = 1e-5  # in float32 on a CPU, of the layers of a fused form, which only sum in another order


@dataclass
class Layer:
    """What was found of a module, over all stages."""

    name: str
    kind: str
    inner: bool  # holds no other modules that make a value
    order: int = 0  # in which modules ended first
    entering: float = 0.0  # the largest relative error, given A's inputs
    accumulated: float = 0.0
    largest: float = 0.0  # of the absolute numbers that A's made

    def facts(self) -> dict[str, Any]:
        margin = LARGEST_HALF / self.largest if self.largest else None
        return {
            "name": self.name, "kind": self.kind, "inner": self.inner, "entering": self.entering,
            "accumulated": self.accumulated, "largest": self.largest, "margin": margin,
        }  # fmt: skip


@dataclass
class Found:
    """All of a comparison, as it goes on."""

    a: Side
    b: Side
    layers: dict[str, Layer] = field(default_factory=dict)
    ulps: Tensor = field(default_factory=lambda: torch.zeros(len(ULPS) + 1, dtype=torch.int64))
    made: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)  # sketches of A's: stage, module, how often before
    stage: str = ""
    times: dict[str, int] = field(default_factory=dict)

    def layer(self, name: str, module: nn.Module) -> Layer:
        if name not in self.layers:
            fused = self.b.fused is not None  # whose layers have no modules within
            inner = fused or not any(makes_value(each) for each in module.modules() if each is not module)
            self.layers[name] = Layer(name, type(module).__name__, inner, len(self.layers))
        return self.layers[name]

    def place(self, name: str) -> tuple[str, str, int]:
        self.times[name] = count = self.times.get(name, -1) + 1
        return self.stage, name, count

    def see_a(self, name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Tensor) -> None:
        """A's module has ended: B's runs on the same inputs."""
        layer, other = self.layer(name, module), self.b.pipe.model.get_submodule(name)
        compute = self.b.form(name)
        layer.largest = max(layer.largest, float(made.abs().max()))
        self.made[self.place(name)] = sketch(made, SUMS)
        inputs = [self.b.given(value, other) for value in given]
        options = {key: self.b.given(value, other) for key, value in named.items()}
        with self.b.computing():
            found = compute(*inputs, **options)
        layer.entering = worst(layer.entering, distance(found, made) if found.shape == made.shape else float("inf"))
        if layer.inner and found.shape == made.shape:
            self.ulps += histogram(found, made, self.b.dtype)

    def see_b(self, name: str, made: Tensor) -> None:
        """B's module has ended, or what stands in its place."""
        wanted = self.made.get(self.place(name))
        if wanted is not None:
            self.layers[name].accumulated = worst(self.layers[name].accumulated, apart(sketch(made, SUMS), wanted))

    def see_whole(self, name: str, module: nn.Module, wanted: Tensor, made: Tensor) -> None:
        """A fused network has ended: what differs here and in none of its layers is in how they are put together."""
        layer = self.layer(name, module)
        layer.inner, layer.largest = False, max(layer.largest, float(wanted.abs().max()))
        layer.entering = layer.accumulated = worst(layer.entering, distance(made, wanted))


def worst(before: float, now: float) -> float:
    return float("inf") if now != now else max(before, now)


def histogram(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """How many numbers are how many units in the last place of `dtype` off: (len(ULPS) + 1,)."""
    limits, wanted = torch.finfo(dtype), wanted.double().cpu()
    exponent = torch.frexp(wanted.abs().clamp(min=limits.smallest_normal)).exponent - 1
    unit = limits.eps * exponent.double().exp2()
    off = ((found.double().cpu() - wanted).abs() / unit).nan_to_num(float("inf"), float("inf"))
    places = torch.bucketize(off.flatten(), torch.tensor(ULPS, dtype=torch.float64))
    return torch.bincount(places, minlength=len(ULPS) + 1)


@contextmanager
def hooked(side: Side, see: Callable[..., None], names: Container[str] | None = None) -> Iterator[None]:
    """Shows what all modules make, or those of some names."""
    with ExitStack() as hooks:
        for name, module in side.pipe.model.named_modules():
            if name and makes_value(module) and (names is None or name in names):
                hooks.callback(module.register_forward_hook(partial(see, name), with_kwargs=True).remove)
        yield


@torch.no_grad()
def numerics(a: Side, b: Side, request: Request, bound: float | None = None) -> dict[str, Any]:
    """Facts about how far B is from A, ready for JSON.

    request: the drawing of A whose first, middle and last call of the UNet are compared, and its texts and finished latents.
    bound: of a layer's own relative error; by default what its number format may cost, and 0 where both sides have the same
    on the same device, so that whatever differs at all is found.
    first: the first layer whose own error is past it, or None; first_accumulated: likewise of what has accumulated; layers: in
    the order in which they end, with `entering`, `accumulated`, `largest` (of the absolute numbers) and `margin`, how many times
    that fits below float16's 65,504; ulps: how many numbers of the innermost layers were how many units in the last place off.
    Raises UsageError where the two are not the same network.
    """
    check_same(a, b)
    bound = default_bound(a, b) if bound is None else number(0, 1e9).check("bound", bound)
    found = Found(a, b)
    for stage, run in stages(a, request):
        found.stage, found.times = stage, {}
        if b.fused:
            compare_fused(found, stage, run)
            continue
        with hooked(a, found.see_a):
            run(a)
        found.times = {}
        with b.computing(), hooked(b, lambda name, *ended: found.see_b(name, ended[-1])):
            run(b)
    return facts_of(found, bound)


def default_bound(a: Side, b: Side) -> float:
    same = a.dtype == b.dtype and a.pipe.device == b.pipe.device and not (b.kernels or b.fused or b.emulated)
    if b.fused and b.pipe.device.type == "cpu" and a.dtype == b.dtype == torch.float32:
        return FUSED_BOUND
    return 0.0 if same else max(BOUNDS[a.dtype], BOUNDS[b.dtype])


def check_same(a: Side, b: Side) -> None:
    if a.pipe is b.pipe:
        raise UsageError("b: expected another pipeline than a, found the very same")
    ours, theirs = ({name: tuple(w.shape) for name, w in each.pipe.model.named_parameters()} for each in (a, b))
    if ours != theirs:
        name = min(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise UsageError(f"b: expected the same network as a, found {name} {theirs.get(name)}, there {ours.get(name)}")


def stages(a: Side, request: Request) -> list[Stage]:
    """What is run on either side: the texts, three calls of the UNet, the VAE's decoder."""
    negative = request.negative_prompt if isinstance(request.negative_prompt, str) else ""
    texts = [negative, str(request.prompt)]
    with tap(a.pipe, UNET) as values:
        result = finish(a.pipe.stream(request))
    calls = list(values)
    chosen = sorted({0, len(calls) // 2, len(calls) - 1})
    latents = result.latents[:1] / a.pipe.codec.scale * a.pipe.codec.std + a.pipe.codec.mean

    def unet(inputs: tuple[Any, ...], side: Side) -> Tensor:
        x, t, *rest = inputs
        own = side.pipe.unet
        told = [side.given(value, own) for value in rest]
        return side.unet(side.given(x, own), t.to(side.pipe.device), *told)

    return [
        (TEXTS, lambda side: side.pipe.encode_prompt(texts, plain_prompt=True)),
        *((f"call {i}", partial(unet, calls[i].inputs)) for i in chosen),
        (DECODER, lambda side: side.decode(side.given(latents, side.pipe.vae))),
    ]


def compare_fused(found: Found, stage: str, run: Callable[[Side], object]) -> None:
    """The fused UNet or decoder of B by its layers, and as a whole.  The text encoders have no fused form."""
    a, b = found.a, found.b
    if stage == TEXTS or b.fused is None:
        return
    with hooked(a, found.see_a, b.fused.parts):
        wanted = run(a)
    found.times = {}
    with b.fused.watching(found.see_b):
        made = run(b)
    assert isinstance(wanted, Tensor)
    assert isinstance(made, Tensor)
    if stage == DECODER:
        found.see_whole(VAE, b.pipe.vae, wanted, made)
        return
    found.see_b(f"{UNET}.out", made)
    found.see_whole(UNET, b.pipe.unet, wanted, made)


def facts_of(found: Found, bound: float) -> dict[str, Any]:
    layers = sorted(found.layers.values(), key=lambda layer: layer.order)
    first = next((layer for layer in layers if layer.entering > bound), None)
    accumulated = next((layer for layer in layers if layer.accumulated > bound), None)
    names = [*(f"{end:g}" for end in ULPS), f"more than {ULPS[-1]:g}"]
    return {
        "a": found.a.label,
        "b": found.b.label,
        "bound": bound,
        "rounding": name_of(found.b.dtype),
        "first": first.facts() if first else None,
        "first_accumulated": accumulated.facts() if accumulated else None,
        "layers": [layer.facts() for layer in layers],
        "ulps": dict(zip(names, found.ulps.tolist(), strict=True)),
    }


def by_part(facts: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The layers of each part of the networks in a row: the largest of what enters in it, and what has accumulated at its end."""
    rows = []
    for name in names:
        within = [layer for layer in facts["layers"] if layer["name"] == name or layer["name"].startswith(f"{name}.")]
        if not within:
            continue
        inner = [layer for layer in within if layer["inner"]]
        worst_layer = max(inner, key=lambda layer: layer["entering"])
        rows.append({
            "name": name, "entering": worst_layer["entering"], "in": worst_layer["name"],
            "accumulated": within[-1]["accumulated"], "largest": max(layer["largest"] for layer in within),
        })  # fmt: skip
    return rows

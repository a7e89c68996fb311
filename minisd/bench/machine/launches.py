"""What a GPU would launch for a step and for a picture: every kernel with its arithmetic and its bytes, from the meta device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...fast.decoder import FusedDecoder
from ...fast.lossy.float8 import to_float8
from ...fast.lossy.networks import form_of
from ...files.model import NoInit
from ...models import ops
from ...models.family import UNET, VAE
from ...models.shapes import below
from ...models.unet import UNet
from ...models.vae import AutoencoderKL
from ...warmup import networks
from ...workbench import blueprint
from ..networks import Published
from ..shapes import as_written, in_the_place_of_kernels
from .kinds import OTHERS, class_of

WHOLE = 256  # pixels of a map whose GroupNorm is one launch: kernels/group_norm.py

CONV, LINEAR, ATTENTION = "convolution", "linear", "attention"
FLOAT8 = "product in float8"


@dataclass(frozen=True)
class Launch:
    name: str
    kind: str  # as `class_of` sorts
    bytes: int
    flops: int = 0
    sizes: tuple[int, ...] = ()  # of products: batch, M, N, K; of attention: the channels of a head


def size_of(*tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


class Library(TorchDispatchMode):
    """Notes what PyTorch launches; what stands for a kernel of ours is noted by `Kernels`, and muted here."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Launch] = []
        self.muted = 0

    @contextmanager
    def mute(self) -> Iterator[None]:
        self.muted += 1
        try:
            yield
        finally:
            self.muted -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.muted and not func.is_view and not re.search("empty|zeros|full|_unsafe_view|lift_fresh|detach", func.name()):
            self.note(func.overloadpacket.__name__, args, result)
        return result

    def note(self, name: str, args: Any, result: Any) -> None:
        if name == "convolution":
            x, weight, bias = args[:3]
            self.seen.append(convolution(x, weight, result))
            if bias is not None:
                self.seen.append(Launch("bias of a convolution", OTHERS, 2 * size_of(result)))
        elif name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            a, b = args[-2:]
            self.seen.append(product(a, b, result, accumulates=name in ("addmm_", "baddbmm")))
        elif name == "_scaled_mm":
            a, b, *scales = args[:4]
            (m, k), n = a.shape, b.shape[1]
            self.seen.append(Launch(FLOAT8, LINEAR, size_of(a, b, *scales, result), 2 * m * n * k, (1, m, n, k)))
        elif name in ("clone", "_to_copy") and result.dim() == 4 and result.dtype == args[0].dtype:
            pass  # how the meta device is brought to lay out maps as a GPU does by itself
        else:
            kind = "GroupNorm, SiLU" if name == "silu" else class_of(name)
            self.seen.append(Launch(name, kind, size_of(*args, *(result if isinstance(result, tuple) else (result,)))))


def convolution(x: Tensor, weight: Tensor, result: Tensor) -> Launch:
    m, n, k = result.numel() // result.shape[1], result.shape[1], prod(weight.shape[1:])
    return Launch("convolution", CONV, size_of(x, weight, result), 2 * m * n * k, (1, m, n, k))


def product(a: Tensor, b: Tensor, result: Tensor, accumulates: bool = False) -> Launch:
    (m, k), n, batch = a.shape[-2:], b.shape[-1], prod(a.shape[:-2])
    moved = size_of(a, b, result) + (size_of(result) if accumulates else 0)
    return Launch("product", LINEAR, moved, 2 * batch * m * n * k, (batch, m, n, k))


class Kernels:
    """Stands in the place of minisd.kernels: notes its launches, and gives the reference's result."""

    def __init__(self, real: Any, library: Library) -> None:
        self.real, self.library = real, library

    def __getattr__(self, name: str) -> Any:
        if name not in self.real.KERNELS:
            return getattr(self.real, name)

        def call(*given: Any, **more: Any) -> Any:
            with self.library.mute():
                result = self.real.KERNELS[name].reference(*given, **more)
                results = result if isinstance(result, tuple) else (result,)
                made = (as_written(results[0], given[0]), *results[1:])  # a map, and statistics of it
            moved = size_of(*given, *more.values(), *made)
            self.library.seen += LAUNCHES[name](given, made, more) if name in LAUNCHES else [Launch(name, class_of(name), moved)]
            return made if isinstance(result, tuple) else made[0]

        return call


def group_norm(given: tuple[Any, ...], made: tuple[Tensor, ...], more: dict[str, Any]) -> list[Launch]:
    (y,) = made
    kind = "GroupNorm, SiLU"
    if more.get("known") is not None:  # by who wrote the map
        return [Launch("group_norm, apply", kind, 2 * size_of(y))]
    if y[0, 0].numel() <= WHOLE:
        return [Launch("group_norm, whole", kind, 2 * size_of(y))]
    return [Launch("group_norm, statistics", kind, size_of(y)), Launch("group_norm, apply", kind, 2 * size_of(y))]


def layer_norm(given: tuple[Any, ...], made: tuple[Tensor, ...], more: dict[str, Any]) -> list[Launch]:
    written = size_of(given[0]) if more.get("addend") is not None else 0  # of the stream
    return [Launch("layer_norm", class_of("layer_norm"), size_of(*given, *more.values(), *made) + written)]


def upsample_conv(given: tuple[Any, ...], made: tuple[Tensor, ...], more: dict[str, Any]) -> list[Launch]:
    (x, phases, *_), (y, *_) = given, made
    b, c, height, width = x.shape
    m, n, k = b * (height + 1) * (width + 1), len(phases), 4 * c
    between = m * n * x.element_size()
    first = Launch("convolution of an upsampling", CONV, size_of(x, phases) + between, 2 * m * n * k, (1, m, n, k))
    return [first, Launch("interleave", CONV, between + size_of(y))]


def wide_attention(given: tuple[Any, ...], made: tuple[Tensor, ...], more: dict[str, Any]) -> list[Launch]:
    q, k = given[:2]
    batch, heads, length, d = q.shape
    keys, scores = k.shape[2], q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    flops, half = 2 * scores * d, q.element_size()
    one = Launch("product of an attention", ATTENTION, 4 * scores + 2 * size_of(q), flops, (batch * heads, length, keys, d))
    two = Launch("product of an attention", ATTENTION, half * scores + 2 * size_of(q), flops, (batch * heads, length, d, keys))
    return [one, Launch("exponentials", ATTENTION, (4 + half) * scores), two, Launch("division", ATTENTION, 3 * size_of(q))]


LAUNCHES = {
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "upsample_conv": upsample_conv,
    "wide_attention": wide_attention,
}


@contextmanager
def watching() -> Iterator[Library]:
    """Every launch within, by the rules of `auto` on a GPU."""
    library = Library()
    ask = ops.REPLACEMENTS["attention"]

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Callable[..., Tensor]:
        def noted(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
            flops = 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
            library.seen.append(Launch("attention", ATTENTION, 2 * size_of(q) + size_of(k, v), flops, (q.shape[2] // heads,)))
            with library.mute():
                return torch.empty_like(q, memory_format=torch.contiguous_format)

        return ask(q, k, v, heads, causal) or noted

    ops.REPLACEMENTS["attention"] = attention
    try:
        with in_the_place_of_kernels(lambda real: Kernels(real, library)), library:
            yield library
    finally:
        ops.REPLACEMENTS["attention"] = ask


def on_meta(make: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    with torch.device("meta"), NoInit():
        return make().to(dtype).requires_grad_(False).eval()


@torch.no_grad()
def of_step(model: Published, side: int, dtype: torch.dtype, fp8: bool = False) -> list[Launch]:
    """A step with guidance for one picture: the fused UNet and the sampler's, as fast/cuda.py records them."""
    unet = on_meta(lambda: UNet(below(model.shapes(), UNET)), dtype)
    with torch.device("meta"), networks.ChannelsLast(), watching() as library:
        if fp8:
            to_float8(unet)
        form = form_of(unet)
        assert form is not None
        fused = form(unet)
        given, ready = networks.unet_input(unet, (side, side)), networks.prepared(fused, 2)
        fused(given, *ready)  # the first makes what is kept
        library.seen.clear()
        networks.sampler_step(fused(given, *ready), given, masked=False)
    return library.seen


@torch.no_grad()
def of_decoding(model: Published, side: int, dtype: torch.dtype) -> list[Launch]:
    vae = on_meta(lambda: AutoencoderKL(below(blueprint.sd15(), VAE)), dtype)
    with torch.device("meta"), networks.ChannelsLast(), watching() as library:
        decoder = FusedDecoder(vae)
        x = torch.empty(1, vae.latent_channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        decoder(x)
        library.seen.clear()
        decoder(x)
    return library.seen

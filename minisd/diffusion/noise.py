"""Where the samplers' noise comes from: a picture's seed, and the rule by which a program makes numbers of it.

cpu    minisd's, A1111's with its option RNG "CPU", and diffusers' with a generator for each picture: PyTorch's generator on the
       CPU, one for each picture, whose first draw is what the picture starts from and whose further ones are the sampler's.
nv     A1111's RNG "NV", which gives on any machine what "GPU", its default, gives on one of Nvidia's: likewise, by Philox.
comfy  ComfyUI's: one draw for all pictures of a batch, and for the sampler the same generator from its beginning once more.

All of it is float32 from the CPU, whatever the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .denoiser import Noise

Stream = Callable[[tuple[int, ...]], Tensor]  # shape -> unit noise, float32; goes on from call to call
# What the three are called elsewhere: by A1111's and stable-diffusion.cpp's option, and by whose they are.
DIALECTS = {"cpu": "cpu", "nv": "nv", "comfy": "comfy"}
DIALECTS |= {"a1111": "cpu", "a1111-cpu": "cpu", "diffusers": "cpu", "minisd": "cpu", "comfyui": "comfy"}
DIALECTS |= {"a1111-gpu": "nv", "a1111-nv": "nv", "gpu": "nv", "cuda": "nv", "philox": "nv"}


@dataclass(frozen=True)
class Origin:
    """What the noise of a picture is made of."""

    seed: int
    subseed: int | None = None  # of another noise, towards which the first goes
    strength: float = 0.0  # 0 … 1, how far
    following: int | None = None  # the seed of the sampler's noise, where it is another
    index: int = 0  # dialect comfy: which picture of its batch it is,
    batch: int = 1  # and how many there are


def dialect_named(name: object) -> str:
    """cpu, nv or comfy, from what other programs call it.  Raises UsageError."""
    text = str(name).casefold().replace("_", "-").replace(" ", "-")
    if text not in DIALECTS:
        close = get_close_matches(text, DIALECTS, 1)
        meant = f"did you mean {DIALECTS[close[0]]}? " if close else ""
        raise UsageError(f"rng: {str(name)[:80]!r} is unknown; {meant}expected cpu, nv or comfy")
    return DIALECTS[text]


def noise(
    seed: int | Sequence[int],
    shape: Sequence[int],
    dialect: str = "cpu",
    subseed: int | None = None,
    subseed_strength: float = 0.0,
) -> Tensor:
    """The unit noise of this shape that a seed stands for, float32 on the CPU: what `latents` of a Request takes.

    seed: 0 … 2**64 - 1, or a list of them.
    shape: (C, h, w) of one picture, or (B, C, h, w): picture i has seed + i, or the i-th of the list; in dialect comfy all of
        them come out of one draw (of a list, each from a draw of its own).  Any other shape is one draw.
    dialect: cpu, nv (a1111-gpu) or comfy; see above.
    subseed, subseed_strength: A1111's variation, 0 … 1: picture i has this very seed, and goes towards the noise of subseed + i.
    Raises UsageError.
    """
    kind, sizes = dialect_named(dialect), tuple(int(side) for side in shape)
    if any(side < 1 for side in sizes) or not sizes:
        raise UsageError(f"shape: expected one or more numbers above 0, found {sizes}")
    if subseed_strength and kind == "comfy":
        raise UsageError("subseed: expected dialect cpu or nv, found comfy, which has none")
    count, one = (sizes[0], sizes[1:]) if len(sizes) == 4 else (1, sizes)
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise UsageError(f"seed: expected one, or {count} for shape {sizes}, found {len(seed)}")
        origins = [Origin(each) for each in seed]
    else:
        held = kind == "comfy" or bool(subseed_strength)
        origins = [Origin(seed + (0 if held else i), index=i, batch=count) for i in range(count)]
    if subseed_strength:
        origins = [Origin(each.seed, (subseed or 0) + i, subseed_strength) for i, each in enumerate(origins)]
    found, _ = sources(kind, origins, one, torch.device("cpu"))
    return found.reshape(sizes)


def sources(dialect: str, origins: Sequence[Origin], shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Noise]:
    """Unit noise (B, C, h, w) for B pictures of shape (C, h, w): what they start from, and the source of all that follows."""
    firsts, draw = whole_batch(origins, shape) if dialect == "comfy" else per_picture(STREAMS[dialect], origins, shape)
    return firsts.to(device), lambda sigma, following: draw().to(device)


def per_picture(
    stream: Callable[[int], Stream], origins: Sequence[Origin], shape: tuple[int, ...]
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Each picture has a generator of its own: picture i equals the single run with its seed (A1111 rng.py, ImageRNG)."""
    own = [stream(origin.seed) for origin in origins]
    firsts = [each(shape) for each in own]
    for i, origin in enumerate(origins):
        if origin.subseed is not None and origin.strength:
            firsts[i] = slerp(origin.strength, firsts[i], stream(origin.subseed)(shape))
        if origin.following is not None:
            own[i] = stream(origin.following)
    return torch.stack(firsts), lambda: torch.stack([each(shape) for each in own])


def whole_batch(origins: Sequence[Origin], shape: tuple[int, ...]) -> tuple[Tensor, Callable[[], Tensor]]:
    """One draw for all pictures of a batch, of which each has its part (ComfyUI sample.py, prepare_noise).

    The sampler's begins at the beginning again, so that its first draw is the noise that was started from (ComfyUI
    k_diffusion/sampling.py, default_noise_sampler, on a CPU).
    """
    batches = dict.fromkeys((origin.seed, origin.batch) for origin in origins)

    def taken(streams: dict[tuple[int, int], Stream]) -> Tensor:
        drawn = {(seed, count): stream((count, *shape)) for (seed, count), stream in streams.items()}
        return torch.stack([drawn[origin.seed, origin.batch][origin.index] for origin in origins])

    following = {key: torch_stream(key[0]) for key in batches}
    return taken({key: torch_stream(key[0]) for key in batches}), lambda: taken(following)


def torch_stream(seed: int) -> Stream:
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def philox_stream(seed: int) -> Stream:
    """PyTorch's numbers on a GPU of Nvidia's, up to rounding, for as many as the GPU makes at once (some 200,000)."""
    calls = 0

    def draw(shape: tuple[int, ...]) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.from_numpy(philox(seed, math.prod(shape), calls - 1)).view(shape)

    return draw


STREAMS: dict[str, Callable[[int], Stream]] = {"cpu": torch_stream, "comfy": torch_stream, "nv": philox_stream}
LOW = np.uint64(0xFFFFFFFF)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85
UNIT = float(np.float32(2.0**-32))
TURN = float(np.float32(2.0**-32) * np.float32(2 * math.pi))  # rounded as cuRAND has it


def philox(seed: int, count: int, call: int) -> np.ndarray:
    """Unit noise (count,), float32: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the
    counter (call, 0, i, 0) for number i, and of its first two words one number by Box and Muller (A1111 rng_philox.py)."""
    zeros, shift = np.zeros(count, np.uint64), np.uint64(32)
    a, b, c, d = zeros + np.uint64(call), zeros, np.arange(count, dtype=np.uint64), zeros
    for i in range(10):
        keys = [np.uint64(((seed >> at & 0xFFFFFFFF) + i * step) & 0xFFFFFFFF) for at, step in zip((0, 32), WEYL, strict=True)]
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = second >> shift ^ b ^ keys[0], second & LOW, first >> shift ^ d ^ keys[1], first & LOW
    radius = np.sqrt(-2 * np.log(a * UNIT + UNIT / 2))
    return np.asarray(radius * np.sin(b * TURN + TURN / 2), dtype=np.float32)


def slerp(strength: float, low: Tensor, high: Tensor) -> Tensor:
    """From one noise (C, h, w) towards another on the sphere, each column of a channel by itself; where the two are nearly the
    same, in a straight line from high to low.  Both as A1111 has it (rng.py, slerp)."""
    dot = (low / low.norm(dim=1, keepdim=True) * (high / high.norm(dim=1, keepdim=True))).sum(1)
    if dot.mean() > 0.9995:
        return low * strength + high * (1 - strength)
    angle = dot.acos()
    shares = ((1 - strength) * angle).sin() / angle.sin(), (strength * angle).sin() / angle.sin()
    return shares[0].unsqueeze(1) * low + shares[1].unsqueeze(1) * high

"""What is kept of a large tensor where the tensor itself would be too much: a hash, its norm, and sums that tell how far off
another is.

The sums are a count sketch (Charikar, Chen, Farach-Colton 2002): each number gets a random sign and goes to one of SUMS places.
The sketch is linear, so the difference of two sketches is the sketch of the difference, and the square of its norm is, in the
mean over the signs, the square of the difference's norm; its relative deviation is sqrt(2 / SUMS).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..models.unet import UNet
from ..models.vae import AutoencoderKL, Decoder, Encoder
from .taps import makes_value

SUMS = 64


@lru_cache(maxsize=64)
def signs(count: int, sums: int) -> Tensor:
    """Of as many numbers, filled up to whole rows: (ceil(count / sums), sums), 1 or -1, always the same."""
    rows = -(-count // sums)
    drawn = torch.randint(0, 2, (rows, sums), generator=torch.Generator().manual_seed(count), dtype=torch.int8)
    return drawn * 2 - 1


def sketch(x: Tensor, sums: int = SUMS) -> Tensor:
    """The norm of x, and its sums: (1 + sums,), float64.  With no more numbers than sums they are the numbers themselves."""
    flat = x.detach().flatten().double().cpu()
    sign = signs(len(flat), sums)
    padded = torch.cat([flat, flat.new_zeros(sign.numel() - len(flat))])
    return torch.cat([flat.norm().view(1), (padded.view_as(sign) * sign).sum(0)])


def apart(found: Tensor, wanted: Tensor) -> float:
    """How far a tensor is from the wanted one, as a part of the wanted one's norm, by their sketches."""
    return relative(float((found[1:] - wanted[1:]).norm()), float(wanted[0]))


def distance(found: Tensor, wanted: Tensor) -> float:
    """The same by the tensors themselves."""
    wanted = wanted.double().cpu()
    return relative(float((found.double().cpu() - wanted).norm()), float(wanted.norm()))


def relative(difference: float, norm: float) -> float:
    return difference / norm if norm else 0.0 if difference == 0 else float("inf")


def fingerprint(x: Tensor) -> str:
    """16 digits of the sha256 of its numbers, shape and number format."""
    x = x.detach().contiguous().cpu()
    head = f"{x.dtype} {tuple(x.shape)}".encode()
    return hashlib.sha256(head + x.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def parts_of(network: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network that make a value each: blocks of the UNet, layers of a text encoder, levels of the VAE."""
    for own, child in network.named_children():
        path = f"{name}.{own}" if name else own
        if makes_value(child) and not isinstance(child, UNet | AutoencoderKL | Encoder | Decoder):
            yield path, child
        else:
            yield from parts_of(child, path)

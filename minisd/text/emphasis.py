"""What the weights of a prompt do to the hidden states of a text encoder: (T texts, 77*k positions, D channels)."""

from __future__ import annotations

import torch
from torch import Tensor

from .tokenizer import LENGTH


def scaled(z: Tensor, weights: Tensor, counts: Tensor, keep_mean: bool) -> Tensor:
    """z times its weights (T, 77*k), and so that each chunk keeps its mean, as A1111 does (sd_emphasis.py, Original, No norm).

    counts: (T,), how often each text is in the batch over which the mean is taken: that of one prompt's editing.
    """
    y = z.float() * weights[..., None]
    if keep_mean:
        ratio = chunk_means(z, counts) / chunk_means(y, counts)  # (k,)
        y = y * ratio.float().to(y.device).repeat_interleave(LENGTH)[:, None]
    return y.to(z.dtype)


def chunk_means(x: Tensor, counts: Tensor) -> Tensor:
    """The mean of each chunk over texts, positions and channels, (k,), in float64: it is small beside what it is made of."""
    by_text = x.cpu().double().view(len(x), -1, LENGTH, x.shape[-1]).mean((2, 3))  # (T, k)
    return (by_text * counts[:, None]).sum(0) / counts.sum()


def away_from(empty: Tensor, z: Tensor, weights: Tensor) -> Tensor:
    """From the empty prompt's vector at the same position, `empty` (77*k, D), as far as the weights (T, 77*k) say.

    ComfyUI comfy/sd1_clip.py, encode_token_weights: (z - e) w + e.
    """
    y = (z.float() - empty.float()) * weights[..., None] + empty.float()
    return torch.where(weights[..., None] == 1, z, y.to(z.dtype))

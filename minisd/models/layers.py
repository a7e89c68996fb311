"""The layers that all the networks share, each made from the names and shapes of its weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .ops import group_norm, layer_norm
from .shapes import Shapes


def linear(shapes: Shapes, name: str, bias: bool = True) -> nn.Linear:
    out_features, in_features = shapes[f"{name}.weight"]
    return nn.Linear(in_features, out_features, bias)


def conv(shapes: Shapes, name: str, stride: int = 1) -> nn.Conv2d:
    out_channels, in_channels, size, _ = shapes[f"{name}.weight"]
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in 32 groups (as everywhere in Stable Diffusion), with the SiLU that follows it in most places."""

    def __init__(self, channels: int, eps: float, silu: bool = False) -> None:
        super().__init__(32, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return layer_norm(x, self.weight, self.bias, self.eps)


class Pointwise(nn.Linear):
    """A linear map over the channels, (..., C_in) -> (..., C_out).

    Published files store the same map as a linear layer (C_out, C_in) or as a 1x1 convolution (C_out, C_in, 1, 1);
    the weight keeps the rank that the file gives it.
    """

    def __init__(self, shapes: Shapes, name: str) -> None:
        shape = shapes[f"{name}.weight"]
        super().__init__(shape[1], shape[0])
        self.weight = nn.Parameter(self.weight.detach().view(*self.weight.shape, *(1 for _ in shape[2:])))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)

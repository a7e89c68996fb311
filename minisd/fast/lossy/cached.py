"""DeepCache: the deep part of the UNet every n-th time, its features reused between (Ma et al. 2024, arXiv 2312.00858).

From one step to the next the maps deep in the network change little, those near the picture much.  So between two whole calls
only the first input blocks and the last output blocks are computed, on top of what came up from the deep the last time.  It is
lossy: `minisd bench accuracy` says how much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models.unet import UNet

SHALLOW = 1  # input blocks, and as many output blocks, that every call computes: the paper's shallowest branch


class Reusing(nn.Module):
    """A UNet for the length of a walk, of which the deep part is computed every n-th call, and where the batch changes."""

    def __init__(self, unet: UNet, every: int) -> None:
        super().__init__()
        self.unet, self.every, self.count = unet, every, 0
        self.deep: Tensor | None = None  # (B, C, H, W), what the first of the last output blocks is given from below

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None, **named: Any) -> Tensor:
        """As the UNet's own."""
        unet = self.unet
        whole = self.deep is None or len(self.deep) != len(x) or self.count % self.every == 0
        self.count = 1 if whole else self.count + 1
        emb = unet.embed(t, y, x.dtype)
        if whole:
            *skips, x = unet.down(x, emb, context)
            x = up(unet.output_blocks[:-SHALLOW], x, skips, emb, context)
            self.deep = x
        else:
            skips = []
            for block in unet.input_blocks[:SHALLOW]:
                x = block(x, emb, context)
                skips.append(x)
            assert self.deep is not None
            x = self.deep
        return unet.out(up(unet.output_blocks[-SHALLOW:], x, skips, emb, context))


def up(blocks: Any, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor) -> Tensor:
    """Some of the output blocks, as in `UNet.forward`; takes their skips from the list."""
    for block in blocks:
        x = torch.cat([x, skips.pop()], dim=1)
        x = block(x, emb, context, skips[-1].shape[-2:] if skips else None)
    return x

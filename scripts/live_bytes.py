"""How much memory the tensors of a computation take at their peak, counted on any device, without the machine's noise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that is made under it, for as long as it lives; views count once.

    `peak` is what has to be there at once, apart from what was there before (weights, input).  Work space inside a single
    operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {identity(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and identity(x) not in self.storages | inputs:
                self.count(x)
        return result

    def count(self, x: torch.Tensor) -> None:
        key = identity(x)
        size = x.numel() * x.element_size() if x.is_mkldnn else x.untyped_storage().nbytes()
        self.storages.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(x if x.is_mkldnn else x.untyped_storage(), self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.now -= size


def identity(x: torch.Tensor) -> int:
    """Of its memory; what oneDNN has in an order of its own has no storage, and no views."""
    return id(x) if x.is_mkldnn else x.untyped_storage()._cdata


def peak_bytes(run: Callable[[], object]) -> int:
    with LiveBytes() as counted:
        run()
    return counted.peak

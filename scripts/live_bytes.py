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
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.storages | inputs:
                self.count(x.untyped_storage())
        return result

    def count(self, storage: Any) -> None:
        self.storages.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, storage: int, size: int) -> None:
        self.storages.remove(storage)
        self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    with LiveBytes() as counted:
        run()
    return counted.peak

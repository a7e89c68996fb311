"""Weights that stay in oneDNN's order, in the place of the plain ones.

A product or a convolution brings its weight into an order of oneDNN's own at every call, which is a twentieth of a product of 512
rows, and a tenth of a convolution over 16x16 pixels.  Here a weight is in that order from its first use on, and the plain one is
let go, so that memory stays as it is.  The module's parameter then has a shape and a type, and no numbers: whoever asks for those
(a LoRA, `state_dict`, the module's own forward) makes it plain again, and so it stays until it is next multiplied with, and as
long as anybody but the module holds it: what is written there is the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any
from weakref import getweakrefs

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...system.memory import give_back
from ..ways import lasting, version_of

ALONE = 2  # users of a storage that nobody but its tensor has: that, and who asks
MOST_FREE, free = 128 << 20, [0]  # bytes
LOCK = RLock()  # around a change of form: a thread may read what another multiplies with


class Weight:
    """The weight of one layer or, one above the other, of several with the same input, in one of two forms."""

    def __init__(self, plain: Tensor, parts: int = 1) -> None:
        """plain (N, K) of linear layers or (C', C, 3, 3) of a convolution; parts: into how many equal ones it is packed."""
        self.shape, self.dtype, self.parts = plain.shape, plain.dtype, parts
        self.form: Tensor | tuple[Tensor, ...] = plain  # or its parts in oneDNN's order
        self.order: tuple[int, ...] = ()  # what these were made for: a convolution's map and its stride

    def plain(self) -> Tensor:
        form = self.form
        if isinstance(form, Tensor):
            return form
        with LOCK, lasting():
            if not isinstance(self.form, Tensor):
                parts = [part.to_dense() for part in self.form]
                unpacked = parts[0] if len(parts) == 1 else torch.cat(parts)
                self.form = unpacked.contiguous(memory_format=torch.channels_last) if unpacked.dim() == 4 else unpacked
            return self.form

    def forget(self) -> None:
        """Plain, and with no numbers yet."""
        if isinstance(self.form, tuple):
            with lasting():
                strides = torch.channels_last if len(self.shape) == 4 else torch.contiguous_format
                self.form = torch.empty(self.shape, dtype=self.dtype, memory_format=strides)

    def packed(self, pack: Callable[[Tensor], Tensor], order: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        """Its parts in oneDNN's order, as `pack` makes it, another for each `order`; kept, if nobody else holds the plain one."""
        form = self.form
        if isinstance(form, tuple) and order == self.order:
            return form
        with LOCK:
            plain = self.plain()
            alone = users(plain) <= ALONE  # and nobody comes while the lock is held
            packed = tuple(pack(part) for part in plain.chunk(self.parts))
            if alone:
                self.order, self.form = order, packed
                give_back_at_times(plain.nbytes)
            return packed


def give_back_at_times(size: int) -> None:
    """So many bytes more are free, in pieces that others do not always fit into: now and then all of it goes back."""
    free[0] += size
    if free[0] > MOST_FREE:
        free[0] = 0
        give_back(torch.device("cpu"))


def users(x: Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)  # type: ignore[attr-defined, no-any-return]


def hold(weight: Weight, layers: Sequence[nn.Module]) -> bool:
    """Makes it the weight of layers, one above the other, if nobody else holds a parameter of theirs in a way that cannot follow.

    The parameters stay the same objects, written to as often as before.
    """
    parameters: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    if any(each._use_count() > 1 or getweakrefs(each) or learns(each) for each in parameters):  # type: ignore[attr-defined]
        return False
    row = 0
    for parameter in parameters:
        with lasting():  # or nobody could tell when it is written to
            made = Held(weight, row, parameter)
        vars(made).update(vars(parameter) | vars(made))  # what somebody has noted there
        for _ in range(version_of(parameter)):
            torch.autograd.graph.increment_version(made)
        torch.utils.swap_tensors(parameter, made)
        row += len(parameter)
    return True


def learns(x: Tensor) -> bool:
    """Whether it has a gradient, or somebody waits for one."""
    return x.grad is not None or bool(x._backward_hooks)


class Held(Tensor):
    """The parameter of a layer whose weight may be packed: a tensor like any other to all who do not look."""

    weight: Weight
    row: int
    _is_param = True

    @staticmethod
    def __new__(cls, weight: Weight, row: int, like: Tensor) -> Held:
        made: Held = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made.weight, made.row = weight, row
        return made

    def plain(self) -> Tensor:
        with LOCK:  # until it is a user of its own
            rows = self.weight.plain()[self.row : self.row + len(self)]
            return rows.as_strided(self.shape, self.stride(), rows.storage_offset())

    def before_copy(self, source: Tensor) -> None:
        """What is written over as a whole, as a LoRA's other strength is, need not be unpacked first."""
        whole = source.shape == self.shape and self.numel() == self.weight.shape.numel()
        if whole and source is not self and source.device == self.device and source.layout == torch.strided:
            self.weight.forget()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation: of the plain weight.  What is written to counts as written to here, too, and through views of it."""
        count_writes(func, args)
        with LOCK:
            if func is torch.ops.aten.copy_.default and isinstance(args[0], Held):
                args[0].before_copy(args[1])
            args, kwargs = tree_map(lambda x: x.plain() if isinstance(x, Held) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What reads memory without an operation is asked of a parameter that is plain."""
        with torch._C.DisableTorchFunctionSubclass():
            if func == SET_DATA:
                if args[0] is args[1]:  # `Module.to` where there is nothing to do
                    return None
                args[0].weight, args[0].row = Weight(args[1].detach()), 0
            elif func in READS_MEMORY:
                args = (args[0].parameter(), *args[1:])
            return func(*args, **(kwargs or {}))

    def parameter(self) -> nn.Parameter:
        return nn.Parameter(self.detach(), self.requires_grad)

    def __deepcopy__(self, known: dict[int, Any]) -> nn.Parameter:
        return copy.deepcopy(self.parameter(), known)


def count_writes(func: Any, args: Any) -> None:
    """Counts what is written to: an operation on a list of tensors (torch._foreach_add_) leaves that to those on each."""
    for written, given in zip(func._schema.arguments, args, strict=False):
        if written.alias_info and written.alias_info.is_write and isinstance(given, list | tuple):
            torch.autograd.graph.increment_version(x for x in given if not x.is_inference())


SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
READS_MEMORY = {
    Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.numpy, Tensor.tolist, Tensor.share_memory_, Tensor.is_shared,
    Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__reduce_ex__,
}  # fmt: skip

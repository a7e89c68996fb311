"""Triton's interpreter, made to compute bfloat16 and float8 as a GPU does.

As of Triton 3.9 it cuts float32 off to bfloat16 where a GPU rounds, and multiplies bfloat16 matrices by their bit patterns.  Of
a number that e4m3 rounds up to a power of two it makes half of that.  That of Triton 3.6 makes an index of an array of one
number, which NumPy refuses from 2.4 on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
    x = np.asarray(x, order="C")
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(x.view(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    if (source, target) == (tl.float32, tl.float8e4nv):
        return torch.from_numpy(x.view(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (source, target) == (tl.bfloat16, tl.float32), (source, target)
    return x.view(np.uint16).astype(np.uint32) << 16


def repair_index(patch: Any = interpreter._patch_lang_tensor) -> None:
    """For good: without it Triton 3.6 interprets nothing beside a new NumPy."""

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def wide(x: Any) -> Any:
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle(convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

        return dot(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)

"""The kinds of work that a step is made of, by the names of what does it."""

from __future__ import annotations

import re

# By the name of a kernel, or of PyTorch's operation; the first that matches counts.
CLASSES = {
    "attention": r"attention|attend|flash|fmha|sdpa|softmax|exponentials_kernel",
    "GEGLU": r"geglu|gelu",
    "convolution": r"interleave|conv|fprop|dgrad",
    "GroupNorm, SiLU": r"partial_kernel|apply_kernel|whole_kernel|group_?norm|rowwisemoments|silu",
    "LayerNorm": r"layer_?norm",
    "linear": r"nvjet|gemm|gemv|cutlass|cublas|linear|\bmm\b|addmm|bmm|splitk",
    "sampler, guidance": r"linear_step",
    "concatenation": r"cat",
}
OTHERS = "sums and copies"


def class_of(name: str) -> str:
    found = (label for label, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHERS)

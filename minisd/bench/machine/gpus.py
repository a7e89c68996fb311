"""GPUs by their data sheets, and what part of those figures work reaches.

The shares are fitted to what prototypes of these networks took on an H200, and taken over for every other GPU as they are.  So a
prediction is good for orders and for ratios, and no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """name: how torch.cuda.get_device_name begins, NVIDIA's own word left out."""

    name: str
    sms: int
    bandwidth: float  # bytes a second
    half: float  # operations a second in float16 and bfloat16, sums in float32, without sparsity
    l2: float  # bytes


GPUS = {
    "a100": Gpu("A100", 108, 2.039e12, 312e12, 40e6),  # SXM, 80 GB
    "a40": Gpu("A40", 84, 0.696e12, 149.7e12, 6e6),
    "rtx3090": Gpu("GeForce RTX 3090", 82, 0.936e12, 71e12, 6e6),
    "l4": Gpu("L4", 58, 0.300e12, 121e12, 48e6),
    "l40s": Gpu("L40S", 142, 0.864e12, 362e12, 96e6),
    "rtx4090": Gpu("GeForce RTX 4090", 128, 1.008e12, 165.2e12, 72e6),
    "h100": Gpu("H100", 132, 3.35e12, 989e12, 50e6),  # SXM
    "h200": Gpu("H200", 132, 4.8e12, 989e12, 50e6),
    "b200": Gpu("B200", 148, 8.0e12, 2250e12, 126e6),
    "rtx5090": Gpu("GeForce RTX 5090", 170, 1.792e12, 209.5e12, 96e6),
}

COPY = 0.87  # of the bandwidth: a large copy
PRODUCT = 0.75  # of the matrix rate: a large product, in large tiles
OF_COPY = ((0.4, 0.96), (1.0, 0.91), (float("inf"), 0.81))  # up to so many times the L2 cache: a kernel that only moves memory
LAUNCH = 1.2e-6  # seconds of a small kernel
GAP = 0.45e-6  # seconds between two kernels of a graph


def plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in " _-")


def is_gpu(name: str | None) -> bool:
    return name is not None and plain(name) in GPUS


def gpu_named(name: str) -> Gpu:
    """Raises UsageError."""
    if not is_gpu(name):
        raise UsageError(f"--device: expected one of {', '.join(GPUS)}, found {name!r}")
    return GPUS[plain(name)]


def gpu_called(device_name: str) -> Gpu | None:
    """That of torch.cuda.get_device_name, where it is known."""
    words = device_name.removeprefix("NVIDIA ")
    fitting = [gpu for gpu in GPUS.values() if f"{words} ".replace("-", " ").startswith(f"{gpu.name} ")]
    return fitting[0] if fitting else None

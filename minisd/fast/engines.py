"""Which engine draws with a model."""

from __future__ import annotations

import os

import torch

from ..errors import UsageError
from ..files.model import StableDiffusion
from .choice import chosen, settle_cudnn, wants
from .cpu.engine import Cpu
from .cuda import Cuda
from .engine import Engine, Plain


def engine(model: StableDiffusion, fast: bool | None = None) -> Engine:
    """What draws with a model; fast: False for the modules as they stand, None as MINISD_FAST (0 or 1) says."""
    if fast is None:
        said = os.environ.get("MINISD_FAST") or "1"
        if said not in ("0", "1"):
            raise UsageError(f"MINISD_FAST: expected 0 or 1, found {said!r}")
        fast = said == "1"
    device = next(model.parameters()).device
    if device.type == "cuda":
        settle_cudnn()
    on_cpu = fast and device.type == "cpu" and chosen().auto
    if on_cpu or wants("group_norm", device):  # which wants its maps so, as cuDNN does; now, so that all draws round the same
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not fast or device.type not in ("cuda", "cpu"):
        return Plain()
    networks = (*model.text_encoders, model.vae)
    return Cuda(model.unet, True, networks) if device.type == "cuda" else Cpu(model.unet, networks)

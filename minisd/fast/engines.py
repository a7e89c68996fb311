"""Which engine draws with a model."""

from __future__ import annotations

import os

import torch

from ..errors import UsageError
from ..files.model import StableDiffusion
from ..system.device import cpu_computes_bfloat16
from .choice import chosen, settle_cudnn, wants
from .cpu import compiled
from .cpu.engine import Cpu
from .cuda import Cuda
from .engine import Engine, Plain


def engine(model: StableDiffusion, device: torch.device, fast: bool | None = None) -> Engine:
    """What draws with a model on a device; fast: False for the modules as they stand, None as MINISD_FAST (0 or 1) says.

    On a CPU in bfloat16 without instructions for it the modules as they stand, too: nothing is fast there.  And where the parts
    of a model are brought to a GPU one at a time (offload), which no recording could follow.
    """
    if fast is None:
        said = os.environ.get("MINISD_FAST") or "1"
        if said not in ("0", "1"):
            raise UsageError(f"MINISD_FAST: expected 0 or 1, found {said!r}")
        fast = said == "1"
    here = next(model.parameters())
    on_cpu = fast and device.type == "cpu" and computes(here.dtype)
    if fast and device.type == "cpu":
        compiled.prepare(here.dtype)
    if device.type == "cuda":
        settle_cudnn()
    if (on_cpu and chosen().auto) or wants("group_norm", device):  # now, so that all draws round the same
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    networks = (*model.text_encoders, model.vae)
    if on_cpu:
        return Cpu(model.unet, networks)
    return Cuda(model.unet, True, networks) if fast and here.device.type == "cuda" else Plain()


def computes(dtype: torch.dtype) -> bool:
    """Whether a CPU has instructions for a number format."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_computes_bfloat16())

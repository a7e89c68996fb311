"""What a pipeline consists of, for those who are handed one: walks and requests, which it is made of itself."""

from __future__ import annotations

from typing import Protocol

import torch

from .codec import Codec
from .diffusion.denoiser import Network
from .fast.engine import Engine
from .files.checkpoint import Checkpoint
from .models.family import Family, Recognition, Training
from .text.conditioner import Conditioner


class Stations(Protocol):
    """`pipeline.Pipeline` is one."""

    checkpoint: Checkpoint
    recognition: Recognition
    family: Family
    training: Training
    device: torch.device
    dtype: torch.dtype  # of the UNet and the text encoders
    conditioner: Conditioner  # texts -> conditioning
    network: Network  # noisy latents and conditioning -> its answer
    engine: Engine  # walks down noise levels
    codec: Codec  # pictures <-> latents

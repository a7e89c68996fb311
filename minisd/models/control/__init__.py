"""Networks that see a picture and tell a UNet what to draw where: controlnet (a second encoder), t2i_adapter (features alone)."""

from .controlnet import ControlNet as ControlNet
from .t2i_adapter import T2IAdapter as T2IAdapter

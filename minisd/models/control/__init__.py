"""Networks that see a picture and tell a UNet what to draw where: controlnet (a second encoder), union (one for many kinds of
pictures), t2i_adapter (features alone), lllite (small changes of what attention sees)."""

from .controlnet import ControlNet as ControlNet
from .lllite import LLLite as LLLite
from .t2i_adapter import T2IAdapter as T2IAdapter
from .union import ControlNetUnion as ControlNetUnion

ControlModel = ControlNet | T2IAdapter | LLLite

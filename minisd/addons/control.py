"""ControlNets and T2I-Adapters while a picture is drawn: which act at which step, and what they add to the UNet.

Reference for when: diffusers, pipelines/controlnet/pipeline_controlnet.py (controlnet_keep): a share of the steps, whatever the
noise levels.  What several add is summed (MultiControlNetModel).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffusion.denoiser import Call, Unet
from ..errors import UsageError
from ..files.checkpoint import open_checkpoint
from ..library.names import resolve
from ..models.control import ControlNet, T2IAdapter
from ..models.fit import trunk
from ..models.shapes import Shapes
from ..models.unet import UNet
from ..pictures.init import Picture, fingerprint, opaque, open_picture, resized
from ..request import Stations
from ..system.memory import memory_errors
from .control_files import load_control
from .control_names import told
from .preprocess import check, preprocessed

MOST = 100.0  # a strength: beyond it is a slip of the hand
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL", 1280: "the SDXL refiner"}


@dataclass(frozen=True, eq=False)
class Control:
    """A network that sees a picture, and how much of the drawing follows it.

    source: a file, or as a text its name in the library (see `load_control`; it is read for every call), or what load_control
        made of one, which goes to the pipeline's device and dtype.
    image: the hint as the network was trained with it (edges, depth, a pose, …); scaled to the picture's size by Lanczos' filter,
        transparent parts on black.
    strength: times what the network adds.  start, end: shares of the steps, 0 … 1: step i of N, from 0, is left alone if i / N is
        less than start or (i + 1) / N more than end.
    preprocess: what makes the hint of the image, one of preprocess.PREPROCESS.
    """

    source: str | os.PathLike[str] | ControlNet | T2IAdapter
    image: Picture
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str = "none"

    def __post_init__(self) -> None:
        for name, low, high in (("strength", -MOST, MOST), ("start", 0, 1), ("end", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"controls: {name}: expected a number from {low:g} to {high:g}, found {repr(value)[:80]}")
        check(self.preprocess)
        if self.start >= self.end:
            raise UsageError(f"controls: start: expected less than end, {self.end}, found {self.start}")

    @property
    def path(self) -> str | None:
        return os.path.abspath(self.source) if isinstance(self.source, str | os.PathLike) else None

    def acts(self, step: int, steps: int) -> bool:
        """At this step of so many, counted from 0."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)

    def facts(self) -> dict[str, Any]:
        """What a recipe says of it; `as_controls` takes it again."""
        assert isinstance(self.image, Image.Image)  # as_controls has opened it
        file = getattr(self.image, "filename", None)
        image = {"image": os.path.abspath(file) if file else None, "image_sha256": fingerprint(self.image)}
        return {"source": self.path, **image, **{name: getattr(self, name) for name in KEPT[2:]}}


def as_controls(given: object) -> tuple[Control, ...]:
    """Of a list of Controls, or of what a recipe says of them: each with its picture opened, its file known for what it is.

    Raises UsageError, CheckpointError.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise UsageError(
            f"controls: expected a list, such as [minisd.Control('canny.safetensors', picture)], found {repr(given)[:80]}"
        )
    return tuple(opened(each) for each in given)


def opened(given: object) -> Control:
    control = from_recipe(given) if isinstance(given, Mapping) else given
    if not isinstance(control, Control):
        raise UsageError(f"controls: expected minisd.Control, found {repr(given)[:80]}")
    if isinstance(control.source, str | os.PathLike):
        path = resolve(control.source, "controlnet")
        told(open_checkpoint(path))
        control = replace(control, source=path)
    elif not isinstance(control.source, ControlNet | T2IAdapter):
        raise UsageError(f"controls: source: expected a path or what load_control gives, found {type(control.source).__name__}")
    image, given_image = open_picture("controls: image", control.image), control.image
    file = given_image if isinstance(given_image, str | os.PathLike) else getattr(given_image, "filename", None)
    image.filename = file and os.fspath(file)  # type: ignore[attr-defined]  # as a picture has that PIL has opened
    return replace(control, image=image)


KEPT = ("source", "image", "strength", "start", "end", "preprocess")


def from_recipe(facts: Mapping[str, Any]) -> Control:
    for name in ("source", "image"):
        if not isinstance(facts.get(name), str):
            raise UsageError(f"controls: {name}: the picture was made with one that had no file; it cannot be made again")
    return Control(**{name: facts[name] for name in KEPT if name in facts})


@dataclass(frozen=True, eq=False)
class Active:
    """A control whose network is ready, and what that makes of the picture."""

    control: Control
    network: ControlNet | T2IAdapter
    hint: Tensor | None  # (1, C, h, w), of a ControlNet
    added: Mapping[int, Tensor]  # of a T2I-Adapter


def activated(controls: Sequence[Control], pipe: Stations, width: int, height: int) -> tuple[Active, ...]:
    """The controls of a request, for pictures of this size.  Raises CheckpointError, UsageError, OutOfMemoryError."""
    with memory_errors():
        return tuple(active(each, pipe, width, height) for each in controls)


def active(control: Control, pipe: Stations, width: int, height: int) -> Active:
    unet = pipe.network.unet
    assert isinstance(unet, UNet)
    if isinstance(control.source, ControlNet | T2IAdapter):
        network = control.source.to(pipe.device, pipe.dtype)
    else:
        network = load_control(control.source, str(pipe.device), pipe.dtype, base=unet)
    check_fits(network, unet)
    picture = hint_of(control, width, height).to(pipe.device, pipe.dtype)
    if isinstance(network, ControlNet):
        return Active(control, network, network.hint(picture), {})
    return Active(control, network, None, network.added(picture))


def hint_of(control: Control, width: int, height: int) -> Tensor:
    """Its picture as (1, 3, H, W) in [0, 1], scaled by Lanczos' filter if it has another size, then preprocessed."""
    image = resized(opaque(open_picture("controls: image", control.image), "black").convert("RGB"), width, height)
    image = preprocessed(image, control.preprocess)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def check_fits(network: ControlNet | T2IAdapter, unet: UNet) -> None:
    """Raises UsageError unless the network was made for such a UNet."""
    shapes = Shapes({key: tuple(value.shape) for key, value in unet.state_dict().items()})
    _, widths = trunk(shapes, unet.context_channels, unet.vector_channels)  # of what is added to
    if isinstance(network, T2IAdapter):
        kind, made_for = "T2I-Adapter", "Stable Diffusion XL" if network.patch == 16 else "Stable Diffusion 1.x"
        fits = (network.patch == 16) == bool(unet.vector_channels) and network.places[-1] < len(widths)
        theirs, ours = network.channels, [widths[i] for i in network.places if i < len(widths)]
    else:
        kind, made_for = "ControlNet", family(network.context_channels, network.vector_channels)
        # The smallest ones of SDXL take no text.
        fits = network.context_channels in (0, unet.context_channels) and network.vector_channels == unet.vector_channels
        theirs, ours = [out[0].out_channels for out in (*network.zero_convs, network.middle_block_out)], widths
    if not fits or theirs != ours:
        model = family(unet.context_channels, unet.vector_channels)
        raise UsageError(f"controls: expected a {kind} for {model}, found one for {made_for} (it adds to {theirs} channels)")


def family(context: int, vector: int) -> str:
    """By the width of the text that a network takes, and of the vector beside it."""
    known = FAMILIES.get(2048 if (context, vector) == (0, 2816) else context)
    return known or f"a model with {context} channels of text and {vector} beside it"


def controlled(controls: Sequence[Active], steps: int, unet: Unet, calls: Sequence[Call]) -> Unet:
    """A UNet with what the controls add to it, at the step that the last of the calls belongs to.

    A UNet that is told more than the latents (a mask, a picture) has them first; a ControlNet sees them alone.
    """
    add: Callable[..., Tensor] = unet

    def predict(x: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        residuals: list[Tensor] = []
        added: dict[int, Tensor] = {}
        for each in controls:
            strength = each.control.strength
            if not strength or not each.control.acts(calls[-1].step, steps):
                continue
            if isinstance(each.network, ControlNet) and each.hint is not None:
                found = each.network.residuals(x[:, : each.network.in_channels], each.hint, t, context, y)
                found = [strength * residual for residual in found]
                residuals = [one + other for one, other in zip(residuals, found, strict=True)] if residuals else found
            for i, feature in each.added.items():
                added[i] = added[i] + strength * feature if i in added else strength * feature
        return add(x, t, context, y, residuals, added)

    return predict

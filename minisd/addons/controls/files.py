"""Opening a ControlNet or one of its kin: from a file to a network that is ready to run.

References: lllyasviel/ControlNet (tool_transfer_control.py for files of differences), ComfyUI comfy/controlnet.py (ControlLora,
and which file names mean pooling), TencentARC/T2I-Adapter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.model import compare, described, load_to, ready
from ...models.control import ControlModel
from ...models.control.controlnet import OWN, ControlNet, check_control
from ...models.control.lllite import LLLite, check_lllite
from ...models.control.t2i_adapter import T2IAdapter, check_adapter
from ...models.control.union import ControlNetUnion, check_union
from ...models.family import UNET
from ...models.shapes import Shapes
from ...system.device import to_device, to_dtype
from .names import ADAPTER, CONTROL_LORA, DIFFERENCE, LLLITE, UNION, own_key, told

Made = TypeVar("Made", bound=nn.Module)
POOLED = ("_shuffle", "_shuffle_fp16")  # endings of file names (ComfyUI controlnet.py, load_controlnet_state_dict)


def load_control(
    path: str | os.PathLike[str],
    device: str | None = "cpu",
    dtype: str | torch.dtype = torch.float32,
    base: Any = None,
    pooled: bool | None = None,
) -> ControlModel:
    """Opens a ControlNet (one for many kinds of pictures, too), a ControlNet-LLLite or a T2I-Adapter and makes it ready to run.

    path: a .safetensors, .pth or .ckpt file with the names of lllyasviel, TencentARC, xinsir or kohya, or those of diffusers; a
        Control-LoRA; a file of differences.
    device, dtype: as in `minisd.load`.
    base: a pipeline or its UNet, which a Control-LoRA and a file of differences add to; not changed.  No other kind needs it.
    pooled: whether each addition of a ControlNet counts by its mean alone; by default if its name ends as that of "shuffle".
    Raises CheckpointError (the file), UsageError (the other arguments).
    """
    where = to_device(device)
    kind = to_dtype(dtype, where)
    checkpoint = open_checkpoint(path)
    title, names = told(checkpoint)
    shapes = Shapes({ours: checkpoint.shapes[own] for ours, own in names.items()})
    if title in BUILT:
        network = built(checkpoint, title, names, shapes, *BUILT[title])
        return loaded(network, weights_of(checkpoint, names, kind, where), where)
    if pooled is None:
        pooled = checkpoint.path.stem.endswith(POOLED)
    under = base_weights(checkpoint, title, base) if title in MERGED else {}
    whole = merged_shapes(checkpoint, names, shapes, under) if under else shapes
    control = built(checkpoint, title, names, whole, lambda found: ControlNet(found, pooled), check_control)
    weights = weights_of(checkpoint, names, torch.float32 if under else kind, where)
    if under:
        weights = {key: value.to(kind) for key, value in MERGED[title](weights, under).items()}
    return loaded(control, weights, where)


def built(
    checkpoint: Checkpoint,
    title: str,
    names: Mapping[str, str],
    shapes: Shapes,
    make: Callable[[Shapes], Made],
    check: Callable[[Shapes], None],
) -> Made:
    """A network with these shapes, on the meta device.  Raises CheckpointError, in the names that the file has."""
    try:
        described(checkpoint, title, lambda: check(shapes))
        network = described(checkpoint, title, lambda: make(shapes))
        compare(checkpoint, title, network, shapes)
    except CheckpointError as error:
        raise CheckpointError(checkpoint.path, error.reason, error.hint, own_key(names, error.key)) from None
    return network


def loaded(network: Made, weights: Mapping[str, Tensor], device: torch.device) -> Made:
    network.load_state_dict({key: weights[key] for key in network.state_dict()}, strict=True, assign=True)
    return ready(network, device)


def weights_of(checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file by our names."""
    found = load_to(checkpoint, names.values(), dtype, device)
    return {ours: found[own].to(device) for ours, own in names.items()}


def base_weights(checkpoint: Checkpoint, title: str, base: Any) -> dict[str, Tensor]:
    """What a UNet has in common with a ControlNet, by name; of a pipeline as the file has it, whatever LoRAs are on.

    Raises UsageError if there is none.
    """
    unet = getattr(base, "unet", base)
    if not isinstance(unet, nn.Module) or not hasattr(unet, "input_blocks"):
        found = "none" if base is None else type(base).__name__
        raise UsageError(f"base: expected the pipeline or UNet that {checkpoint.path.name}, {title}, adds to, found {found}")
    file = base.stack.changed_from() if hasattr(base, "stack") else {}
    weights = {key: file.get(f"{UNET}.{key}", value) for key, value in unet.state_dict().items()}
    return {key: value for key, value in weights.items() if key.split(".")[0] in OWN}


def merged_shapes(checkpoint: Checkpoint, names: Mapping[str, str], shapes: Shapes, base: Mapping[str, Tensor]) -> Shapes:
    """Shapes of a base and a file together; what is whole in the file counts.  Raises CheckpointError where they do not fit."""
    found = {key: tuple(value.shape) for key, value in base.items()}
    for key, shape in shapes.items():
        module, _, end = key.rpartition(".")
        if end in ("up", "down"):
            check_factors(checkpoint, names, shapes, found.get(f"{module}.weight"), key)
        elif found.setdefault(key, shape) != shape:
            reason = f"expected the base's shape {found[key]}, found {shape}"
            raise CheckpointError(checkpoint.path, reason, "give the base that it was made for", names[key])
    return Shapes(found)


def check_factors(
    checkpoint: Checkpoint, names: Mapping[str, str], shapes: Shapes, weight: tuple[int, ...] | None, key: str
) -> None:
    """Whether the two factors of a tensor make one of the base's shape.  Raises CheckpointError."""
    up, down = (shapes.get(f"{key.rpartition('.')[0]}.{end}") for end in ("up", "down"))
    if not up or not down or not weight:
        lacks = "a weight of the base that it adds to" if up and down else "both of up and down"
        raise CheckpointError(checkpoint.path, f"expected {lacks}", "give the base that it was made for", names[key])
    rank, columns = math.prod(up[1:]), math.prod(weight[1:])
    if (up[0], down[0], math.prod(down[1:])) != (weight[0], rank, columns):
        wanted = f"({weight[0]}, r) and (r, {columns}), which the base's shape {weight} takes"
        raise CheckpointError(checkpoint.path, f"expected factors {wanted}, found {up} and {down}", key=names[key])


def with_factors(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Control-LoRA on its base: W + up down, both flattened behind their first axis (ComfyUI, ControlLoraOps); what the file
    has whole takes the base's place."""
    whole = {key: value for key, value in weights.items() if not key.endswith((".up", ".down"))}
    device = next(iter(weights.values())).device
    found = {key: value.to(device, torch.float32) for key, value in base.items()} | whole
    for key, up in weights.items():
        module, _, end = key.rpartition(".")
        if end == "up":
            weight = found[f"{module}.weight"]
            found[f"{module}.weight"] = weight + (up.flatten(1) @ weights[f"{module}.down"].flatten(1)).view_as(weight)
    return found


def with_differences(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of differences on its base: W + d where the base has a tensor of that name."""
    return {key: value + base[key].to(value) if key in base else value for key, value in weights.items()}


BUILT: dict[str, tuple[Callable[[Shapes], Any], Callable[[Shapes], None]]] = {
    ADAPTER: (T2IAdapter, check_adapter),
    UNION: (ControlNetUnion, check_union),
    LLLITE: (LLLite, check_lllite),
}
MERGED = {CONTROL_LORA: with_factors, DIFFERENCE: with_differences}

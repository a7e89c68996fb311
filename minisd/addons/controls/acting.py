"""ControlNets and their kin while a picture is drawn: which act at a call of the network, and what they add to the UNet.

References: when, diffusers' pipelines/controlnet/pipeline_controlnet.py (controlnet_keep) and ComfyUI's comfy/controlnet.py
(get_control) with comfy/model_sampling.py (percent_to_sigma).  What several add is summed (MultiControlNetModel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...diffusion.denoiser import Call, Denoiser, Unet
from ...diffusion.schedule import TRAINING_STEPS, Continuous, Schedule
from ...models.control import ControlModel, ControlNet, ControlNetUnion, LLLite
from ...models.control.lllite import Lent, applied
from ...models.unet import UNet
from ...pictures.init import opaque, open_picture, resized
from ...request import Stations
from ...system.memory import memory_errors
from .control import Control
from .files import load_control
from .fitting import check_fits
from .preprocess import preprocessed

EQUAL = 1e-6  # of a noise level: what two ways to compute the same one may differ by


@dataclass(frozen=True, eq=False)
class Active:
    """A control whose network is ready, and what that makes of the picture."""

    control: Control
    network: ControlModel
    hint: Tensor | None = None  # (1, C, h, w), of a ControlNet
    added: Mapping[int, Tensor] | None = None  # of a T2I-Adapter
    seen: Mapping[str, Tensor] | None = None  # of an LLLite

    @property
    def where(self) -> str:
        # "The ControlNet must be put only on the conditional side of cfg scale" (ControlNet 1.1, of shuffle), as diffusers does.
        pooled = isinstance(self.network, ControlNet) and self.network.pooled
        return self.control.where or ("positive" if self.control.guess or pooled else "both")


def activated(controls: Sequence[Control], pipe: Stations, width: int, height: int) -> tuple[Active, ...]:
    """The controls of a request, for pictures of this size; a file is read once.

    Raises CheckpointError, UsageError, OutOfMemoryError.
    """
    networks: dict[Any, ControlModel] = {}
    with memory_errors():
        for each in controls:
            if each.source not in networks:
                networks[each.source] = network_of(each, pipe)
        return tuple(active(each, networks[each.source], pipe, width, height) for each in controls)


def network_of(control: Control, pipe: Stations) -> ControlModel:
    unet = pipe.network.unet
    assert isinstance(unet, UNet)
    if isinstance(control.source, nn.Module):
        network = control.source.to(pipe.device, pipe.dtype)
    else:
        network = load_control(control.source, str(pipe.device), pipe.dtype, base=pipe)
    check_fits(network, unet, pipe.codec.vae.downscale)
    return network


def active(control: Control, network: ControlModel, pipe: Stations, width: int, height: int) -> Active:
    picture = hint_of(control, width, height).to(pipe.device, pipe.dtype)
    if isinstance(network, ControlNet):
        return Active(control, network, hint=network.hint(picture))
    if isinstance(network, LLLite):
        return Active(control, network, seen=network.seen(picture))
    return Active(control, network, added=network.added(picture))


def hint_of(control: Control, width: int, height: int) -> Tensor:
    """Its picture as (1, 3, H, W) in [0, 1], scaled by Lanczos' filter if it has another size, then preprocessed."""
    image = resized(opaque(open_picture("controls: image", control.image), "black").convert("RGB"), width, height)
    image = preprocessed(image, control.preprocess)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def acts(control: Control, call: Call, steps: int, schedule: Schedule) -> bool:
    """At this call of the network, of so many steps."""
    if not control.strength:
        return False
    if control.range == "noise":
        high, low = level_at(schedule, control.start), level_at(schedule, control.end)
        return low * (1 - EQUAL) <= call.sigma <= high * (1 + EQUAL)
    return not (call.step / steps < control.start or (call.step + 1) / steps > control.end)


def level_at(schedule: Schedule, share: float) -> float:
    """The noise level at a share of the timesteps, from the last; beyond all at 0, none at 1."""
    if share <= 0 or share >= 1:
        return math.inf if share <= 0 else 0.0
    if isinstance(schedule, Continuous):
        return float(schedule.low * (schedule.high / schedule.low) ** (1 - share))
    return float(schedule.sigma(torch.tensor((1 - share) * (TRAINING_STEPS - 1), dtype=torch.float64)))


def controlled(controls: Sequence[Active], steps: int, unet: Unet, denoiser: Denoiser) -> Unet:
    """A UNet with what the controls add to it, at the last call of a denoiser.

    A UNet that is told more than the latents (a mask, a picture) has them first; a ControlNet sees them alone.
    """
    add: Callable[..., Tensor] = unet

    def predict(x: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        call, schedule = denoiser.calls[-1], denoiser.network.schedule
        roles = [denoiser.guide.roles[k] for k in denoiser.asked]
        acting = [each for each in controls if acts(each.control, call, steps, schedule) and any(asked_of(each, roles))]
        masks = {each: rows(asked_of(each, roles), x) for each in acting}
        residuals = summed([residuals_of(group, masks[group[0]], x, t, context, y) for group in together(acting)])
        added = summed_features([each for each in acting if each.added], masks)
        lent = [lent_by(each, masks[each]) for each in acting if each.seen]
        if not lent:
            return add(x, t, context, y, residuals, added)
        assert isinstance(unet, nn.Module)
        with applied(unet, lent):
            return add(x, t, context, y, residuals, added)

    return predict


def lent_by(control: Active, mask: Tensor | None) -> Lent:
    assert isinstance(control.network, LLLite)
    assert control.seen is not None
    return Lent(control.network, control.seen, control.control.strength, mask)


def asked_of(control: Active, roles: Sequence[str]) -> list[bool]:
    """Whether a control is for each of the roles that a call asks for; "negative" is all that does not speak for the prompt."""
    return [control.where == "both" or role.startswith("positive") == (control.where == "positive") for role in roles]


def rows(asked: Sequence[bool], x: Tensor) -> Tensor | None:
    """The same of the rows (B,) of the batch of all roles; None for all."""
    return None if all(asked) else torch.tensor(asked, device=x.device).repeat_interleave(len(x) // len(asked))


def together(acting: Sequence[Active]) -> list[list[Active]]:
    """The ControlNets, those that are one call of a Union together: of the same network, for the same rows, in the same mode."""
    groups: dict[object, list[Active]] = {}
    for each in acting:
        if isinstance(each.network, ControlNet):
            union = isinstance(each.network, ControlNetUnion)
            groups.setdefault((each.network, each.where, each.control.guess) if union else each, []).append(each)
    return list(groups.values())


def residuals_of(group: Sequence[Active], mask: Tensor | None, *asked: Any) -> list[Tensor]:
    """What one call of a ControlNet adds to each skip and to the middle, zeros in the rows that it is not for.

    asked: x, t, context and y.
    """
    x, t, context, y = (each if mask is None or each is None else each[mask] for each in asked)
    network, guess = group[0].network, group[0].control.guess
    hints = [each.hint for each in group if each.hint is not None]
    assert isinstance(network, ControlNet)
    x = x[:, : network.in_channels]
    strengths = [each.control.strength for each in group]
    if isinstance(network, ControlNetUnion):
        alone = len(group) == 1
        kinds = [each.control.kind or "" for each in group]
        found = network.residuals(x, hints, t, context, y, kinds, [1.0] if alone else strengths)
        strength = strengths[0] if alone else 1.0
    else:
        found, strength = network.residuals(x, hints[0], t, context, y), strengths[0]
    # Guess mode (lllyasviel/ControlNet gradio_canny2image.py; diffusers, controlnet.py): not where means alone count.
    scales = torch.logspace(-1, 0, len(found)).tolist() if guess and not network.pooled else [1.0] * len(found)
    return [spread(strength * scale * each, mask) for scale, each in zip(scales, found, strict=True)]


def spread(found: Tensor, mask: Tensor | None) -> Tensor:
    """What is for some rows, among zeros for the others: (b, …) -> (B, …)."""
    if mask is None:
        return found
    whole = found.new_zeros(len(mask), *found.shape[1:])
    whole[mask] = found
    return whole


def summed(all_residuals: Sequence[list[Tensor]]) -> list[Tensor]:
    return [sum(each[1:], each[0]) for each in zip(*all_residuals, strict=True)]


def summed_features(acting: Sequence[Active], masks: Mapping[Active, Tensor | None]) -> dict[int, Tensor]:
    """What T2I-Adapters add, by the number of the input block."""
    total: dict[int, Tensor] = {}
    for each in acting:
        mask = masks[each]
        for i, feature in (each.added or {}).items():
            change = each.control.strength * feature
            change = change if mask is None else change * mask[:, None, None, None]
            total[i] = total[i] + change if i in total else change
    return total

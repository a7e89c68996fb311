"""The whole checkpoint as one module, its parts under the names that they have in the file."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .checkpoint import Checkpoint, load_tensors
from .clip import text_encoder
from .errors import CheckpointError
from .family import CLIP, UNET, VAE, is_spare, looks_like, recognise
from .shapes import Shapes, below
from .unet import UNet
from .vae import AutoencoderKL


class StableDiffusion(nn.Module):
    """SD 1.x: `state_dict()` has the keys of the file, apart from the spare ones listed in family.py."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": UNet(below(shapes, UNET))})
        self.first_stage_model = AutoencoderKL(below(shapes, VAE))
        self.cond_stage_model = nn.ModuleDict({"transformer": text_encoder(below(shapes, CLIP))})

    @property
    def unet(self) -> UNet:
        return self.model["diffusion_model"]  # type: ignore[return-value]

    @property
    def vae(self) -> AutoencoderKL:
        return self.first_stage_model

    @property
    def text_encoder(self) -> nn.Module:
        return self.cond_stage_model["transformer"]


class NoInit(TorchFunctionMode):
    """Skips torch.nn.init: weights that a file is about to replace need no random numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def averaged(checkpoint: Checkpoint) -> Checkpoint:
    """The same file with the moving average that its training kept (model_ema.*) in place of the UNet's weights.

    Its names are those inside `model` with the dots taken out (ldm/modules/ema.py, LitEma): model.diffusion_model.out.2.bias
    has its average at model_ema.diffusion_modelout2bias.  Raises CheckpointError where a weight has none of its shape.
    """
    entries = dict(checkpoint.entries)
    for key in below(checkpoint.shapes, "model"):
        own, average = entries[f"model.{key}"], entries.get(f"model_ema.{key.replace('.', '')}")
        if average is None or average.shape != own.shape:
            what = "has no moving average in this file" if average is None else f"expected {own.shape}, found {average.shape}"
            raise CheckpointError(checkpoint.path, what, "draw without ema", key=f"model.{key}")
        entries[f"model.{key}"] = average
    return replace(checkpoint, entries=entries, ema=True)


def build(checkpoint: Checkpoint) -> StableDiffusion:
    """The modules that a file describes, on the meta device: shapes, no data.

    Raises CheckpointError if the file is something else, or if keys are missing, unknown or of the wrong shape.
    """
    shapes = checkpoint.shapes
    if recognise(shapes) is None:
        what, hint = looks_like(shapes)
        raise CheckpointError(checkpoint.path, f"this looks like {what}, not like an SD 1.x checkpoint{listing(shapes)}", hint)
    if checkpoint.metadata.get("modelspec.prediction_type", "epsilon") != "epsilon":
        raise CheckpointError(
            checkpoint.path, "its metadata says that it predicts v", "minisd draws with epsilon models only, so far"
        )
    try:
        with torch.device("meta"), NoInit():
            model = StableDiffusion(shapes)
    except KeyError as error:
        raise CheckpointError(checkpoint.path, "this looks like SD 1.x, but a key is missing", key=str(error.args[0])) from None
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(checkpoint.path, f"this looks like SD 1.x, but its shapes fit no network: {error}") from None
    compare(checkpoint, model)
    return model


def compare(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raises CheckpointError unless the module has exactly the file's keys and shapes, spare ones aside."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: shape for key, shape in checkpoint.shapes.items() if not is_spare(key)}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        parts = [
            f"{len(keys)} keys are {name}{listing(keys)}" for name, keys in (("missing", missing), ("unknown", unknown)) if keys
        ]
        raise CheckpointError(checkpoint.path, f"this looks like SD 1.x, but {' and '.join(parts)}")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise CheckpointError(checkpoint.path, f"expected shape {shape}, found {found[key]}", key=key)


def listing(keys: object) -> str:
    names = list(keys)  # type: ignore[call-overload]
    shown = ", ".join(names[:10])
    return f": {shown}" + (f", … ({len(names)} in all)" if len(names) > 10 else "")


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """The checkpoint's network, ready to run: eval mode, no gradients.  Raises CheckpointError as `build` does."""
    model = build(checkpoint)
    wanted = model.state_dict()
    checkpoint.require_floats(wanted)
    model.load_state_dict(load_tensors(checkpoint, wanted, dtype), strict=True, assign=True)
    return model.requires_grad_(False).eval().to(device)

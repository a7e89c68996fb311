"""The whole checkpoint as one module, its parts under the names that they have in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, ShapeError
from ..models.clip import TextEncoder, text_encoder
from ..models.family import UNET, VAE, Family, Recognition
from ..models.fit import check_dimensions, check_fit, check_vae
from ..models.shapes import Shapes, below
from ..models.taesd import TinyAutoencoder, build_tiny, prefix_of
from ..models.unet import UNet
from ..models.vae import AutoencoderKL
from .checkpoint import Checkpoint, open_checkpoint
from .recognition import listing, looks_like, recognise, vae_name
from .tensors import load_tensors
from .upload import upload_tensors
from .writers import check_nothing_left_out, is_asked_for, is_unneeded, tell_extra, torn

Module = TypeVar("Module", bound=nn.Module)
Made = TypeVar("Made")


class StableDiffusion(nn.Module):
    """`state_dict()` has the keys of the file, apart from those that nobody needs (writers.py)."""

    def __init__(self, shapes: Shapes, family: Family) -> None:
        super().__init__()
        self.tower_names = [tower.name for tower in family.towers]
        place(self, UNET, UNet(below(shapes, UNET)))
        if below(shapes, VAE):  # some files leave it to another
            place(self, VAE, AutoencoderKL(below(shapes, VAE)))
        for name in self.tower_names:
            place(self, name, text_encoder(below(shapes, name)))

    @property
    def unet(self) -> UNet:
        return self.get_submodule(UNET)  # type: ignore[return-value]

    @property
    def vae(self) -> AutoencoderKL:
        return self.get_submodule(VAE)  # type: ignore[return-value]

    @property
    def text_encoders(self) -> list[TextEncoder]:
        return [self.get_submodule(name) for name in self.tower_names]  # type: ignore[misc]


def place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module at a dotted name below another, with empty modules on the way: place(root, "a.b", m) is root.a.b = m."""
    *path, last = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.add_module(last, module)


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


def build(checkpoint: Checkpoint, family: Family, strict: bool = False) -> StableDiffusion:
    """The modules that a file describes, on the meta device: shapes, no data.

    Raises CheckpointError if keys are missing, of the wrong shape or, where that is asked for (strict), unknown.
    """
    shapes = checkpoint.shapes
    check_nothing_left_out(checkpoint.path, shapes, family)
    wanted = Shapes({key: shape for key, shape in shapes.items() if is_asked_for(key)})
    described(checkpoint, family.title, lambda: check_dimensions(wanted))
    model = described(checkpoint, family.title, lambda: StableDiffusion(shapes, family))
    compare(checkpoint, family.title, model, {key: shape for key, shape in shapes.items() if not is_unneeded(key)}, strict)
    described(checkpoint, family.title, lambda: check_fit(shapes, family))
    return model


def described(checkpoint: Checkpoint, title: str, make: Callable[[], Made]) -> Made:
    """What `make` builds of a file's shapes, on the meta device; what goes wrong on the way is the file's fault."""
    try:
        with torch.device("meta"), NoInit():
            return make()
    except KeyError as error:
        raise CheckpointError(checkpoint.path, f"this looks like {title}, but a key is missing", key=str(error.args[0])) from None
    except ShapeError as error:
        raise CheckpointError(checkpoint.path, f"this looks like {title}, but {error}", key=error.key) from None
    except (ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise CheckpointError(checkpoint.path, f"this looks like {title}, but its shapes fit no network: {error}") from None


def compare(
    checkpoint: Checkpoint, title: str, model: nn.Module, found: Mapping[str, tuple[int, ...]], strict: bool = False
) -> None:
    """Raises CheckpointError unless the file has all the module's keys in their shapes; tells what it has beside them."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if unknown and not (missing or strict or torn(unknown, found)):
        tell_extra(checkpoint.path, unknown)
    elif missing or unknown:
        parts = [
            f"{len(keys)} key{'s are' if len(keys) > 1 else ' is'} {name}{listing(keys)}"
            for name, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise CheckpointError(checkpoint.path, f"this looks like {title}, but {' and '.join(parts)}")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise CheckpointError(checkpoint.path, f"expected shape {shape}, found {found[key]}", key=key)


def ready(module: Module, device: torch.device) -> Module:
    """To run, not to learn."""
    return module.requires_grad_(False).eval().to(device)


def load_to(checkpoint: Checkpoint, keys: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return upload_tensors(checkpoint, keys, dtype, device) if device.type == "cuda" else load_tensors(checkpoint, keys, dtype)


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, strict: bool = False, vae: Sequence[Path] = ()
) -> tuple[StableDiffusion, Recognition]:
    """The checkpoint's network, ready to run (eval mode, no gradients), and what it is; vae: files for one that has none.

    Raises CheckpointError.
    """
    recognition = recognise(checkpoint, bool(vae))
    model = build(checkpoint, recognition.family, strict)
    model.load_state_dict(load_to(checkpoint, model.state_dict(), dtype, device), strict=True, assign=True)
    if not hasattr(model, VAE):
        place(model, VAE, load_vae([open_checkpoint(file) for file in vae], latent_channels(checkpoint), device, dtype))
    return ready(model, device), recognition


def latent_channels(checkpoint: Checkpoint) -> int:
    """What a checkpoint's UNet makes latents of."""
    return checkpoint.shapes[f"{UNET}.out.2.weight"][0]


def load_vae(
    files: Sequence[Checkpoint], latent_channels: int, device: torch.device, dtype: torch.dtype
) -> AutoencoderKL | TinyAutoencoder:
    """The VAE of a file: a VAE alone, the one of a whole checkpoint, or a tiny one in one file or two.

    latent_channels: what the UNet has.  Raises CheckpointError if there is none, or it does not fit.
    """
    if len(files) > 1 or prefix_of(files[0].shapes) is not None:
        return load_tiny(files, latent_channels, device, dtype)
    (checkpoint,) = files
    name, vae = described_vae(checkpoint, latent_channels)
    prefix = f"{name}." if name else ""
    tensors = load_to(checkpoint, [prefix + key for key in vae.state_dict()], dtype, device)
    vae.load_state_dict({key[len(prefix) :]: tensor for key, tensor in tensors.items()}, strict=True, assign=True)
    return ready(vae, device)


def described_vae(checkpoint: Checkpoint, latent_channels: int) -> tuple[str, AutoencoderKL]:
    """Below which name a file has its VAE ("" where it is nothing else), and the module, on the meta device.

    latent_channels: what the UNet has.  Raises CheckpointError if there is none, or it does not fit.
    """
    name = vae_name(checkpoint.shapes)
    if name is None:
        what, hint = looks_like(checkpoint.shapes)
        raise CheckpointError(checkpoint.path, f"expected a VAE, found {what}{listing(checkpoint.shapes)}", hint)
    prefix = f"{name}." if name else ""
    shapes = Shapes({key[len(prefix) :]: shape for key, shape in checkpoint.shapes.items() if key.startswith(prefix)}, prefix)
    vae = described(checkpoint, "a VAE", lambda: AutoencoderKL(shapes))
    compare(checkpoint, "a VAE", vae, {key: shape for key, shape in shapes.items() if not is_unneeded(f"{VAE}.{key}")})
    if vae.latent_channels != latent_channels:
        reason = f"is a VAE for latents of {vae.latent_channels} channels, the checkpoint has {latent_channels}"
        raise CheckpointError(checkpoint.path, reason, "take a VAE of the checkpoint's own family")
    described(checkpoint, "a VAE", lambda: check_vae(shapes, latent_channels))
    return name, vae


def load_tiny(files: Sequence[Checkpoint], latent_channels: int, device: torch.device, dtype: torch.dtype) -> TinyAutoencoder:
    """The autoencoder of one file, or of two that hold a half each, ready to run.

    latent_channels: what the UNet has.  Raises CheckpointError if a file is something else or does not fit.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        prefix = prefix_of(file.shapes)
        if prefix is None:
            raise CheckpointError(file.path, "expected the numbered layers of a TAESD, found other keys")
        if again := weights.keys() & {prefix + key for key in file.shapes}:
            raise CheckpointError(file.path, "is the same half of a TAESD as the file before", "give the other", min(again))
        weights |= {prefix + key: value for key, value in load_tensors(file, file.shapes, dtype).items()}
    return build_tiny(files[-1].path, weights, latent_channels).to(device)

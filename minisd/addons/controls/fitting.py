"""Whether a ControlNet or one of its kin was made for a UNet."""

from __future__ import annotations

from ...errors import UsageError
from ...models.control import ControlModel, LLLite, T2IAdapter
from ...models.control.lllite import layers_of
from ...models.fit import trunk
from ...models.shapes import Shapes
from ...models.unet import UNet

FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL", 1280: "the SDXL refiner"}


def check_fits(network: ControlModel, unet: UNet, downscale: int = 8) -> None:
    """Raises UsageError unless the network was made for such a UNet, and for latents so many times smaller than the picture."""
    if isinstance(network, LLLite):
        return check_layers(network, unet)
    shapes = Shapes({key: tuple(value.shape) for key, value in unet.state_dict(keep_vars=True).items()})
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
        if network.downscale != downscale:
            expected = f"controls: expected a ControlNet for latents {downscale} times smaller than the picture"
            raise UsageError(f"{expected}, found one for {network.downscale} times")
    if not fits or theirs != ours:
        model = family(unet.context_channels, unet.vector_channels)
        raise UsageError(f"controls: expected a {kind} for {model}, found one for {made_for} (it adds to {theirs} channels)")


def check_layers(network: LLLite, unet: UNet) -> None:
    """Likewise of an LLLite: the UNet has every layer that it acts on, with inputs as wide."""
    known = {name: layer.in_features for name, layer in layers_of(unet).items()}
    theirs = {name: change.down[0].in_features for name, change in network.changes().items()}
    if wrong := [name for name, width in theirs.items() if known.get(name) != width]:
        first, model = wrong[0], family(unet.context_channels, unet.vector_channels)
        here = f"{known[first]} channels" if first in known else "none"
        raise UsageError(
            f"controls: expected a ControlNet-LLLite for {model}, found one with {len(theirs)} layers, {len(wrong)} of "
            f"which do not fit: {first} has {theirs[first]} channels, here {here}"
        )


def family(context: int, vector: int) -> str:
    """By the width of the text that a network takes, and of the vector beside it."""
    known = FAMILIES.get(2048 if (context, vector) == (0, 2816) else context)
    return known or f"a model with {context} channels of text and {vector} beside it"

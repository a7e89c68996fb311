"""Names and shapes of a new checkpoint, from a few numbers: what is needed to train one, to benchmark the published
architectures without their weights, and to test.  Opening a file never comes here; a file is its own blueprint.

Reference: CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml and the constructors that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from math import prod

import torch

from ..models.family import REFINER, SD1, SD2, SDXL, UNET, VAE, Family
from ..models.shapes import Shapes

Names = dict[str, tuple[int, ...]]
SHARED = ("time_embed", "label_emb", "input_blocks", "middle_block")  # what a ControlNet has in common with a UNet


def under(name: str, shapes: Names) -> Names:
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def layer(name: str, *weight: int, bias: bool = True) -> Names:
    """Weight of the given shape, and a bias as long as its first dimension."""
    return {f"{name}.weight": weight} | ({f"{name}.bias": weight[:1]} if bias else {})


def norm(name: str, channels: int) -> Names:
    return layer(name, channels)


def clip_text(width: int, layers: int, vocabulary: int = 49_408, positions: int = 77) -> Shapes:
    """The text encoder of SD 1.x: 768 wide and 12 layers deep there."""
    shapes: Names = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (positions, width),
    }
    for i in range(layers):
        block = norm("layer_norm1", width) | norm("layer_norm2", width)
        block |= layer("mlp.fc1", 4 * width, width) | layer("mlp.fc2", width, 4 * width)
        for name in ("k_proj", "out_proj", "q_proj", "v_proj"):
            block |= layer(f"self_attn.{name}", width, width)
        shapes |= under(f"encoder.layers.{i}", block)
    return Shapes(under("text_model", shapes | norm("final_layer_norm", width)))


def vae_resnet(channels_in: int, channels_out: int) -> Names:
    shapes = norm("norm1", channels_in) | layer("conv1", channels_out, channels_in, 3, 3)
    shapes |= norm("norm2", channels_out) | layer("conv2", channels_out, channels_out, 3, 3)
    return shapes | (layer("nin_shortcut", channels_out, channels_in, 1, 1) if channels_in != channels_out else {})


def vae_middle(channels: int) -> Names:
    attention = norm("norm", channels)
    for name in ("k", "proj_out", "q", "v"):
        attention |= layer(name, channels, channels, 1, 1)
    resnet = vae_resnet(channels, channels)
    return under("block_1", resnet) | under("attn_1", attention) | under("block_2", resnet)


def vae_encoder(channels: Iterable[int], blocks: int, latent_channels: int) -> Names:
    widths = list(channels)
    shapes = layer("conv_in", widths[0], 3, 3, 3)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            shapes |= under(f"down.{i}.block.{j}", vae_resnet(before, width))
            before = width
        if i < len(widths) - 1:
            shapes |= layer(f"down.{i}.downsample.conv", width, width, 3, 3)
    shapes |= under("mid", vae_middle(before)) | norm("norm_out", before)
    return shapes | layer("conv_out", 2 * latent_channels, before, 3, 3)


def vae_decoder(channels: Iterable[int], blocks: int, latent_channels: int) -> Names:
    widths = list(channels)
    before = widths[-1]
    shapes = layer("conv_in", before, latent_channels, 3, 3) | under("mid", vae_middle(before))
    for i, width in reversed(list(enumerate(widths))):
        for j in range(blocks):
            shapes |= under(f"up.{i}.block.{j}", vae_resnet(before, width))
            before = width
        if i > 0:
            shapes |= layer(f"up.{i}.upsample.conv", width, width, 3, 3)
    return shapes | norm("norm_out", before) | layer("conv_out", 3, before, 3, 3)


def vae(encoder: Iterable[int], decoder: Iterable[int], blocks: tuple[int, int], latent_channels: int = 4) -> Shapes:
    """The autoencoder; widths from the picture down, blocks a level for encoder and decoder.

    The published ones are (128, 256, 512, 512) wide, with 2 and 3 blocks a level.
    """
    shapes = under("encoder", vae_encoder(encoder, blocks[0], latent_channels))
    shapes |= under("decoder", vae_decoder(decoder, blocks[1], latent_channels))
    shapes |= layer("quant_conv", 2 * latent_channels, 2 * latent_channels, 1, 1)
    return Shapes(shapes | layer("post_quant_conv", latent_channels, latent_channels, 1, 1))


def resblock(channels_in: int, channels_out: int, embedding: int) -> Names:
    shapes = norm("in_layers.0", channels_in) | layer("in_layers.2", channels_out, channels_in, 3, 3)
    shapes |= layer("emb_layers.1", channels_out, embedding)
    shapes |= norm("out_layers.0", channels_out) | layer("out_layers.3", channels_out, channels_out, 3, 3)
    return shapes | (layer("skip_connection", channels_out, channels_in, 1, 1) if channels_in != channels_out else {})


def open_text(width: int, layers: int, projection: int, vocabulary: int = 49_408, positions: int = 77) -> Shapes:
    """open_clip's text encoder: 1024 wide and 24 blocks deep in SD 2.x, 1280 and 32 in SDXL."""
    shapes: Names = {"positional_embedding": (positions, width), "text_projection": (width, projection)}
    shapes["token_embedding.weight"] = (vocabulary, width)
    for i in range(layers):
        block = norm("ln_1", width) | norm("ln_2", width)
        block |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        block |= layer("attn.out_proj", width, width)
        block |= layer("mlp.c_fc", 4 * width, width) | layer("mlp.c_proj", width, 4 * width)
        shapes |= under(f"transformer.resblocks.{i}", block)
    return Shapes(shapes | norm("ln_final", width))


def transformer(channels: int, context: int, depth: int, linear: bool) -> Names:
    """A SpatialTransformer; its projections are stored as linear layers, or as 1x1 convolutions, as in SD 1.x."""
    block: Names = {}
    for name, source in (("attn1", channels), ("attn2", context)):
        block |= layer(f"{name}.to_q", channels, channels, bias=False) | layer(f"{name}.to_out.0", channels, channels)
        block |= layer(f"{name}.to_k", channels, source, bias=False) | layer(f"{name}.to_v", channels, source, bias=False)
    block |= layer("ff.net.0.proj", 8 * channels, channels) | layer("ff.net.2", channels, 4 * channels)
    block |= norm("norm1", channels) | norm("norm2", channels) | norm("norm3", channels)
    projection = (channels, channels) if linear else (channels, channels, 1, 1)
    shapes = norm("norm", channels) | layer("proj_in", *projection) | layer("proj_out", *projection)
    for i in range(depth):
        shapes |= under(f"transformer_blocks.{i}", block)
    return shapes


Stage = Callable[[int, int, int], Names]  # of the channels before it, its own, and the depth of its transformer


def stage(before: int, width: int, depth: int, embedding: int, context: int, linear: bool) -> Names:
    """What the ways down and up are made of: a ResBlock and, unless `depth` is 0, a SpatialTransformer."""
    shapes = under("0", resblock(before, width, embedding))
    return shapes | (under("1", transformer(width, context, depth, linear)) if depth else {})


def way_down(channels: int, levels: list[tuple[int, int]], blocks: int, make: Stage) -> tuple[Names, list[int]]:
    """The input blocks after the first, by the width and depth of each level; and the channels that every input block has."""
    shapes: Names = {}
    skips = [channels]
    for level, (width, depth) in enumerate(levels):
        for _ in range(blocks):
            shapes |= under(f"input_blocks.{len(skips)}", make(skips[-1], width, depth))
            skips.append(width)
        if level < len(levels) - 1:
            shapes |= layer(f"input_blocks.{len(skips)}.0.op", skips[-1], skips[-1], 3, 3)
            skips.append(skips[-1])
    return shapes, skips


def way_up(skips: list[int], levels: list[tuple[int, int]], blocks: int, make: Stage) -> Names:
    """The output blocks, each of which takes the channels of an input block beside its own: the last first."""
    shapes: Names = {}
    before, number = skips[-1], 0
    for level, (width, depth) in reversed(list(enumerate(levels))):
        for block in range(blocks + 1):
            shapes |= under(f"output_blocks.{number}", make(before + skips[-1 - number], width, depth))
            before = width
            if level > 0 and block == blocks:
                shapes |= layer(f"output_blocks.{number}.{2 if depth else 1}.conv", width, width, 3, 3)
            number += 1
    return shapes


def unet(
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    depths: tuple[int, ...],
    context: int,
    middle: int = 1,
    linear: bool = False,
    vector: int = 0,
    extra_channels: int = 0,
    latent_channels: int = 4,
) -> Shapes:
    """The UNet: by level, `multipliers` of its channels and `depths` of its transformers (0 is none); `blocks` a level.

    middle: depth of the transformer in the middle.  vector: channels of the vector beside the context, 0 where there is none.
    extra_channels: of a mask or a picture beside the latents.
    SD 1.x: 320 channels, multipliers (1, 2, 4, 4), depths (1, 1, 1, 0), 2 blocks a level.
    """
    embedding = 4 * channels
    shapes = layer("time_embed.0", embedding, channels) | layer("time_embed.2", embedding, embedding)
    if vector:
        shapes |= layer("label_emb.0.0", embedding, vector) | layer("label_emb.0.2", embedding, embedding)
    shapes |= layer("input_blocks.0.0", channels, latent_channels + extra_channels, 3, 3)
    levels = [(multiplier * channels, depth) for multiplier, depth in zip(multipliers, depths, strict=True)]
    make = partial(stage, embedding=embedding, context=context, linear=linear)
    down, skips = way_down(channels, levels, blocks, make)
    narrow, wide = levels[0][0], skips[-1]
    resnet = resblock(wide, wide, embedding)
    shapes |= down
    for i, part in enumerate((resnet, transformer(wide, context, middle, linear), resnet)):
        shapes |= under(f"middle_block.{i}", part)
    shapes |= way_up(skips, levels, blocks, make)
    return Shapes(shapes | norm("out.0", narrow) | layer("out.2", latent_channels, narrow, 3, 3))


def controlnet(unet: Shapes, hint: Iterable[int] = (16, 32, 96, 256)) -> Shapes:
    """A ControlNet for a UNet with these shapes; hint: widths between which the picture is halved, for latents 8 times smaller.

    Reference: lllyasviel/ControlNet, cldm/cldm.py.
    """
    shapes: Names = {key: shape for key, shape in unet.items() if key.split(".")[0] in SHARED}
    first = shapes["input_blocks.0.0.weight"][0]
    inner, outer = list(hint)[:-1], list(hint)[-1]
    widths = [3, *(width for width in inner for _ in range(2)), outer, first]
    for i, (channels, out) in enumerate(pairwise(widths)):
        shapes |= layer(f"input_hint_block.{2 * i}", out, channels, 3, 3)
    for i in range(1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("input_blocks."))):
        ends = ("0.out_layers.3.weight", "0.op.weight", "0.weight")
        width = next(shapes[f"input_blocks.{i}.{end}"][0] for end in ends if f"input_blocks.{i}.{end}" in shapes)
        shapes |= layer(f"zero_convs.{i}.0", width, width, 1, 1)
    width = shapes["middle_block.0.out_layers.3.weight"][0]
    return Shapes(shapes | layer("middle_block_out.0", width, width, 1, 1))


def assemble(family: Family, unet: Names, autoencoder: Names, *texts: Names) -> Shapes:
    """The parts under the names that they have in a file of the family."""
    shapes = under(UNET, unet) | under(VAE, autoencoder)
    for tower, text in zip(family.towers, texts, strict=True):
        shapes |= under(tower.name, text)
    return Shapes(shapes)


# The published checkpoints, without the buffers that nobody needs.
PUBLISHED_VAE = vae((128, 256, 512, 512), (128, 256, 512, 512), blocks=(2, 3))


def sd15() -> Shapes:
    """Stable Diffusion 1.4 and 1.5."""
    return assemble(SD1, unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 768), PUBLISHED_VAE, clip_text(768, 12))


def sd21() -> Shapes:
    """Stable Diffusion 2.0 and 2.1, for 512 and for 768 pixels."""
    network = unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1024, linear=True)
    return assemble(SD2, network, PUBLISHED_VAE, open_text(1024, 24, 1024))


def sdxl() -> Shapes:
    """Stable Diffusion XL 1.0."""
    network = unet(320, (1, 2, 4), 2, (0, 2, 10), 2048, middle=10, linear=True, vector=2816)
    return assemble(SDXL, network, PUBLISHED_VAE, clip_text(768, 12), open_text(1280, 32, 1280))


def refiner() -> Shapes:
    """The refiner of Stable Diffusion XL 1.0."""
    network = unet(384, (1, 2, 4, 4), 2, (0, 4, 4, 0), 1280, middle=4, linear=True, vector=2560)
    return assemble(REFINER, network, PUBLISHED_VAE, open_text(1280, 32, 1280))


def random_weights(shapes: Names, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit variance, so that numbers compare and no layer is dead."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value *= prod(shape[1:]) ** -0.5
        else:
            value = value * 0.1 + (1.0 if key.endswith("weight") else 0.0)  # norms scale by about 1; biases are small
        weights[key] = value.to(dtype)
    return weights

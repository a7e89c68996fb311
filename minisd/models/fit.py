"""Whether the tensors of a model fit each other, by their shapes alone.

A checkpoint is its own blueprint: a layer of a wrong width is built as the file has it, and would fail amid a drawing.
Here the number of channels is followed along the way that `forward` takes in clip.py, unet.py and vae.py.  Each function says how
many channels leave, given how many come, and raises ShapeError, which names the tensor, where a layer takes another number.
"""

from __future__ import annotations

import re

from ..errors import ShapeError
from .clip import HEAD_DIM
from .family import REFINER, UNET, VAE, Family
from .shapes import Shapes, below, numbered

VOCABULARY, POSITIONS = 49_408, 77  # of CLIP's tokenizer, which no file brings along
SIZE_CHANNELS = 256  # of each number that SDXL's UNet is told beside the text


# How many dimensions a tensor has, by the end of its name; a matrix where none of these fits.
VECTORS = re.compile(r".*(\.bias|in_proj_bias|\.(\w*norm\w*|ln_\w+|(in_layers|out_layers|out)\.0)\.weight)")
EITHER = re.compile(r".*\.(proj_in|proj_out|attn_1\.[qkv])\.weight")  # a matrix, or a convolution of one pixel
STEPS = r"op|in_layers\.2|out_layers\.3|skip_connection|nin_shortcut|out\.2|input_blocks\.0\.0"
CONTROL = r"input_hint_block\.\d+|zero_convs\.\d+\.0|middle_block_out\.0"  # of a ControlNet
KERNELS = re.compile(rf"(.*\.)?((\w*_)?conv\w*|{STEPS}|{CONTROL})\.weight")
# The norms that work on groups of channels, 32 everywhere in Stable Diffusion; those of a transformer's blocks do not.
GROUPED = re.compile(r"(?!.*\.transformer_blocks\.).*\.((in_layers|out_layers|out)\.0|norm(_out|[12])?)\.weight")


def check_dimensions(shapes: Shapes) -> None:
    """Each tensor by itself.  Raises ShapeError."""
    for key, shape in shapes.items():
        kinds = ((VECTORS, (1,)), (EITHER, (2, 4)), (KERNELS, (4,)))
        expected = next((counts for pattern, counts in kinds if pattern.fullmatch(key)), (2,))
        if len(shape) not in expected or 0 in shape:
            raise ShapeError(key, f"expected {' or '.join(map(str, expected))} dimensions of 1 or more, found the shape {shape}")
        if GROUPED.fullmatch(key) and shape[0] % 32:
            raise ShapeError(key, f"expected a multiple of 32 channels, found {shape[0]}")


def check_fit(shapes: Shapes, family: Family) -> None:
    """All parts of a checkpoint; a VAE may be missing.  Raises ShapeError."""
    towers = [below(shapes, tower.name) for tower in family.towers]
    context = sum(text(tower) for tower in towers)
    vector = 0
    if family.vector:
        pooled = next(below(shapes, tower.name) for tower in family.towers if tower.pooled)
        vector = pooled["text_projection"][1] + SIZE_CHANNELS * (5 if family is REFINER else 6)
    latents = unet(below(shapes, UNET), context, vector)
    if autoencoder := below(shapes, VAE):
        check_vae(autoencoder, latents)


def same(shapes: Shapes, key: str, found: int, expected: int, what: str = "channels") -> None:
    if found != expected:
        raise ShapeError(f"{shapes.name}{key}", f"expected {expected:,} {what}, found {found:,} in its shape {shapes[key]}")


def through(shapes: Shapes, channels: int, *names: str) -> int:
    """Linear layers, convolutions and norms, one behind the other."""
    for name in names:
        key = f"{name}.weight".removeprefix(".")
        shape = shapes[key]
        same(shapes, key, shape[1] if len(shape) > 1 else shape[0], channels)
        channels = shape[0]
    return channels


def beside(shapes: Shapes, channels: int, *names: str) -> int:
    """Layers whose result is added to what comes, so that it has as many channels."""
    same(shapes, f"{names[-1]}.weight", through(shapes, channels, *names), channels)
    return channels


def split(shapes: Shapes, key: str, channels: int, heads: int) -> None:
    if heads < 1 or channels % heads:
        raise ShapeError(f"{shapes.name}{key}", f"expected channels for {heads} attention heads, found {channels}")


# ---- text encoders: to the channels of the context ----


def text(shapes: Shapes) -> int:
    if "positional_embedding" in shapes:
        return open_text(shapes)
    shapes = below(shapes, "text_model") or shapes
    width = embeddings(shapes, "embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    for layer in numbered(below(shapes, "encoder.layers")):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            beside(layer, width, "layer_norm1", f"self_attn.{name}")
        beside(layer, width, "layer_norm2", "mlp.fc1", "mlp.fc2")
    return through(shapes, width, "final_layer_norm")


def open_text(shapes: Shapes) -> int:
    width = embeddings(shapes, "token_embedding.weight", "positional_embedding")
    for layer in numbered(below(shapes, "transformer.resblocks")):
        same(layer, "attn.in_proj_weight", layer["attn.in_proj_weight"][1], through(layer, width, "ln_1"))
        for key in ("attn.in_proj_weight", "attn.in_proj_bias"):
            same(layer, key, layer[key][0], 3 * width)
        beside(layer, width, "attn.out_proj")
        beside(layer, width, "ln_2", "mlp.c_fc", "mlp.c_proj")
    if "text_projection" in shapes:
        same(shapes, "text_projection", shapes["text_projection"][0], width)
    return through(shapes, width, "ln_final")


def embeddings(shapes: Shapes, tokens: str, positions: str) -> int:
    same(shapes, tokens, shapes[tokens][0], VOCABULARY, "tokens, as many as CLIP has")
    same(shapes, positions, shapes[positions][0], POSITIONS, "positions, as many as CLIP has")
    width = shapes[tokens][1]
    same(shapes, positions, shapes[positions][1], width)
    split(shapes, tokens, width, max(1, width // HEAD_DIM))
    return width


# ---- UNet ----


def unet(shapes: Shapes, context: int, vector: int) -> int:
    """From the channels of the text, and those of what SDXL is told beside it (or 0), to those of the latents."""
    emb, (*skips, channels) = trunk(shapes, context, vector)
    outputs = numbered(below(shapes, "output_blocks"))
    if len(outputs) != len(skips):
        raise ShapeError(
            f"{shapes.name}output_blocks", f"expected {len(skips)} blocks, as before the middle, found {len(outputs)}"
        )
    for part in outputs:
        channels = block(part, channels + skips.pop(), emb, context)
    latents, taken = through(shapes, channels, "out.0", "out.2"), shapes["input_blocks.0.0.weight"][1]
    if taken not in (latents, 2 * latents, 2 * latents + 1):  # to draw, to edit, to inpaint
        same(shapes, "out.2.weight", latents, taken)
    return latents


def trunk(shapes: Shapes, context: int, vector: int) -> tuple[int, list[int]]:
    """Channels of the time embedding; and of what leaves every input block, with the middle block last."""
    first, channels = shapes["input_blocks.0.0.weight"][:2]
    emb = through(shapes, first, "time_embed.0", "time_embed.2")
    if vector:
        same(shapes, "label_emb.0.2.weight", through(shapes, vector, "label_emb.0.0", "label_emb.0.2"), emb)
    found = []
    for part in (*numbered(below(shapes, "input_blocks")), below(shapes, "middle_block")):
        found.append(channels := block(part, channels, emb, context))
    return emb, found


def block(shapes: Shapes, channels: int, emb: int, context: int) -> int:
    for part in numbered(shapes):
        if "in_layers.0.weight" in part:
            channels = residual(part, channels, emb)
        elif "proj_in.weight" in part:
            channels = transformer(part, channels, context)
        elif part:  # a convolution: the first of all, or the step to another resolution
            channels = through(part, channels, next(name for name in ("op", "conv", "") if f"{name}.weight".strip(".") in part))
    return channels


def residual(shapes: Shapes, channels: int, emb: int) -> int:
    inside = through(shapes, channels, "in_layers.0", "in_layers.2")
    same(shapes, "emb_layers.1.weight", through(shapes, emb, "emb_layers.1"), inside)
    return joined(shapes, channels, "skip_connection", through(shapes, inside, "out_layers.0", "out_layers.3"), "out_layers.3")


def joined(shapes: Shapes, channels: int, skip: str, out: int, last: str) -> int:
    """What leaves a residual block: the sum of what came, through a convolution where the file has one, and of `last`."""
    around = through(shapes, channels, skip) if f"{skip}.weight" in shapes else channels
    same(shapes, f"{last}.weight", out, around)
    return out


def transformer(shapes: Shapes, channels: int, context: int) -> int:
    inside = through(shapes, channels, "norm", "proj_in")
    heads = 8 if len(shapes["proj_in.weight"]) == 4 else channels // 64  # see unet.py
    for part in numbered(below(shapes, "transformer_blocks")):
        for norm, name, seen in (("norm1", "attn1", inside), ("norm2", "attn2", context)):
            query = through(part, inside, norm, f"{name}.to_q")
            same(part, f"{name}.to_k.weight", through(part, seen, f"{name}.to_k"), query)
            split(part, f"{name}.to_q.weight", query, heads)
            value = through(part, seen, f"{name}.to_v")
            split(part, f"{name}.to_v.weight", value, heads)
            same(part, f"{name}.to_out.0.weight", through(part, value, f"{name}.to_out.0"), inside)
        both = through(part, inside, "norm3", "ff.net.0.proj")
        same(part, "ff.net.2.weight", through(part, both // 2, "ff.net.2"), inside)
        split(part, "ff.net.0.proj.weight", both, 2)
    same(shapes, "proj_out.weight", through(shapes, inside, "proj_out"), channels)
    return channels


# ---- VAE ----


def check_vae(shapes: Shapes, latents: int) -> None:
    channels = through(shapes, 3, "encoder.conv_in")
    down, up = (numbered(below(shapes, name)) for name in ("encoder.down", "decoder.up"))
    if len(down) != len(up):
        raise ShapeError(f"{shapes.name}decoder.up", f"expected {len(down)} resolutions, as the encoder has, found {len(up)}")
    for part in down:
        channels = level(part, channels)
    channels = middle(below(shapes, "encoder.mid"), channels)
    channels = through(shapes, channels, "encoder.norm_out", "encoder.conv_out", "quant_conv")
    same(shapes, "quant_conv.weight", channels, 2 * latents)  # their mean and their variance

    channels = through(shapes, latents, "post_quant_conv", "decoder.conv_in")
    channels = middle(below(shapes, "decoder.mid"), channels)
    for part in reversed(up):
        channels = level(part, channels)
    same(shapes, "decoder.conv_out.weight", through(shapes, channels, "decoder.norm_out", "decoder.conv_out"), 3)


def level(shapes: Shapes, channels: int) -> int:
    for part in numbered(below(shapes, "block")):
        channels = residual_of_vae(part, channels)
    for step in ("downsample.conv", "upsample.conv"):
        if f"{step}.weight" in shapes:
            channels = through(shapes, channels, step)
    return channels


def residual_of_vae(shapes: Shapes, channels: int) -> int:
    return joined(shapes, channels, "nin_shortcut", through(shapes, channels, "norm1", "conv1", "norm2", "conv2"), "conv2")


def middle(shapes: Shapes, channels: int) -> int:
    channels = residual_of_vae(below(shapes, "block_1"), channels)
    query = through(shapes, channels, "attn_1.norm", "attn_1.q")
    same(shapes, "attn_1.k.weight", through(shapes, channels, "attn_1.k"), query)
    same(shapes, "attn_1.proj_out.weight", through(shapes, channels, "attn_1.v", "attn_1.proj_out"), channels)
    return residual_of_vae(below(shapes, "block_2"), channels)

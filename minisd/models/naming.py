"""The names of diffusers and transformers for the weights of a raw checkpoint, in both directions.

Each network is a table of modules, raw name beside theirs, written down from its structure, which can be read off the keys of
either side.  A few tensors are more than renamed: open_clip keeps q, k and v in one matrix, and its projection the other way
round; the VAE's attention has 1x1 convolutions where diffusers has matrices.

Reference: diffusers 0.42, loaders/single_file_utils.py; transformers 5, models/clip/modeling_clip.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from .family import SD2, UNET, VAE, Family, Tower, text_skip


@dataclass(frozen=True)
class Link:
    """A tensor here and what it is there: one, or three that lie one above the other."""

    raw: str
    theirs: tuple[str, ...]
    transposed: bool = False


@dataclass
class Names:
    """modules: raw name -> theirs, as prefixes of keys; links: by the raw key, tensors that are more than renamed."""

    modules: dict[str, str] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)

    def forward(self, keys: Iterable[str]) -> list[Link]:
        """A link for every raw key that has a place there."""
        special = {link.raw: link for link in self.links}
        found = ((key, renamed(key, self.modules)) for key in keys if key not in special)
        return [Link(key, (name,)) for key, name in found if name] + [special[key] for key in keys if key in special]

    def backward(self, keys: Collection[str]) -> list[Link]:
        """A link for every one of their keys that has a place here."""
        special = [link for link in self.links if link.theirs[0] in keys]
        taken = {name for link in special for name in link.theirs}
        modules = {theirs: raw for raw, theirs in self.modules.items()}
        found = ((renamed(key, modules), key) for key in keys if key not in taken)
        return [Link(raw, (key,)) for raw, key in found if raw] + special


def renamed(key: str, modules: dict[str, str]) -> str | None:
    """The key with the longest known module at its beginning replaced."""
    parts = key.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        prefix = ".".join(parts[:cut])
        if prefix in modules:
            return ".".join(filter(None, [modules[prefix], *parts[cut:]]))
    return None


@dataclass(frozen=True)
class Level:
    """A resolution of the UNet on its way down or up."""

    resnets: int
    attention: bool
    resampled: bool  # whether a change of resolution follows


def raw_levels(keys: Collection[str], way: str, resampler: str) -> list[Level]:
    """The levels of a raw UNet: `input_blocks`, whose first is a convolution, or `output_blocks`."""
    levels, layers, attention = [], 0, False
    count = length_of(keys, way)
    for i in range(1 if way == "input_blocks" else 0, count):
        names = {key.split(".")[2] for key in keys if key.startswith(f"{way}.{i}.") and f".{resampler}." in key}
        if f"{way}.{i}.0.{resampler}.weight" not in keys:
            layers += 1
            attention |= f"{way}.{i}.1.norm.weight" in keys
        if names:
            levels.append(Level(layers, attention, True))
            layers, attention = 0, False
    return [*levels, Level(layers, attention, False)]


def their_levels(keys: Collection[str], way: str) -> list[Level]:
    """The same of a UNet in diffusers' naming: `down_blocks` or `up_blocks`."""
    blocks = length_of(keys, way)

    def level(b: int) -> Level:
        inside = {".".join(key.split(".")[2:4]) for key in keys if key.startswith(f"{way}.{b}.")}
        resnets = sum(name.startswith("resnets.") for name in inside)
        return Level(resnets, "attentions.0" in inside, any("samplers" in name for name in inside))

    return [level(b) for b in range(blocks)]


def length_of(keys: Collection[str], way: str) -> int:
    """How many blocks a way has.  Raises ValueError where one has no number, or one that no network has."""
    numbers = {key.split(".")[1] for key in keys if key.startswith(f"{way}.")}
    strange = [number for number in numbers if not (number.isascii() and number.isdecimal() and len(number) <= 3)]
    if strange:
        raise ValueError(f"{way}: expected the number of a block, found {strange[0][:80]!r}")
    return 1 + max(map(int, numbers), default=-1)


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_names(down: list[Level], up: list[Level]) -> Names:
    """Names of a UNet with these levels; attention modules have the same inner names on both sides."""
    modules = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    modules |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    modules |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    modules |= way_names(down, "input_blocks", "down_blocks")
    modules |= resnet("middle_block.0", "mid_block.resnets.0") | resnet("middle_block.2", "mid_block.resnets.1")
    modules["middle_block.1"] = "mid_block.attentions.0"
    return Names(modules | way_names(up, "output_blocks", "up_blocks"))


def way_names(levels: list[Level], raw: str, theirs: str) -> dict[str, str]:
    """The way down or up.  Down, what changes the resolution is a block of its own here; up, it ends the block before."""
    modules: dict[str, str] = {}
    i = 1 if raw == "input_blocks" else 0
    for b, level in enumerate(levels):
        for j in range(level.resnets):
            modules |= layer(f"{raw}.{i}", f"{theirs}.{b}", j)
            i += 1
        if level.resampled and raw == "input_blocks":
            modules[f"{raw}.{i}.0.op"] = f"{theirs}.{b}.downsamplers.0.conv"
            i += 1
        elif level.resampled:
            modules[f"{raw}.{i - 1}.{1 + level.attention}.conv"] = f"{theirs}.{b}.upsamplers.0.conv"
    return modules


def layer(raw: str, theirs: str, j: int) -> dict[str, str]:
    return resnet(f"{raw}.0", f"{theirs}.resnets.{j}") | {f"{raw}.1": f"{theirs}.attentions.{j}"}


def resnet(raw: str, theirs: str) -> dict[str, str]:
    return {f"{raw}.{ours}": f"{theirs}.{name}" for ours, name in RESNET.items()}


def vae_names(levels: int, layers: int) -> Names:
    """Names of a VAE with so many levels, and layers of each in the encoder; the decoder has one more."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, way, count, resampler in (("encoder", "down", layers, "downsample"), ("decoder", "up", layers + 1, "upsample")):
        modules |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        modules[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        modules |= {f"{half}.mid.block_{j + 1}": f"{half}.mid_block.resnets.{j}" for j in (0, 1)}
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        for ours, theirs in attention.items():
            modules[f"{half}.mid.attn_1.{ours}"] = f"{half}.mid_block.attentions.0.{theirs}"
        for level in range(levels):
            block = f"{half}.{way}_blocks.{level if way == 'down' else levels - 1 - level}"  # theirs go up from the smallest
            modules |= {f"{half}.{way}.{level}.block.{j}": f"{block}.resnets.{j}" for j in range(count)}
            modules[f"{half}.{way}.{level}.{resampler}.conv"] = f"{block}.{resampler}rs.0.conv"
    inner = {f"{raw}.nin_shortcut": f"{theirs}.conv_shortcut" for raw, theirs in modules.items() if "resnets" in theirs}
    return Names(modules | inner)


def is_matrix(raw: str) -> bool:
    """Whether a weight of the VAE is a 1x1 convolution here and a matrix there."""
    return re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight", raw) is not None


def clip_names(nested: bool) -> Names:
    """OpenAI's text encoder, whose names are transformers' own; nested: below `text_model`, as most files have it."""
    return Names({"text_model" if nested else "": "text_model"})


def open_names(layers: int) -> Names:
    """open_clip's text encoder with so many layers."""
    names = Names({"ln_final": "text_model.final_layer_norm", "token_embedding": "text_model.embeddings.token_embedding"})
    names.links.append(Link("positional_embedding", ("text_model.embeddings.position_embedding.weight",)))
    names.links.append(Link("text_projection", ("text_projection.weight",), transposed=True))
    for i in range(layers):
        raw, theirs = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
        inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        names.modules |= {f"{raw}.{ours}": f"{theirs}.{name}" for ours, name in inner.items()}
        for kind in ("weight", "bias"):
            parts = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            names.links.append(Link(f"{raw}.attn.in_proj_{kind}", parts))
    return names


@dataclass(frozen=True)
class Place:
    """A network: its folder there, the beginning of its names here."""

    folder: str
    prefix: str
    tower: Tower | None = None


def is_open(tower: Tower) -> bool:
    return tower.name.endswith(".model")


def folder_of(tower: Tower) -> str:
    """The text encoder's folder: SDXL's second, and the refiner's only one, is text_encoder_2."""
    return "text_encoder_2" if tower.pooled else "text_encoder"


def places(family: Family) -> list[Place]:
    towers = [Place(folder_of(tower), f"{tower.name}.", tower) for tower in family.towers]
    return [Place("unet", f"{UNET}."), Place("vae", f"{VAE}."), *towers]


def names_of(place: Place, keys: Collection[str], raw: bool) -> Names:
    """The names of a network with these keys: raw ones without their prefix, or theirs."""
    if place.folder == "unet":
        if raw:
            return unet_names(raw_levels(keys, "input_blocks", "op"), raw_levels(keys, "output_blocks", "conv"))
        return unet_names(their_levels(keys, "down_blocks"), their_levels(keys, "up_blocks"))
    if place.folder == "vae":
        down = "encoder.down." if raw else "encoder.down_blocks."
        return vae_names(count(keys, down), count(keys, f"{down}0.block." if raw else f"{down}0.resnets."))
    assert place.tower is not None
    if is_open(place.tower):
        layers = count(keys, "transformer.resblocks." if raw else "text_model.encoder.layers.")
        return open_names(layers - unused_layers(place.tower, layers) if raw else layers)
    return clip_names(not raw or any(key.startswith("text_model.") for key in keys))


def unused_layers(tower: Tower, layers: int) -> int:
    """How many of a raw text encoder's last layers theirs lacks: SD 2's ends with the one that is used."""
    return text_skip(tower, layers) if tower in SD2.towers else 0


def count(keys: Collection[str], prefix: str) -> int:
    """How many numbered things follow a prefix."""
    return len({key[len(prefix) :].split(".", 1)[0] for key in keys if key.startswith(prefix)})
